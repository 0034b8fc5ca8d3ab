"""Where the cursor of a terminal is after some text."""

from jlayer.app.status import column_after


def test_the_column_of_the_cursor_is_known():
    assert column_after(0, "abc", 80) == 3
    assert column_after(3, "\t", 80) == 8
    assert column_after(78, "\t", 80) == 79
    assert column_after(79, "x", 80) == 80
    assert column_after(80, "x", 80) == 1
    assert column_after(79, "犬", 80) == 2
    assert column_after(9, "one\ntwo", 80) == 3
