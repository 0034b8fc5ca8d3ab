"""Text → ids and back, with the tokenizer that was published with a model.

All forms become a tokenizer of the `tokenizers` library, whose own form is tokenizer.json. Ids are
those of the original encoders. What a chat template writes is left to `chat`, text that arrives
token by token to `stream`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from jlayer.errors import UsageError
from jlayer.small_files import files_of
from jlayer.text.bpe import build, ids_of, spelled
from jlayer.text.chat import read_templates, render_chat, select_template
from jlayer.text.classes import SPACE
from jlayer.text.declared import read_declared
from jlayer.text.decoders import cleaned_up
from jlayer.text.load import Loaded, load
from jlayer.text.marks import Rendered
from jlayer.text.special_tokens import RenamedTokenizer
from jlayer.text.stream import TextStream

NO_TOKENIZER = "{folder}: no tokenizer.json or tokenizer.model; give token ids with --prompt-ids"


class Tokenizer:
    """A model's tokenizer.

    library: the tokenizer of the `tokenizers` library that does the work.
    bos_token_id, eos_token_id: None where there is none.
    cleans_up: no space stands before punctuation in decoded text.
    special_tokens: text → id of all tokens that `skip_special_tokens` leaves out.
    """

    def __init__(self, loaded: Loaded, templates: Mapping[str, str]):
        self.library = library = loaded.library
        self.where = loaded.where
        self.chat_templates = dict(templates)
        self.named_tokens = loaded.named
        self.cleans_up = loaded.cleans_up
        self._doubles_first_space = loaded.doubles_first_space
        added = library.get_added_tokens_decoder()
        self.special_tokens = {
            str(t.content): i for i, t in added.items() if t.special or _is_left_out(library, i)
        }
        self._added_tokens = {str(t.content): i for i, t in added.items()}
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self._renamed = {}  # control tokens → RenamedTokenizer

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> Tokenizer | None:
        """The tokenizer in `folder`, or in a GGUF file; None where there is none: NO_TOKENIZER is
        the message then.

        tokenizer.json if present, else tokenizer.model. Raises CheckpointError (a damaged file) or
        UnsupportedModelError (a kind of tokenizer.model that no Llama uses).
        """
        files = files_of(folder)
        declared = read_declared(files)
        loaded = load(files, declared)
        if loaded is None:
            return None
        return cls(loaded, read_templates(files, declared.settings))

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""
        return self.library.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens written in it are recognised, as in transformers.

        `add_special_tokens`: with BOS (and EOS) as the tokenizer was published.
        Raises UsageError where `text` is not valid Unicode, CheckpointError where the tokenizer
        has no token for a part of it, not even one for unknown text.
        """
        _check_text(text)
        text = self._with_first_space(text)
        # The library fails here where its unknown token is not in the vocabulary.
        encode = partial(ids_of, self.library, text, add_special_tokens=add_special_tokens)
        return build(encode, where=self.where)

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
        text = self.library.decode(ids, skip_special_tokens=skip_special_tokens)
        return cleaned_up(text) if self.cleans_up else text

    def render_chat(self, messages: Sequence[Mapping], **options) -> str:
        """The text that `encode_chat` encodes, with the same arguments."""
        return self.rendered_chat(messages, **options).text

    def encode_chat(self, messages: Sequence[Mapping], **options) -> list[int]:
        """Ids of `messages` in the model's chat format, with BOS only if the template writes it.

        `options`: add_generation_prompt (True), continue_final_message (False), tools, documents,
        chat_template (a name or a source), and whatever else the template reads. Special tokens
        that the template writes are real; the same words in a message stay text. For messages
        without such words the ids are those of the rendered text.
        Raises UsageError (messages that the template refuses) or CheckpointError (a bad template).
        """
        rendered = self.rendered_chat(messages, **options)
        if rendered.found_control() == rendered.written_control():
            return self.encode(rendered.text, add_special_tokens=False)
        return self.encode_parts(rendered)

    def spell(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode`, and of each the (begin, end) of its characters in `text`; (0, 0) for
        BOS and EOS that are added. Raises what `encode` does."""
        _check_text(text)
        shift = len(self._with_first_space(text)) - len(text)
        text = self._with_first_space(text)
        spell = partial(spelled, self.library, text, add_special_tokens=add_special_tokens)
        ids, spans = build(spell, where=self.where)
        return ids, _shifted(spans, shift)

    def spell_chat(self, rendered: Rendered) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode_chat`, of what `rendered_chat` gave, and of each the (begin, end) of
        its characters in the text. Raises what `encode_parts` does."""
        if rendered.found_control() == rendered.written_control():
            return self.spell(rendered.text, add_special_tokens=False)
        ids, spans = self._by_parts(rendered, RenamedTokenizer.spell)
        self._check_control(ids, rendered)
        shift = len(self._with_first_space(rendered.text)) - len(rendered.text)
        return ids, _shifted(spans, shift)

    def encode_parts(self, rendered: Rendered) -> list[int]:
        """Ids of `rendered`, where control tokens are recognised only if the template wrote them.

        Raises UsageError where the tokenizer makes such a token of the user's text all the same.
        """
        ids = self._by_parts(rendered, RenamedTokenizer.encode)
        self._check_control(ids, rendered)
        return ids

    def _by_parts(self, rendered, encode):
        _check_text(rendered.text)
        if rendered.control not in self._renamed:
            self._renamed[rendered.control] = RenamedTokenizer.of(self.library, rendered.control)
        parts = rendered.parts
        if self._with_first_space(rendered.text) != rendered.text:
            parts = ((" ", False), *parts)
        return encode(self._renamed[rendered.control], parts)

    def _check_control(self, ids, rendered):
        control_ids = {self._added_tokens[token] for token in rendered.control}
        expected = [self._added_tokens[text] for text in rendered.written_control()]
        if [token for token in ids if token in control_ids] != expected:
            raise UsageError(
                "messages hold the text of a special token, and this tokenizer makes that token of "
                "it even as plain text; take it out"
            )

    def rendered_chat(
        self,
        messages: Sequence[Mapping],
        *,
        render: Callable | None = None,
        finds_generated: bool = False,
        add_generation_prompt=None,
        continue_final_message=False,
        tools=None,
        documents=None,
        chat_template=None,
        **variables,
    ) -> Rendered:
        """What `encode_chat` encodes, with the same arguments. `render`, `finds_generated`: see
        `chat.render_chat`."""
        source = select_template(self.chat_templates, chat_template, has_tools=tools is not None)
        return render_chat(
            source,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            tokens=self.named_tokens,
            special=self.special_tokens,
            added=self._added_tokens,
            options=variables,
            render=render,
            finds_generated=finds_generated,
        )

    def _with_first_space(self, text):
        """`text` so that the space which SentencePiece puts before it is there."""
        return " " + text if self._doubles_first_space and text[:1] in (" ", SPACE) else text

    def _id_of(self, name):
        token = self.named_tokens.get(name)
        return None if token is None else self.library.token_to_id(token)


def _is_left_out(library, token_id):
    """Whether decoding leaves a token out although it is not marked as special: so it is where one
    file says that it is special, and another that it is not."""
    shown, hidden = (library.decode([token_id], skip_special_tokens=skip) for skip in (False, True))
    return bool(shown) and not hidden


def _shifted(spans, n):
    """Spans of a text with `n` characters put before it, in the text: what stands for those alone
    is of its first character. (0, 0), of what is no text's, stays."""
    if not n:
        return spans
    return [(max(begin - n, 0), max(end - n, 1) if end else 0) for begin, end in spans]


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
