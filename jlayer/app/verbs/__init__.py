"""One module a verb, imported when chosen."""
