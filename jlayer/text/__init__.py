"""Text to ids and back. Needs the ground floor alone."""
