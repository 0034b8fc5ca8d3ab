"""Disk → host → device → dropped: every side effect on weights lives here."""
