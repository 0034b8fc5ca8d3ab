"""The fields that every kind of completion has, as options of the engine.

Ranges are the engine's own; here are the wire's names, its limits of size, and what it leaves out.
"""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec

from jlayer.engine.options import SamplingOptions
from jlayer.errors import CheckpointError, UsageError
from jlayer.serving.wire.errors import Refused, invalid, refused
from jlayer.serving.wire.fields import check_count, check_finite, check_range
from jlayer.serving.wire.served import Served
from jlayer.strict import parse_json_object

MOST_TEXTS = 64  # n
MOST_STOPS = 64
MOST_STOP_LENGTH = 2000
MOST_BIASES = 4096
MOST_SCHEMA_BYTES = 256 << 10
FROM_CONTEXT = "the context"  # what set the most tokens where the client did not


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    jlayer_progress: bool | None = None


class Sampling(msgspec.Struct, kw_only=True):
    """null stands for the default, which the model's makers set."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    # What vLLM has beside OpenAI's.
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    guided_json: str | dict | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict | None = None
    response_format: dict | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def check(self) -> None:
        """What is wrong with the fields by themselves. Raises Refused."""
        check_range(self.n, "n", 1, MOST_TEXTS)
        check_range(self.max_tokens, "max_tokens", 0, (1 << 31) - 1)
        check_count(self.stops, "stop", MOST_STOPS)
        if any(len(stop) > MOST_STOP_LENGTH for stop in self.stops):
            raise invalid(f"stop: longer than {MOST_STOP_LENGTH} characters", param="stop")
        check_count(self.logit_bias, "logit_bias", MOST_BIASES)
        if any(map(math.isinf, (self.logit_bias or {}).values())):
            raise invalid("logit_bias: found an infinite number", param="logit_bias")
        check_count(self.stop_token_ids, "stop_token_ids", MOST_STOPS)
        if self.user is not None and len(self.user) > 1000:
            raise invalid("user: longer than 1000 characters", param="user")


_SAME = (
    *("temperature", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "typical_p", "epsilon_cutoff", "eta_cutoff"),
)


def options_of(
    form: Sampling,
    served: Served,
    *,
    logprobs: int | None = None,
    logprobs_param: str = "logprobs",
    prompt_logprobs: int | None = None,
) -> SamplingOptions:
    """The options of one text, before its length is known. Raises Refused."""
    given = {name: getattr(form, name) for name in _SAME}
    given = {name: value for name, value in given.items() if value is not None}
    if form.top_k is not None:
        given["top_k"] = 0 if form.top_k == -1 else form.top_k  # -1 is off in vLLM
    if form.stops:
        given["stop"] = form.stops
    if form.min_tokens is not None:
        given["min_new_tokens"] = form.min_tokens
    if logprobs is not None:
        given["logprobs"] = logprobs
    if prompt_logprobs is not None:
        given["prompt_logprobs"] = prompt_logprobs
    try:
        found = served.sampling(given)
        ends = () if form.ignore_eos else found.eos_token_id
        ends = (*ends, *(form.stop_token_ids or ()))
        if ends != found.eos_token_id:
            found = replace(found, eos_token_id=ends)
            found.check(served.vocab_size)
        return found
    except Exception as error:
        raise _named(refused(error), logprobs_param) from None


def _named(error: Refused, logprobs_param):
    if error.param == "logprobs":
        error.param = logprobs_param
    elif error.param == "eos_token_id":
        error.param = "stop_token_ids"
    return error


def with_length(
    options: SamplingOptions, served: Served, n_prompt: int, n_new: int | None, *, param: str
) -> SamplingOptions:
    """`options` with the most new tokens: the client's number, the makers', or what the context
    leaves, which is cut to what there is memory for."""
    room = served.check_length(n_prompt, n_new, param=param)
    if n_new is not None:
        return replace(options, max_new_tokens=n_new, max_length=None, length_from=None)
    if options.max_new_tokens is not None and options.length_from is not None:
        return replace(options, max_new_tokens=min(options.max_new_tokens, room), max_length=None)
    return replace(options, max_new_tokens=room, max_length=None, length_from=FROM_CONTEXT)


def with_texts(options: SamplingOptions, n: int) -> tuple[SamplingOptions, tuple[int, ...]]:
    """`options` for n texts of a prompt, and which of its sequences each of them is: greedy
    decoding gives one, which is told n times."""
    if options.is_greedy:
        return options, (0,) * n
    return replace(options, num_return_sequences=n), tuple(range(n))


# What a text has to be

_CONSTRAINTS = ("json", "json_object", "regex", "choice", "grammar")


def wanted_form(form: Sampling) -> tuple[str, object, str] | None:
    """(kind of constraint, what it is, the field that asks for it); None where any text will do.
    Raises Refused."""
    found = [
        (kind, value, f"guided_{kind}")
        for kind in ("json", "regex", "choice", "grammar")
        if (value := getattr(form, f"guided_{kind}")) is not None
    ]
    for kind, value in (form.structured_outputs or {}).items():
        if value is None or value is False:
            continue
        if kind not in _CONSTRAINTS:
            names = ", ".join(_CONSTRAINTS)
            raise invalid(
                f"structured_outputs: found {kind[:60]!r}, expected one of {names}",
                param="structured_outputs",
            )
        found.append((kind, value, f"structured_outputs.{kind}"))
    if form.response_format is not None:
        found += _response_format(form.response_format)
    if len(found) > 1:
        names = " and ".join(name for _, _, name in found)
        raise invalid(f"{names}: each says what the text has to be; keep one", param=found[1][2])
    if not found:
        return None
    ((kind, value, name),) = found
    check_finite(value, name, most_bytes=MOST_SCHEMA_BYTES)
    if kind == "json" and isinstance(value, str):
        value = _parsed(value, name)
    _check_kind(kind, value, name)
    return kind, value, name


def _response_format(value):
    kind = value.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [("json_object", True, "response_format")]
    if kind != "json_schema":
        raise invalid(
            f"response_format.type: found {kind!r:.60}, expected text, json_object or json_schema",
            param="response_format.type",
        )
    inner = value.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if schema is None:
        raise invalid(
            "response_format.json_schema.schema: missing; give the schema that the text has to "
            "follow",
            param="response_format.json_schema",
        )
    return [("json", schema, "response_format.json_schema.schema")]


def _parsed(text, name):
    try:
        return parse_json_object(text.encode(), what=name, advice="give a schema")
    except CheckpointError as error:
        raise invalid(str(error), param=name) from None


def _check_kind(kind, value, name):
    expected = {"json": dict, "choice": list, "json_object": bool}.get(kind, str)
    is_wrong = not isinstance(value, expected)
    if kind == "choice":
        is_wrong = is_wrong or not value or not all(isinstance(one, str) and one for one in value)
    if is_wrong:
        raise invalid(f"{name}: found a {type(value).__name__} that is no {kind}", param=name)


def constraint_of(wanted: tuple[str, object, str] | None, served: Served, eos_ids: tuple[int, ...]):
    """The constraint, None where any text will do. Raises Refused: a schema that cannot be held, or
    the package for it is not installed."""
    if wanted is None:
        return None
    kind, value, name = wanted
    from jlayer.text.constraint import Constraint  # llguidance is loaded at the first one

    make = {
        "json": Constraint.json_schema,
        "json_object": Constraint.json_object,
        "regex": Constraint.regex,
        "choice": Constraint.choice,
        "grammar": Constraint.lark,
    }[kind]
    given = () if kind == "json_object" else (value,)
    where = {} if kind in ("json_object", "grammar") else {"where": name}
    sizes = {"vocab_size": served.vocab_size, "eos_ids": eos_ids}
    try:
        return make(served.tokenizer(), *given, **where, **sizes)
    except UsageError as error:
        found = refused(error)
        found.param = found.param or name
        raise found from None
