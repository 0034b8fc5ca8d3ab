"""Source checkpoints of every published form: opened, checked, and streamed."""
