"""/tokenize, /detokenize and /tokenizer_info in vLLM's forms, and the list of models."""

from __future__ import annotations

from jlayer.serving.wire.conversation import Chat, chat_ids
from jlayer.serving.wire.errors import Refused, invalid
from jlayer.serving.wire.fields import is_ids, read_form
from jlayer.serving.wire.served import Served


class Tokenize(Chat, kw_only=True):
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class Detokenize(Chat, kw_only=True):
    tokens: list[int] | None = None


def tokenize(body: dict, served: Served) -> dict:
    form = read_form(body, Tokenize)
    served = served.asked_for(form.model)
    if (form.prompt is None) == (form.messages is None):
        raise invalid("prompt: give a prompt or messages, and not both", param="prompt")
    if form.messages is not None:
        ids = chat_ids(form, served, tools=form.tools)
    else:
        adds = form.add_special_tokens is not False
        ids = served.tokenizer().encode(form.prompt, add_special_tokens=adds)
    texts = [served.tokens.text_of(token) for token in ids] if form.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": served.context,
        "tokens": ids,
        "token_strs": texts,
    }


def detokenize(body: dict, served: Served) -> dict:
    form = read_form(body, Detokenize)
    served = served.asked_for(form.model)
    if form.tokens is None or not is_ids(form.tokens):
        raise invalid("tokens: none given; expected a list of ids", param="tokens")
    wrong = next((token for token in form.tokens if not 0 <= token < served.vocab_size), None)
    if wrong is not None:
        raise invalid(
            f"tokens: id {wrong} is outside the vocabulary of {served.vocab_size}", param="tokens"
        )
    return {"prompt": served.tokenizer().decode(form.tokens, skip_special_tokens=False)}


def tokenizer_info(served: Served) -> dict:
    tokenizer = served.tokenizer()
    named = {name: tokenizer.named_tokens.get(name) for name in ("bos_token", "eos_token")}
    template = served.chat_template or tokenizer.chat_templates.get("default")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "pad_token": tokenizer.named_tokens.get("pad_token"),
        "unk_token": tokenizer.named_tokens.get("unk_token"),
        "chat_template": template,
        "model_max_length": served.context,
        "vocab_size": tokenizer.vocab_size,
    }


def model_list(served: Served) -> dict:
    each = [served, *map(served.asked_for, served.adapters)]
    return {"object": "list", "data": [_model(one, one.name) for one in each]}


def one_model(served: Served, name: str) -> dict:
    """Raises Refused where another one is served."""
    if not name:
        raise Refused(404, "model: none named", param="model", code="model_not_found")
    return _model(served.asked_for(name), name)


def _model(served, name):
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "jlayer",
        "root": served.base or served.name,
        "parent": served.base,
        "max_model_len": served.context,
    }
