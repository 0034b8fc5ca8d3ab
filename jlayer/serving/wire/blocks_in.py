"""Requests of /v1/messages → conversations: blocks become messages, tools and choices OpenAI's."""

from __future__ import annotations

import json

import msgspec

from jlayer.serving.wire.conversation import Chat
from jlayer.serving.wire.errors import invalid
from jlayer.serving.wire.fields import check_count, check_range, refuse_given
from jlayer.serving.wire.messages_in import MOST_MESSAGES
from jlayer.serving.wire.sampling import StreamOptions

UNSUPPORTED = {
    "mcp_servers": "give tools",
    "container": "leave it out",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Messages(msgspec.Struct, kw_only=True):
    """The fields of /v1/messages. null stands for the default."""

    model: str | None = None
    max_tokens: int | None = None
    messages: list[dict] | None = None
    system: str | list[dict] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: dict | None = None
    tools: list[dict] | None = None
    tool_choice: dict | None = None
    thinking: dict | None = None
    stream_options: StreamOptions | None = None  # ours, for progress


def as_chat(body: dict, form: Messages) -> Chat:
    """The same in OpenAI's form. Raises Refused."""
    refuse_given(body, UNSUPPORTED)
    check_range(form.max_tokens, "max_tokens", 1, (1 << 31) - 1)
    if not form.messages:
        raise invalid("messages: none given, expected a non-empty list", param="messages")
    check_count(form.messages, "messages", MOST_MESSAGES)
    found = _system(form.system)
    for at, message in enumerate(form.messages):
        found += _message(message, f"messages[{at}]")
    choice, is_parallel = _choice(form.tool_choice)
    goes_on = found[-1]["role"] == "assistant" and "tool_calls" not in found[-1]
    variables = None
    if form.thinking is not None:
        variables = {"enable_thinking": form.thinking.get("type") != "disabled"}
    user = (form.metadata or {}).get("user_id")
    return Chat(
        model=form.model,
        messages=found,
        temperature=form.temperature,
        top_p=form.top_p,
        top_k=form.top_k,
        stop=form.stop_sequences,
        stream=form.stream,
        stream_options=form.stream_options,
        user=user if isinstance(user, str) else None,
        tools=_tools(form.tools),
        tool_choice=choice,
        parallel_tool_calls=is_parallel,
        chat_template_kwargs=variables,
        continue_final_message=True if goes_on else None,
    )


def _system(system):
    text = "" if system is None else _text(system, "system")
    return [{"role": "system", "content": text}] if text else []


def _message(message, where):
    """The messages that one is: results of tools are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise invalid(
            f"{where}.role: found {role!r:.60}, expected user or assistant", param=f"{where}.role"
        )
    where = f"{where}.content"
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = _blocks(content, where)
    if role == "assistant":
        return [_assistant(blocks, where)]
    results = [
        _result(block, f"{where}[{at}]")
        for at, block in enumerate(blocks)
        if block.get("type") == "tool_result"
    ]
    rest = [block for block in blocks if block.get("type") != "tool_result"]
    said = [{"role": role, "content": _text(rest, where)}] if rest or not results else []
    return results + said


def _blocks(content, where):
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise invalid(f"{where}: expected text or a list of blocks", param=where)
    return content


def _assistant(blocks, where):
    said, thought, calls = [], [], []
    for at, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "tool_use":
            calls.append(_use(block, f"{where}[{at}]"))
        elif kind == "thinking":
            thought.append(_string(block, "thinking", f"{where}[{at}]"))
        elif kind != "redacted_thinking":
            said.append(_text([block], f"{where}", first=at))
    found = {"role": "assistant", "content": "".join(said)}
    if thought:
        found["reasoning_content"] = "".join(thought)
    if calls:
        found["tool_calls"] = calls
    return found


def _use(block, where):
    name, call_id = _string(block, "name", where), _string(block, "id", where)
    given = block.get("input")
    if not isinstance(given, dict):
        raise invalid(f"{where}.input: expected an object", param=f"{where}.input")
    function = {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}
    return {"id": call_id, "type": "function", "function": function}


def _result(block, where):
    content = block.get("content")
    text = "" if content is None else _text(content, f"{where}.content")
    call_id = _string(block, "tool_use_id", where)
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def _text(content, where, *, first=0):
    if isinstance(content, str):
        return content
    parts = []
    for at, block in enumerate(_blocks(content, where), first):
        if block.get("type") != "text":
            raise invalid(
                f"{where}[{at}]: found a block of type {block.get('type')!r:.60}; this model reads "
                "text only",
                param=f"{where}[{at}]",
                code="unsupported_content",
            )
        parts.append(_string(block, "text", f"{where}[{at}]"))
    return "\n".join(parts)


def _string(block, name, where):
    found = block.get(name)
    if not isinstance(found, str):
        raise invalid(
            f"{where}.{name}: found a {type(found).__name__}, expected text",
            param=f"{where}.{name}",
        )
    return found


def _tools(tools):
    return None if tools is None else [_tool(t, f"tools[{at}]") for at, t in enumerate(tools)]


def _tool(tool, where):
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise invalid(
            f"{where}.type: {kind!r:.60} runs at a provider's; here only tools of the client's are "
            "called",
            param=f"{where}.type",
            code="unsupported_parameter",
        )
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _choice(choice):
    """(OpenAI's tool_choice, whether several calls may come at a time)"""
    if choice is None:
        return None, None
    kind = choice.get("type")
    is_parallel = False if choice.get("disable_parallel_tool_use") is True else None
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}, is_parallel
    if kind not in _CHOICES:
        raise invalid(
            f"tool_choice.type: found {kind!r:.60}, expected auto, any, tool or none",
            param="tool_choice.type",
        )
    return _CHOICES[kind], is_parallel
