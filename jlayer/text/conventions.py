"""How a model writes that it calls a tool: the conventions, and which one a chat template has.

What was written is read by `calls`; what a client sends, and how a model is made to call, is in
`tools`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SPACE = " \t\r\n"


@dataclass(frozen=True)
class Convention:
    """Calls in a text are begin, then a call, more calls with `between` before each, and end.

    call: the text of one with {name} and {arguments} in it; arguments are JSON, or each a parameter
    by itself, as the `form` says: one of `elements`.
    opening: what begins calls where they are looked for in a text; unopened: with what a call
    itself begins that is looked for without it. fillers: characters that may stand before the first
    call and between two. closing: what ends them; it may be missing.
    starts_text: the text may begin with a call that nothing announces.
    is_parallel: a message may hold several.
    marks: texts that may be special tokens, which `TextStream` leaves out if it is not told.
    n_id: characters of a call's id, letters and digits; None: any.
    signs: parts of a template's source by which the convention is known.
    """

    name: str
    call: str
    signs: tuple[str, ...]
    begin: str = ""
    between: str = "\n"
    end: str = ""
    form: str = "json"
    opening: str = "<tool_call>"
    unopened: str = ""
    fillers: tuple[str, str] = (SPACE, SPACE)
    closing: str = "</tool_call>"
    starts_text: bool = False
    is_parallel: bool = True
    marks: tuple[str, ...] = ("<tool_call>", "</tool_call>")
    n_id: int | None = None

    def shown_tokens(self, tokenizer) -> frozenset[int]:
        """The special tokens among the marks, which `TextStream` is to show."""
        known = tokenizer.special_tokens
        return frozenset(known[mark] for mark in self.marks if mark in known)


_MISTRAL = Convention(
    "mistral",
    '{{"name": "{name}", "arguments": {arguments}}}',
    signs=("[TOOL_CALLS]",),
    begin="[TOOL_CALLS][",
    between=", ",
    end="]",
    form="named",
    opening="[TOOL_CALLS]",
    fillers=(SPACE + "[", SPACE + ","),
    closing="]",
    marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    n_id=9,
)
# In the order in which they are looked for.
CONVENTIONS = (
    Convention(
        "qwen 3 coder",
        "<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>",
        signs=("<tool_call>", "<function=", "<parameter="),
        form="function",
        unopened="<function=",  # Qwen 3 Coder often forgets the mark before it
    ),
    Convention(
        "glm 4",
        "<tool_call>{name}\n{arguments}</tool_call>",
        signs=("<tool_call>", "<arg_key>"),
        form="keys",
    ),
    replace(
        _MISTRAL,
        name="mistral, by name",
        call="[TOOL_CALLS]{name}[ARGS]{arguments}",
        signs=("[TOOL_CALLS]", "[ARGS]"),
        begin="",
        between="",
        end="",
    ),
    replace(_MISTRAL, begin="[TOOL_CALLS] [", signs=("[TOOL_CALLS] [",)),
    _MISTRAL,
    Convention(
        "hermes",
        '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>',
        signs=("<tool_call>", "</tool_call>"),
    ),
    Convention(
        "llama 3",
        '{{"name": "{name}", "parameters": {arguments}}}',
        signs=('"parameters"', "tool_calls", "ipython"),
        opening="<|python_tag|>",
        fillers=(SPACE, SPACE + ";"),
        closing="",
        starts_text=True,
        is_parallel=False,
        marks=("<|python_tag|>",),
    ),
)


def convention_of(template: str) -> Convention | None:
    """The convention that a chat template's source shows, None where it is none of these."""
    return next((row for row in CONVENTIONS if all(sign in template for sign in row.signs)), None)
