"""What the text of an answer is made of: what is said, reasoning, and calls of tools.

How models write these is in `text.reasoning`, `text.conventions` and `text.calls`; here it becomes
parts of OpenAI's messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from jlayer.serving.wire.errors import invalid
from jlayer.serving.wire.served import Served
from jlayer.text.calls import Arguments, CallBegun, Content, ToolParser
from jlayer.text.conventions import Convention, convention_of
from jlayer.text.reasoning import REASONING, ReasoningMarks, ReasoningSplitter, reasoning_marks_of
from jlayer.text.tools import Tool, ToolChoice, parameters_of, read_tool_choice, read_tools


class Answer:
    """One text, as it grows. `deltas` are parts of a message as chunks carry them."""

    def __init__(self, splitter: ReasoningSplitter, parser: ToolParser | None):
        self._splitter, self._parser = splitter, parser
        self._said: list[str] = []
        self._reasoning: list[str] = []

    @property
    def calls(self) -> list:
        return [] if self._parser is None else self._parser.calls

    def feed(self, text: str) -> list[dict]:
        return self._deltas(self._splitter.feed(text)) if text else []

    def finish(self) -> list[dict]:
        """What was held back for a mark that did not come."""
        deltas = self._deltas(self._splitter.finish())
        if self._parser is not None:
            deltas += [self._delta(event) for event in self._parser.finish()]
        return deltas

    def message(self) -> dict:
        """All of it."""
        content = "".join(self._said)
        found = {
            "role": "assistant",
            "content": None if self.calls and not content else content,
            "refusal": None,
        }
        if self._reasoning:
            found["reasoning_content"] = "".join(self._reasoning)
        if self.calls:
            found["tool_calls"] = [_call(call.id, call.name, call.arguments) for call in self.calls]
        return found

    def _deltas(self, pieces):
        found = []
        for kind, text in pieces:
            if kind == REASONING:
                self._reasoning.append(text)
                found.append({"reasoning_content": text})
            elif self._parser is None:
                found.append(self._delta(Content(text)))
            else:
                found += [self._delta(event) for event in self._parser.feed(text)]
        return found

    def _delta(self, event):
        if isinstance(event, CallBegun):
            return {"tool_calls": [{"index": event.index, **_call(event.id, event.name, "")}]}
        if isinstance(event, Arguments):
            part = {"index": event.index, "function": {"arguments": event.text}}
            return {"tool_calls": [part]}
        self._said.append(event.text)
        return {"content": event.text}


def _call(call_id, name, arguments):
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


@dataclass(frozen=True)
class Answers:
    """How the answers to one request are read. `convention`: None where no tools are offered."""

    tools: tuple[Tool, ...]
    choice: ToolChoice
    convention: Convention | None
    is_parallel: bool
    marks: ReasoningMarks | None

    @property
    def rows(self) -> list[dict] | None:
        """The tools that the template is told of."""
        return [dict(tool.row) for tool in self.tools] if self.choice.may_call else None

    def shown(self, served: Served) -> tuple[int, ...]:
        """Special tokens that stand in the text: marks of calls and of reasoning."""
        found = set()
        for marks in (self.convention, self.marks):
            if marks is not None and served.text is not None:
                found |= marks.shown_tokens(served.text)
        return tuple(sorted(found))

    def is_open(self, served: Served, ids: list[int]) -> bool:
        """Whether the prompt ends within the reasoning."""
        if self.marks is None or served.text is None:
            return False
        end = served.text.decode(ids[-16:], skip_special_tokens=False)
        return self.marks.are_left_open(end)

    def held(self, served: Served, constraint, *, eos_ids: tuple[int, ...], is_open: bool):
        """What a text has to be: as the client wants it, or calls where there must be some;
        reasoning before it is free. Raises UsageError."""
        if self.choice.must_call:
            from jlayer.text.tools import calls_only

            sizes = {"vocab_size": served.vocab_size, "eos_ids": eos_ids}
            constraint = calls_only(
                served.tokenizer(),
                self.convention,
                self.choice.tools,
                is_parallel=self.is_parallel,
                **sizes,
            )
        tokens = None if self.marks is None else self.marks.token_ids(served.text)
        if constraint is None or tokens is None:
            return constraint
        return constraint.after_reasoning(tokens, is_open=is_open)

    def new(self, answer_id: str, choice: int, *, is_open: bool) -> Answer:
        splitter = ReasoningSplitter(self.marks, is_open=is_open)
        if self.convention is None:
            return Answer(splitter, None)
        parser = ToolParser(
            self.convention,
            parameters_of(self.choice.tools),
            most=None if self.is_parallel else 1,
            streams=self.choice.must_call,
            new_id=_ids(answer_id, choice, self.convention),
        )
        return Answer(splitter, parser)


def answers_of(form, served: Served) -> Answers:
    """Raises Refused and UsageError: tools that are none, or that no convention is known for."""
    tools = tuple(read_tools(form.tools))
    choice = read_tool_choice(form.tool_choice, tools)
    template = served.template_source(has_tools=choice.may_call)
    convention = convention_of(template) if choice.may_call else None
    if choice.may_call and convention is None:
        raise invalid(
            "tools: how this model's chat template wants tools to be called is not known here; "
            "send none, or tool_choice: 'none'",
            param="tools",
            code="unsupported_parameter",
        )
    added = () if served.text is None else served.text.special_tokens
    return Answers(
        tools,
        choice,
        convention,
        form.parallel_tool_calls is not False,
        reasoning_marks_of(template, added),
    )


def _ids(answer_id, choice, convention) -> Callable[[], str]:
    """Ids of calls: the same for each who reads the answer."""
    count = 0

    def new_id():
        nonlocal count
        count += 1
        found = hashlib.sha256(f"{answer_id} {choice} {count}".encode()).hexdigest()
        return f"call_{found[:24]}" if convention.n_id is None else found[: convention.n_id]

    return new_id
