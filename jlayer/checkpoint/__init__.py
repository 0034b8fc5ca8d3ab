"""Checkpoints on disk: the layered format, published folders, headers, digests, the hub."""
