"""What the text of an answer is made of: what is said, reasoning, and calls of tools."""

from __future__ import annotations

from collections.abc import Sequence

from jlayer.serving.wire.errors import invalid
from jlayer.serving.wire.fields import check_count
from jlayer.serving.wire.served import Served

MOST_TOOLS = 512


class Answer:
    """One text, as it grows. `deltas` are parts of a message as chunks carry them."""

    def __init__(self):
        self.calls: list[dict] = []
        self._said: list[str] = []

    def feed(self, text: str) -> list[dict]:
        if not text:
            return []
        self._said.append(text)
        return [{"content": text}]

    def finish(self) -> list[dict]:
        return []

    def message(self) -> dict:
        return {"role": "assistant", "content": "".join(self._said), "refusal": None}


class Answers:
    """How the answers to one request are read. `tools`: those that the template is told of;
    `shown`: special tokens that stand in the text."""

    def __init__(self, tools: list[dict] | None = None, shown: Sequence[int] = ()):
        self.tools, self.shown = tools, tuple(shown)

    def new(self) -> Answer:
        return Answer()

    def constraint(self, eos_ids: tuple[int, ...]) -> object | None:
        """What the text has to be for the tools' sake."""
        return None


def answers_of(form, served: Served) -> Answers:
    """Raises Refused."""
    check_count(form.tools, "tools", MOST_TOOLS)
    if form.tools and form.tool_choice != "none":
        raise invalid(
            "tools: this model's template is of no kind whose calls are known here",
            param="tools",
            code="unsupported_parameter",
        )
    return Answers()
