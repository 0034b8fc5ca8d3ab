"""What the machine can do, and what becomes of it."""
