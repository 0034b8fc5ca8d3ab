"""The command line: the table of verbs and their modules."""
