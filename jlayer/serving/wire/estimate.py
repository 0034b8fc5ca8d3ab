"""/v1/estimate: what a request would take, asked with its own body, or with numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from jlayer.serving.wire.chat import read_chat
from jlayer.serving.wire.completions import read_completion
from jlayer.serving.wire.errors import invalid
from jlayer.serving.wire.fields import check_range, read_form
from jlayer.serving.wire.served import Served


class Numbers(msgspec.Struct):
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    n: int | None = None


def estimated_of(body: dict, served: Served, estimate: Callable) -> dict:
    """`estimate`: the desk's. Of several prompts, each is told. Raises Refused."""
    if body.get("messages") is not None or body.get("prompt") is not None:
        read = read_chat if body.get("messages") is not None else read_completion
        asked = read(body, served)
        found = [
            estimate(
                len(order.ids),
                order.options.new_tokens_limit(len(order.ids), context=served.context),
                order.options.n_lanes,
            ).as_dict()
            for order in asked.orders
        ]
        return found[0] if len(found) == 1 else {**found[-1], "prompts": found}
    form = read_form(body, Numbers)
    if form.prompt_tokens is None:
        raise invalid(
            "prompt_tokens: none given; give messages, a prompt, or numbers of tokens",
            param="prompt_tokens",
        )
    check_range(form.prompt_tokens, "prompt_tokens", 1, served.context)
    check_range(form.n, "n", 1, 64)
    n_new = form.max_tokens
    check_range(n_new, "max_tokens", 0, served.context)
    n_new = served.check_length(form.prompt_tokens, n_new, param="prompt_tokens")
    return estimate(form.prompt_tokens, n_new, 1 if form.n is None else form.n).as_dict()
