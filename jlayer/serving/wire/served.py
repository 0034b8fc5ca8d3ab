"""What is served: the model as far as requests are about it, without its weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from jlayer.api import Model
from jlayer.engine.options import SamplingOptions
from jlayer.serving.wire.errors import Refused, invalid
from jlayer.serving.wire.logprobs import TokenTexts
from jlayer.text.tokenizer import Tokenizer

TEMPLATE = (
    "this model has no chat template, so messages cannot become a prompt; use /v1/completions with "
    "a plain prompt, or start the server with --chat-template FILE"
)


LONGEST_TOKEN = 256  # characters; the longest that published vocabularies have are of 128 spaces


@dataclass(frozen=True)
class Served:
    """`names`: under which clients may ask for it, the one that answers carry first. `sampling`:
    a client's options over those published with the model. `chat_template`: in place of the
    model's own. `adapters`: the names of those that clients may ask for in its place; `base`: of
    one of these, the name of the model."""

    names: tuple[str, ...]
    context: int
    vocab_size: int
    folder: str
    text: Tokenizer | None
    sampling: Callable[[dict], SamplingOptions]
    chat_template: str | None = None
    adapters: tuple[str, ...] = ()
    base: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    tokens: TokenTexts = field(init=False)
    _of_adapters: dict[str, Served] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "tokens", TokenTexts(self.text))
        object.__setattr__(self, "_of_adapters", dict(map(self._of_adapter, self.adapters)))

    def _of_adapter(self, name):
        own = partial(_sampled, self.sampling, name)
        how = {"names": (name,), "sampling": own, "adapters": (), "base": self.name}
        return name, replace(self, **how)

    @classmethod
    def of(cls, model: Model, *, names: tuple[str, ...], chat_template: str | None = None):
        return cls(
            names=names,
            context=model.context_limit,
            vocab_size=model.config.vocab_size,
            folder=model.folder,
            text=model.text,
            sampling=model.sampling_options,
            chat_template=chat_template,
            adapters=tuple(filter(None, model.engine.store.adapter_names)),
        )

    @property
    def name(self) -> str:
        return self.names[0]

    def asked_for(self, name: str | None) -> Served:
        """What a request of this name is about: the model, or the model with an adapter. Raises
        Refused where another model is meant."""
        if not name or name in self.names:
            return self
        if name in self._of_adapters:
            return self._of_adapters[name]
        known = ", ".join(map(repr, (self.name, *self.adapters)))
        raise Refused(
            404,
            f"model: {name[:200]!r} is not served here; this server has {known}",
            param="model",
            code="model_not_found",
        )

    def tokenizer(self) -> Tokenizer:
        if self.text is None:
            raise invalid(
                "this model has no tokenizer; give token ids, as the prompt of /v1/completions or "
                "the input of /v1/embeddings",
                param="prompt",
            )
        return self.text

    def encoded_chat(self, messages: list[dict], *, param: str = "messages", **template):
        """Ids of messages in the model's chat format. Raises Refused and UsageError."""
        tokenizer = self.tokenizer()
        if self.chat_template is None and not tokenizer.chat_templates:
            raise invalid(TEMPLATE, param=param, code="no_chat_template")
        if self.chat_template is not None:
            template["chat_template"] = self.chat_template
        return tokenizer.encode_chat(messages, **template)

    def template_source(self, *, has_tools: bool) -> str:
        """The template that would be taken, for a look at what it reads."""
        if self.chat_template is not None:
            return self.chat_template
        known = {} if self.text is None else self.text.chat_templates
        wanted = "tool_use" if has_tools and "tool_use" in known else "default"
        return known.get(wanted, "")

    def check_text(self, n_characters: int, *, param: str) -> None:
        """Raises Refused where a text is beyond the context whatever its tokens are: to count them
        may take a processor half a minute."""
        least = n_characters // LONGEST_TOKEN
        if least > self.context:
            raise self._beyond(f"your request has at least {least} prompt tokens", param)

    def check_length(self, n_prompt: int, n_new: int | None, *, param: str) -> int:
        """How many tokens may follow at most. Raises Refused where the prompt, or what was asked
        for after it, is beyond the context."""
        room = self.context - n_prompt
        if room < (n_new or 0) or (room <= 0 and n_new is None):
            asked = f"your request has {n_prompt} prompt tokens"
            if n_new:
                asked = f"you requested {n_prompt + n_new} tokens ({n_prompt} in the prompt, "
                asked += f"{n_new} in the completion)"
            raise self._beyond(asked, param)
        return room if n_new is None else n_new

    def _beyond(self, asked, param):
        return invalid(
            f"This model's maximum context length is {self.context} tokens. However, {asked}. "
            "Please reduce the length of the prompt or the completion.",
            param=param,
            code="context_length_exceeded",
        )


def _sampled(sampling, adapter, options):
    return sampling({**options, "adapter": adapter})
