"""Text → ids and back, with the tokenizer that was published with a model.

All forms become a tokenizer of the `tokenizers` library, whose own form is tokenizer.json. Ids are
those of the original encoders. What a chat template writes is left to `chat`, text that arrives
token by token to `stream`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.strict import read_json_object, read_small_file
from jlayer.text.bpe import build
from jlayer.text.chat import read_templates, render_chat, select_template
from jlayer.text.marks import Rendered
from jlayer.text.sentencepiece import from_sentencepiece
from jlayer.text.special_tokens import (
    RenamedTokenizer,
    add_tokens,
    configured_tokens,
    mark_special,
    named_tokens,
)
from jlayer.text.stream import TextStream
from jlayer.text.tiktoken import from_tiktoken
from jlayer.tokenizer_files import is_tiktoken

NO_TOKENIZER = "{folder}: no tokenizer.json or tokenizer.model; give token ids with --prompt-ids"


class Tokenizer:
    """A model's tokenizer.

    library: the tokenizer of the `tokenizers` library that does the work.
    bos_token_id, eos_token_id: None where there is none.
    special_tokens: text → id of all tokens that `skip_special_tokens` leaves out.
    """

    def __init__(self, library, *, config: Mapping, templates: Mapping[str, str], where: str):
        """`config`: tokenizer_config.json's; `where`: the file, for messages."""
        self.library = library
        self.where = where
        self.chat_templates = dict(templates)
        add_tokens(library, configured_tokens(config, where=where), where=where)
        self.named_tokens = named_tokens(config, where=where)
        mark_special(library, self.named_tokens.values())
        added = library.get_added_tokens_decoder()
        self.special_tokens = {str(t.content): i for i, t in added.items() if t.special}
        self._added_tokens = {str(t.content): i for i, t in added.items()}
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self._prefix, self._suffix = self._ends(config)
        self._renamed = {}  # control tokens → RenamedTokenizer

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> Tokenizer | None:
        """The tokenizer in `folder`, or None where there is none; NO_TOKENIZER is the message then.

        tokenizer.json if present, else tokenizer.model. Raises CheckpointError (a damaged file) or
        UnsupportedModelError (a kind of tokenizer.model that no Llama uses).
        """
        folder = Path(folder)
        config = _read_config(folder)
        if (folder / "tokenizer.json").exists():
            path = folder / "tokenizer.json"
            library = _from_json(read_small_file(path), str(path))
        elif (folder / "tokenizer.model").exists():
            path = folder / "tokenizer.model"
            library, defaults = _from_model_file(read_small_file(path), config, str(path))
            config = {**defaults, **config}
        else:
            return None
        templates = read_templates(folder, config)
        return cls(library, config=config, templates=templates, where=str(path))

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""
        return self.library.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens written in it are recognised, as in transformers.

        `add_special_tokens`: with BOS (and EOS) as the tokenizer was published.
        Raises UsageError where `text` is not valid Unicode.
        """
        _check_text(text)
        ids = self.library.encode(text, add_special_tokens=False).ids
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(
        self, ids: Iterable[int], *, skip_special_tokens: bool = True, continues: bool = False
    ) -> str:
        """The text of `ids`, with a replacement character where they end within a character.

        `continues`: other text stands before it, so a leading space stays. (SentencePiece adds a
        space before the first word of a text, and decoding removes it again.)
        """
        ids = _plain_ids(ids)
        if continues:
            stream = TextStream(self, skip_special_tokens=skip_special_tokens, continues=True)
            return "".join([*map(stream.step, ids), stream.finish()])
        return self.library.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Mapping], **options) -> str:
        """The text that `encode_chat` encodes, with the same arguments."""
        return self._rendered(messages, **options).text

    def encode_chat(self, messages: Sequence[Mapping], **options) -> list[int]:
        """Ids of `messages` in the model's chat format, with BOS only if the template writes it.

        `options`: add_generation_prompt (True), tools, documents, chat_template (a name or a
        source), and whatever else the template reads. Special tokens that the template writes are
        real; the same words in a message stay text. For messages without such words the ids are
        those of the rendered text.
        Raises UsageError (messages that the template refuses) or CheckpointError (a bad template).
        """
        rendered = self._rendered(messages, **options)
        if rendered.found_control() == rendered.written_control():
            return self.encode(rendered.text, add_special_tokens=False)
        return self.encode_parts(rendered)

    def encode_parts(self, rendered: Rendered) -> list[int]:
        """Ids of `rendered`, where control tokens are recognised only if the template wrote them.

        Raises UsageError where the tokenizer makes such a token of the user's text all the same.
        """
        _check_text(rendered.text)
        if rendered.control not in self._renamed:
            self._renamed[rendered.control] = RenamedTokenizer.of(self.library, rendered.control)
        ids = self._renamed[rendered.control].encode(rendered.parts)
        control_ids = {self._added_tokens[token] for token in rendered.control}
        expected = [self._added_tokens[text] for text in rendered.written_control()]
        if [token for token in ids if token in control_ids] != expected:
            raise UsageError(
                "messages hold the text of a special token, and this tokenizer makes that token of "
                "it even as plain text; take it out"
            )
        return ids

    def _rendered(
        self,
        messages,
        *,
        add_generation_prompt=True,
        tools=None,
        documents=None,
        chat_template=None,
        **variables,
    ):
        source = select_template(self.chat_templates, chat_template, has_tools=tools is not None)
        return render_chat(
            source,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            tokens=self.named_tokens,
            special=self.special_tokens,
            added=self._added_tokens,
            options=variables,
        )

    def _id_of(self, name):
        token = self.named_tokens.get(name)
        return None if token is None else self.library.token_to_id(token)

    def _ends(self, config):
        """Ids before and after a text: by add_bos_token where the config has it, else as built."""
        flags = [config.get(f"add_{name}_token") for name in ("bos", "eos")]
        if any(isinstance(flag, bool) for flag in flags):
            before = [self.bos_token_id] if flags[0] else []
            after = [self.eos_token_id] if flags[1] else []
            if None in before + after:
                raise CheckpointError(
                    f"{self.where}: add_bos_token or add_eos_token is set, but the token is unknown"
                )
            return before, after
        for probe in ("a", "1", "."):  # a vocabulary need not have all of them
            bare = self.library.encode(probe, add_special_tokens=False).ids
            full = self.library.encode(probe, add_special_tokens=True).ids
            for start in range(len(full) - len(bare) + 1 if bare else 0):
                if full[start : start + len(bare)] == bare:
                    return full[:start], full[start + len(bare) :]
        raise UnsupportedModelError(f"{self.where}: its post-processor rewrites text")


def _read_config(folder):
    """tokenizer_config.json over special_tokens_map.json; nulls count as absent."""
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            found = read_json_object(folder / name)
            config.update({key: value for key, value in found.items() if value is not None})
    return config


def _from_json(raw, where):
    from tokenizers import Tokenizer as Library

    library = build(lambda: Library.from_buffer(raw), where=where)
    # Some files keep the settings of training; a prompt is never cut or padded here.
    library.no_truncation()
    library.no_padding()
    return library


def _from_model_file(raw, config, where):
    if is_tiktoken(raw):
        return from_tiktoken(raw, configured_tokens(config, where=where), where=where)
    return from_sentencepiece(raw, where=where)


def _check_text(text):
    if not isinstance(text, str):
        raise UsageError(f"text: found a {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"text: not valid Unicode (a lone surrogate at character {error.start})"
        ) from None


def _plain_ids(ids):
    found = [int(token) for token in ids]
    for token in found:
        if not 0 <= token < 1 << 32:
            raise UsageError(f"token id {token}: expected an id of the vocabulary")
    return found
