"""What becomes of weights and side files on their way."""
