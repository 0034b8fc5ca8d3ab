"""Chats: which template a model has, what goes into it, and the text that comes out.

A template is a program by whoever published the checkpoint. `sandbox` runs it. Which control tokens
of its text are real is decided with `marks`. Ids are left to `tokenizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from jlayer.config import unknown_name
from jlayer.errors import CheckpointError, UsageError
from jlayer.small_files import SmallFiles
from jlayer.text import sandbox
from jlayer.text.inputs import OpenEnd, plain_inputs, plain_variables, without_marks_beyond
from jlayer.text.marks import (
    Rendered,
    control_parts,
    control_tokens,
    keys_of,
    mapped,
    mark_control_tokens,
    mark_whole,
    strings_of,
    unused_characters,
    user_parts,
)


def chat_messages(prompt, *, chat: bool, system: str | None) -> list[dict] | None:
    """The messages that a prompt stands for, or None where it is plain text."""
    if isinstance(prompt, str):
        if not chat:
            return None
        prompt = [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": system}, *prompt] if system is not None else list(prompt)


# Which template

# In the order in which transformers' processors take them.
_OF_PROCESSORS = ("processor_config.json", "chat_template.json")
_MORE = "additional_chat_templates"


def read_templates(files: SmallFiles, tokenizer_config: Mapping) -> dict[str, str]:
    """Name → source of every chat template in `files`, the usual one under "default".

    chat_template.jinja (with additional_chat_templates/*.jinja) goes before tokenizer_config.json,
    as in transformers, and this before what its processors read of multimodal models.
    Raises CheckpointError where one is not text.
    """
    found = {}
    if files.has("chat_template.jinja"):
        found["default"] = _read_text(files, "chat_template.jinja")
    for name in files.inside(_MORE):
        if name.endswith(".jinja"):
            found[name.removesuffix(".jinja")] = _read_text(files, f"{_MORE}/{name}")
    raw, where = tokenizer_config.get("chat_template"), "tokenizer_config.json"
    for other in _OF_PROCESSORS:
        if not found and raw is None and files.has(other):
            where, raw = other, files.json(other).get("chat_template")
    return found or _named_templates(raw, f"{files.where(where)}: chat_template")


def select_template(templates: Mapping[str, str], wanted: str | None, *, has_tools: bool) -> str:
    """The source of the template `wanted` (a name, or a source itself), or of the usual one.

    Raises UsageError where there is none of that name, or none at all.
    """
    if wanted is not None:
        if wanted in templates or "{" in wanted:
            return templates.get(wanted, wanted)
        raise UsageError(unknown_name("chat template", wanted, templates))
    if has_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if templates:
        found = f"this model has several chat templates, {', '.join(templates)}; "
        raise UsageError(
            f"{found}name one (chat_template)",
            command_line=f"{found}give a file with the one that is meant (--chat-template F)",
        )
    found = "this model has no chat template; use a plain prompt, or give a template "
    raise UsageError(
        f"{found}(chat_template)", command_line=f"{found}in a file (--chat-template F)"
    )


def _read_text(files, name):
    raw = files.read(name, limit=sandbox.MAX_TEMPLATE_BYTES)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{files.where(name)}: not UTF-8 (byte {error.start})") from None


def _named_templates(raw, where):
    """One template, a list of {"name", "template"}, or an object of templates by name."""
    if raw is None:
        return {}
    if isinstance(raw, str):
        return {"default": raw}
    try:
        by_name = isinstance(raw, Mapping)
        found = dict(raw) if by_name else {row["name"]: row["template"] for row in raw}
        "".join([*found, *found.values()])
    except (TypeError, KeyError):
        raise CheckpointError(
            f"{where}: found a {type(raw).__name__}, expected text or a list of name and template"
        ) from None
    return found


# Messages → text

# What some templates cannot do without.
_PLAIN_INPUTS = {
    "tools": [{"type": "function", "function": {"name": "x", "description": "x"}}],
    "documents": [{"title": "x", "text": "x"}],
}


def render_chat(
    template: str,
    messages: Sequence[Mapping],
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    tools: Sequence[Mapping] | None = None,
    documents: Sequence[Mapping] | None = None,
    tokens: Mapping[str, str] | None = None,
    special: Iterable[str] = (),
    added: Iterable[str] = (),
    options: Mapping | None = None,
    render: Callable | None = None,
    finds_generated: bool = False,
) -> Rendered:
    """The text of `messages`, and which of its control tokens the template wrote.

    `add_generation_prompt`: end with the beginning of an answer, which is usual.
    `continue_final_message`: end within the last message instead, after its content, or after what
    it has under another key. `tokens`: the tokenizer's named tokens (bos_token and so on). Control
    tokens are all `special` tokens, and those of the `added` tokens that stand in the template's
    source. `options`: further variables. `render`: in place of `sandbox.render`.
    `finds_generated`: find what stands in {% generation %}. Where a template looks into the
    content, marks can change its text; weaker marks are tried then, and without any that work, text
    that holds a special token is refused.
    Raises UsageError (messages, tools or variables that are none, or that the template refuses) or
    CheckpointError (a template that is damaged, forbidden things, or without end).
    """
    plain = plain_inputs(messages, tools=tools, documents=documents)
    options = plain_variables(options)
    end = OpenEnd.of(plain, continue_final_message, template)
    if add_generation_prompt and end is not None:
        raise UsageError(
            "continue_final_message: with add_generation_prompt a new message begins; give one of "
            "the two"
        )
    special = frozenset(special)
    control = special | {token for token in added if token in template and not token.isspace()}
    _refuse_control_tokens([*strings_of(options, keys=True), *keys_of(plain)], special)
    marks = unused_characters((template, plain, options))
    begins = end is None if add_generation_prompt is None else bool(add_generation_prompt)
    rest = {"add_generation_prompt": begins, **(tokens or {})}
    markings = _markings(marks, control, special)
    variants = [mapped(plain, mark) | rest | options for mark, _ in markings]
    variants = [plain | rest | options, *variants]
    if end is not None:
        variants = [end.tagged(variables) for variables in variants]
    render = render or sandbox.render
    text, marked, which = _rendered(render, template, variants, marks, usual=rest)
    generated = ()
    if finds_generated:
        found = render(template, variants[:1], marks, generation=True)[0]
        generated = generated_spans(found, text, marks)
    if end is not None:
        n = end.length(text)
        text = text[:n]
        marked = None if marked is None else without_marks_beyond(marked, n, marks)
    if marked is not None:
        known = markings[which][1]
        return Rendered(text, control_parts(user_parts(marked, marks), known), known, generated)
    _refuse_parts_of_control_tokens(plain, special)
    return Rendered(text, control_parts([(text, False)], control), control, generated)


def generated_spans(found: str, text: str, marks: str) -> tuple[tuple[int, int], ...]:
    """(begin, end) in `text` of what stands between marks in `found`, the same text with them.

    Raises UsageError where it is another text, or marks stand within marks.
    """
    order = "".join(character for character in found if character in marks)
    if found.translate(str.maketrans("", "", marks)) != text or order.replace(marks, ""):
        raise UsageError(
            "chat template: what it has in {% generation %} is changed or stands within another, "
            "so it cannot be told what the assistant says; give a template that does not"
        )
    spans, at = [], 0
    for piece, is_inside in user_parts(found, marks):
        if is_inside:
            spans.append((at, at + len(piece)))
        at += len(piece)
    return tuple(spans)


def _rendered(render, template, variants, marks, *, usual):
    """What the template gives. Where it fails, a plain chat tells whose fault that is."""
    try:
        return render(template, variants, marks)
    except sandbox.Failed as error:
        for more in ({}, _PLAIN_INPUTS):
            plain = plain_inputs([{"role": "user", "content": "x"}], **more)
            try:
                render(template, [plain | usual], marks)
            except (CheckpointError, UsageError):
                continue
            raise UsageError(
                f"{error}; it works with plain ones, so these messages, tools, documents or "
                "variables have not the form that it reads"
            ) from None
        raise


def _markings(marks, control, special):
    """(how a string is marked, the control tokens it tells apart), the strongest way first."""
    of_control, of_special = control_tokens(control), control_tokens(special)
    return (
        (lambda text: mark_whole(text, marks), control),
        (lambda text: mark_control_tokens(text, marks, of_control), control),
        (lambda text: mark_control_tokens(text, marks, of_special), special),
    )


def _refuse_control_tokens(names, special):
    """Keys and options carry no marks, so a token in them would count as the template's."""
    pattern = control_tokens(special).pattern
    for name in names:
        if pattern.search(name):
            raise UsageError(f"{name[:60]!r} holds a special token; only message text may")


def _refuse_parts_of_control_tokens(plain, special):
    tokens = control_tokens(special)
    for string in strings_of(plain):
        if tokens.found_in(string):
            raise UsageError(
                f"message text {string[:60]!r} holds (part of) a special token, and this template "
                "changes text so that it cannot be kept apart; take it out"
            )
