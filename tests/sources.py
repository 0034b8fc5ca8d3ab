"""Where a published form is from, as the tables of such forms say it."""

import re

# A row's source is `owner/name@commit: path`, the commit cut to 12 digits. A row without such a
# file says which model is remembered to have the form, or what reads it.
PUBLISHED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{12}: \S+")
UNFOUND = "no public file found; "


def assert_fifty_are_published(sources):
    """And each of the others says that no file was found."""
    found = {source for source in sources if PUBLISHED.match(source)}
    assert len(found) >= 50
    assert all(source.startswith(UNFOUND) for source in set(sources) - found)
