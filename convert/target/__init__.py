"""The folder that is written: lock, space, files, journal."""
