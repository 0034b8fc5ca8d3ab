"""Where marks stand in a user's strings."""

from jlayer.text.marks import ControlTokens, mapped, mark_control_tokens, mark_whole


def test_a_string_is_marked_inside_its_white_space():
    found = [mark_whole(text, "[]") for text in (" a b\n", "a", " ", "")]
    assert found == [" [a b]\n", "[a]", " ", ""]


def test_every_string_of_a_message_is_marked_but_its_role_and_types():
    message = {"role": "user", "content": [{"type": "text", "text": "x"}, 1, None, True]}
    marked = {"role": "user", "content": [{"type": "text", "text": "[x]"}, 1, None, True]}
    assert mapped(message, lambda text: mark_whole(text, "[]")) == marked


def test_control_tokens_are_marked_and_ends_that_may_cut_one():
    tokens = ControlTokens(["</s>", "</s>!"])
    assert mark_control_tokens("a</s>!b</s>c", "[]", tokens) == "a[</s>!]b[</s>]c"
    found = [mark_control_tokens(text, "[]", tokens) for text in ("a <", "s> a", "a", "")]
    assert found == ["a <[]", "[]s> a", "a", ""]
