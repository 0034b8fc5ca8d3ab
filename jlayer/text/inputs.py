"""What a user puts into a chat template: checked, and as plain JSON values.

A template could call the methods of anything else. What is wrong is said here, in one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jlayer.errors import UsageError
from jlayer.text.marks import strings_of

_ROLE = re.compile(r"[\w .:@/-]{1,64}")
# Names under which a message's reasoning is passed; templates read the first (transformers).
_REASONING = ("reasoning_content", "thinking", "reasoning")
# What a template is told by arguments of its own.
_OWN = {
    "messages": "give them as the prompt or as `messages`",
    "chat_template": "it is an option of its own",
    "self": "templates have a value of that name themselves",
}
_TOOL = 'expected a JSON schema: {"type": "function", "function": {"name": ..., "parameters": ...}}'


def plain_inputs(messages, *, tools=None, documents=None) -> dict:
    """Raises UsageError where one of the three is not what templates read."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UsageError("messages: expected a non-empty list of {'role': ..., 'content': ...}")
    for at, tool in enumerate(_rows(tools, "tools")):
        _check_tool(tool, f"tools[{at}]")
    for at, document in enumerate(_rows(documents, "documents")):
        if not isinstance(document, Mapping):
            found = type(document).__name__
            raise UsageError(
                f"documents[{at}]: found a {found}, expected {{'title': ..., 'text': ...}}"
            )
    return {
        "messages": [_message(found, f"messages[{i}]") for i, found in enumerate(messages)],
        "tools": _plain(tools, "tools"),
        "documents": _plain(documents, "documents"),
    }


def plain_variables(variables: Mapping | None) -> dict:
    """Further variables. A name that no template knows is passed over by it.

    Raises UsageError where a name is none, or stands for something with an argument of its own.
    """
    if variables is not None and not isinstance(variables, Mapping):
        found = type(variables).__name__
        raise UsageError(f"template variables: found a {found}, expected a mapping of names")
    for name in variables or ():
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"template variables: {name!r} is no name of a variable")
        if name in _OWN:
            raise UsageError(f"template variables: {name} is none of them; {_OWN[name]}")
    return _plain(dict(variables or {}), "template variables")


def _rows(value, where):
    if value is None:
        return ()
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise UsageError(f"{where}: found a {type(value).__name__}, expected a list of mappings")
    return value


def _check_tool(tool, where):
    """A function as OpenAI's protocol has it, or the same without its cover, or another kind of
    tool that names itself. What else a schema holds is the template's."""
    if callable(tool):
        raise UsageError(
            f"{where}: found a function; {_TOOL}, as transformers.utils.get_json_schema makes it"
        )
    if not isinstance(tool, Mapping):
        raise UsageError(f"{where}: found a {type(tool).__name__}, {_TOOL}")
    is_covered = "function" in tool or (tool.get("type") == "function" and "name" not in tool)
    function = tool.get("function") if is_covered else tool
    if not isinstance(function, Mapping):
        raise UsageError(f"{where}: its function is {function!r:.60}, {_TOOL}")
    name = function.get("name", None if is_covered else tool.get("type"))
    if not isinstance(name, str) or not name:
        raise UsageError(f"{where}: its name is {name!r:.60}, {_TOOL}")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise UsageError(f"{where}: the parameters of {name} are {parameters!r:.60}, {_TOOL}")


def _message(message, where):
    if not isinstance(message, Mapping):
        raise UsageError(f"{where}: found a {type(message).__name__}, expected a mapping")
    # None is dropped, as transformers does: APIs send it, and templates print it as "None".
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise UsageError(f"{where}: role is {role!r}, expected a plain word such as 'user'")
    message = _plain(message, where)
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value, where):
    """`value` as JSON holds it; raises UsageError where it cannot."""
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))
        for string in strings_of(plain, keys=True):
            string.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: not valid Unicode ({error.reason})") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {error}; expected text, numbers, lists and mappings") from None
    return plain


# The last message left open


@dataclass(frozen=True)
class OpenEnd:
    """Where the text of a chat ends within its last message, which the model is to continue.

    As in transformers a tag is put behind the message's text, and the rendered chat is cut there.
    fields: the keys of the message that hold the text. text: what the message says.
    """

    fields: tuple[str, ...]
    text: str

    TAG = "CONTINUE_FINAL_MESSAGE_TAG "

    @classmethod
    def of(cls, plain: Mapping, wanted: bool | str, template: str) -> OpenEnd | None:
        """None where nothing is to be continued. `wanted`: True, or the key of the text."""
        if not wanted:
            return None
        key = wanted if isinstance(wanted, str) else "content"
        last = plain["messages"][-1]
        value = last.get(key)
        blocks = [block["text"] for block in _text_blocks(value)]
        if isinstance(value, str):
            blocks = [value]
        where = f"continue_final_message: the last message ({last['role']})"
        if not blocks:
            raise UsageError(f"{where} has no text under {key!r}, so there is nothing to continue")
        fields = (key,)
        if key in _REASONING:  # under several names, of which the template reads one
            fields = tuple(name for name in _REASONING if last.get(name) == value)
        if not any(name in template for name in fields):
            raise UsageError(f"{where}: this chat template does not read {key!r}")
        if any(cls.TAG.strip() in string for string in strings_of(plain)):
            raise UsageError(f"{where}: messages hold {cls.TAG.strip()!r}, which marks its end")
        return cls(fields, blocks[-1])

    def tagged(self, variables: Mapping) -> dict:
        """The template's variables with the tag in the last message."""
        *before, last = variables["messages"]
        last = last | {name: self._tagged(last[name]) for name in self.fields}
        return {**variables, "messages": [*before, last]}

    def _tagged(self, value):
        if isinstance(value, str):
            return value + self.TAG
        final = _text_blocks(value)[-1]
        return [
            block | {"text": block["text"] + self.TAG} if block is final else block
            for block in value
        ]

    def length(self, text: str) -> int:
        """How many characters of a rendered chat stand before the end."""
        at = text.rfind(self.TAG.strip())
        if at < 0 or self.text.strip() not in text:
            raise UsageError(
                "continue_final_message: this chat template leaves out the last message, or changes"
                " it, so it cannot be continued"
            )
        if text.startswith(self.TAG, at):
            return at
        return len(text[:at].rstrip())  # the template took the space behind the text, so we do too


def _text_blocks(value) -> list[dict]:
    blocks = value if isinstance(value, list) else ()
    return [b for b in blocks if isinstance(b, dict) and isinstance(b.get("text"), str)]


def without_marks_beyond(marked: str, n: int, marks: str) -> str:
    """The beginning of a marked text that holds `n` characters, with its last mark closed."""
    kept, opened = [], False
    for character in marked:
        if character in marks:
            opened = character == marks[0]
        elif n == 0:
            break
        else:
            n -= 1
        kept.append(character)
    return "".join(kept) + (marks[1] if opened else "")
