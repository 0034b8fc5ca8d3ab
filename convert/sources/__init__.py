"""Any published form, opened and checked."""
