"""The target folder: its lock, its files, and what an interrupted run left in it."""
