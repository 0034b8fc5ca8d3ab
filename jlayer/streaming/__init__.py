"""Moves weights from disk to host to device and drops them, as a schedule says."""
