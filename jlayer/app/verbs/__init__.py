"""One module for each verb, imported when the verb is chosen."""
