"""Text ↔ ids: the published tokenizer, whichever file it comes in, chats, and text as it arrives.

Everything runs on the `tokenizers` library: tokenizer.json is its own form, and tokenizer.model,
SentencePiece's or tiktoken's, is turned into the same (ids equal to the original encoders'). How a
chat becomes text is `templates`' matter; which id comes next is `sample`'s.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import os
import re
import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.protobuf import protobuf_fields
from jlayer.strict import read_json_object, read_small_file
from jlayer.text.sandbox import Rendered, read_templates, render_chat, select_template

NO_TOKENIZER = "{folder}: no tokenizer.json or tokenizer.model; give token ids with --prompt-ids"
_NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Tokenizer:
    """A model's tokenizer.

    bos_token_id, eos_token_id: None where there is none. vocab_size: ids, added tokens included.
    special_tokens: text → id of all that `skip_special_tokens` leaves out.
    """

    def __init__(self, tokenizer, *, config: Mapping, templates: Mapping[str, str], where: str):
        """`tokenizer`: of the `tokenizers` library; `config`: tokenizer_config.json's."""
        self._tokenizer = tokenizer
        self.where = where
        self.chat_templates = dict(templates)
        _add_configured_tokens(tokenizer, config, where)
        self.named_tokens = _named_tokens(config, where)
        _mark_special(tokenizer, self.named_tokens.values())
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {str(t.content): i for i, t in added.items() if t.special}
        self._added_tokens = {str(t.content): i for i, t in added.items()}
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self._prefix, self._suffix = self._ends(config)
        self._plain_encoders = {}

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> Tokenizer | None:
        """The tokenizer in `folder`, or None where there is none (NO_TOKENIZER is the line then).

        tokenizer.json if present, else tokenizer.model. Raises CheckpointError (damaged) or
        UnsupportedModelError (a kind of tokenizer.model that no Llama uses).
        """
        folder = Path(folder)
        config = _read_config(folder)
        if (folder / "tokenizer.json").exists():
            path = folder / "tokenizer.json"
            tokenizer = _from_json(read_small_file(path), str(path))
        elif (folder / "tokenizer.model").exists():
            path = folder / "tokenizer.model"
            raw = read_small_file(path)
            if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\s", raw):
                tokenizer, defaults = _from_tiktoken(raw, config, str(path))
            else:
                tokenizer, defaults = _from_sentencepiece(raw, str(path))
            config = {**defaults, **{k: v for k, v in config.items() if v is not None}}
        else:
            return None
        templates = read_templates(folder, config)
        return cls(tokenizer, config=config, templates=templates, where=str(path))

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; special tokens written in it are recognised, as in transformers.

        `add_special_tokens`: with BOS (and EOS) as the tokenizer was published.
        Raises UsageError where `text` is not valid Unicode.
        """
        _check_text(text)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(
        self, ids: Iterable[int], *, skip_special_tokens: bool = True, continues: bool = False
    ) -> str:
        """The text of `ids`. `continues`: text goes before it, so that a leading space is a space.

        (SentencePiece writes one before the first word of any text, and takes it away in decoding.)
        Where ids are cut within a character, there is a replacement character for it.
        """
        ids = _plain_ids(ids)
        if continues:
            stream = TextStream(self, skip_special_tokens=skip_special_tokens, continues=True)
            return "".join([*map(stream.step, ids), stream.finish()])
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Mapping], **options) -> str:
        """The text that `encode_chat` encodes, with the same arguments."""
        return self._rendered(messages, **options).text

    def encode_chat(self, messages: Sequence[Mapping], **options) -> list[int]:
        """Ids of `messages` in the model's chat format, BOS as the template has it.

        `options`: add_generation_prompt (True), tools, documents, chat_template (a name or a
        source), and whatever else the template reads. Special tokens that the template writes are
        real; the same words in a message stay text. For messages without such words the ids are
        those of the rendered text.
        Raises UsageError (messages that the template refuses) or CheckpointError (a bad template).
        """
        rendered = self._rendered(messages, **options)
        found = _control_tokens_in(rendered.text, rendered.control)
        if found == [text for text, is_control in rendered.parts if is_control]:
            return self.encode(rendered.text, add_special_tokens=False)
        return self._encode_parts(rendered)

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

    def _encode_parts(self, rendered: Rendered) -> list[int]:
        """Ids where `rendered.control` tokens are recognised in the template's own writing only.

        A twin of the tokenizer knows these tokens under names that nobody can guess, and the
        template's are written under those names: so one call does all that the tokenizer does
        around tokens and seams, and what a user writes has no special meaning.
        """
        twin, names, real_ids = self._twin(rendered.control)
        text = "".join(names[text] if is_control else text for text, is_control in rendered.parts)
        _check_text(text)
        encoded = twin.encode(text, add_special_tokens=False).ids
        ids = [real_ids.get(token, token) for token in encoded]
        control_ids = {self._added_tokens[token] for token in rendered.control}
        expected = [self._added_tokens[text] for text, is_control in rendered.parts if is_control]
        if [token for token in ids if token in control_ids] != expected:
            raise UsageError(
                "messages hold the text of a special token, and this tokenizer makes that token of "
                "it even as plain text; take it out"
            )
        return ids

    def _twin(self, control):
        if control not in self._plain_encoders:
            self._plain_encoders[control] = _make_twin(self._tokenizer, control)
        return self._plain_encoders[control]

    def _id_of(self, name):
        token = self.named_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _ends(self, config):
        """Ids before and after a text: by add_bos_token where the config has it, else as built."""
        if isinstance(config.get("add_bos_token"), bool) or isinstance(
            config.get("add_eos_token"), bool
        ):
            before = [self.bos_token_id] if config.get("add_bos_token") else []
            after = [self.eos_token_id] if config.get("add_eos_token") else []
            if None in before + after:
                raise CheckpointError(
                    f"{self.where}: add_bos_token or add_eos_token is set, but the token is unknown"
                )
            return before, after
        for probe in ("a", "1", "."):  # a vocabulary need not have all of them
            bare = self._tokenizer.encode(probe, add_special_tokens=False).ids
            full = self._tokenizer.encode(probe, add_special_tokens=True).ids
            for start in range(len(full) - len(bare) + 1 if bare else 0):
                if full[start : start + len(bare)] == bare:
                    return full[:start], full[start + len(bare) :]
        raise UnsupportedModelError(f"{self.where}: its post-processor rewrites text")

    @cached_property
    def _assembly(self):
        """How tokens become text, (kind, leading spaces that go): what `TextStream` follows."""
        decoder = self._tokenizer.decoder
        return _read_decoder(None if decoder is None else json.loads(decoder.__getstate__()))

    @cached_property
    def _special_ids(self):
        return frozenset(self.special_tokens.values())


def chat_messages(prompt, *, chat: bool, system: str | None) -> list[dict] | None:
    """The messages that a prompt stands for, or None where it is plain text."""
    if isinstance(prompt, str):
        if not chat:
            return None
        prompt = [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": system}, *prompt] if system is not None else list(prompt)


class TextStream:
    """Text as its tokens arrive: the pieces of `step`, then `finish`, add up to `decode`, exactly.

    A piece holds whole characters only. A step costs the same however long the text is. What cannot
    be known yet is held back: bytes of an unfinished character, and with byte fallback (Llama 2)
    the whole run of byte tokens, for a later byte can make replacement characters of all of it. Of
    a decoder that is neither, everything is held back until `finish`.
    `continues` as in `decode`.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continues: bool = False
    ):
        kind, spaces = tokenizer._assembly
        self._token = tokenizer._tokenizer.id_to_token
        self._skipped = tokenizer._special_ids if skip_special_tokens else frozenset()
        self._text = {
            "bytes": lambda: _ByteLevelText(),
            "fallback": lambda: _FallbackText(0 if continues else spaces),
            "other": lambda: _HeldText(tokenizer._tokenizer.decode),
        }[kind]()

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none."""
        token = None if token_id in self._skipped else self._token(int(token_id))
        return "" if token is None else self._text.push(token, token_id)

    def finish(self) -> str:
        """What was held back."""
        return self._text.finish()


class StopWatcher:
    """Cuts text at the first of `stops` to be complete, wherever its pieces are divided.

    Held back is only what could yet become a stop string. `stopped`: the stop string found, or
    None; of several that are complete at one character, the longest.
    """

    def __init__(self, stops: Iterable[str]):
        self.stops = tuple(stops)
        self.stopped = None
        self._held = ""
        self._falls = [_borders(stop) for stop in self.stops]
        self._matched = [0] * len(self.stops)

    def feed(self, text: str) -> str:
        """What of the text so far is now certain to stand before any stop string."""
        if self.stopped is not None:
            return ""
        self._held += text
        for index in range(len(self._held) - len(text), len(self._held)):
            found = self._advance(self._held[index])
            if found is not None:
                self.stopped = found
                certain = self._held[: index + 1 - len(found)]
                self._held = ""
                return certain
        keep = max(self._matched, default=0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character):
        """One character through every stop's matcher (Knuth, Morris and Pratt)."""
        found = None
        for which, (stop, falls) in enumerate(zip(self.stops, self._falls, strict=True)):
            n = self._matched[which]
            while n and stop[n] != character:
                n = falls[n - 1]
            n += stop[n] == character
            self._matched[which] = n
            if n == len(stop):
                found = max(found or "", stop, key=len)
        return found


def _borders(text):
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders, n = [0], 0
    for character in text[1:]:
        while n and text[n] != character:
            n = borders[n - 1]
        n += text[n] == character
        borders.append(n)
    return borders


# How tokens become text


def _read_decoder(spec):
    """("bytes" | "fallback" | "other", leading spaces that are taken away)."""
    steps = _flat_steps(spec)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "bytes", 0
    is_fallback = kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and (
        steps[0].get("pattern") == {"String": "▁"} and steps[0].get("content") == " "
    )
    if is_fallback and kinds[3:] == []:
        return "fallback", 0
    if is_fallback and kinds[3:] == ["Strip"]:
        strip = steps[3]
        if strip.get("content") == " " and strip.get("stop") == 0:
            return "fallback", strip.get("start")
    return "other", 0


def _flat_steps(spec):
    if spec is None:
        return []
    if spec.get("type") == "Sequence":
        return [flat for step in spec["decoders"] for flat in _flat_steps(step)]
    return [spec]


class _ByteLevelText:
    """Byte-level BPE: each character of a token stands for a byte; the bytes are UTF-8."""

    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token, token_id):
        del token_id
        try:
            raw = bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:  # an added token with other characters: its own bytes
            raw = token.encode()
        return self._utf8.decode(raw)

    def finish(self):
        return self._utf8.decode(b"", final=True)


class _FallbackText:
    """SentencePiece's pieces: ▁ is a space, <0xE2> a byte, and a run of bytes UTF-8 or no text.

    A run that is not valid gives one replacement character a byte, as `tokenizers` has it
    (SentencePiece itself keeps what is valid in it).
    """

    def __init__(self, spaces):
        self._spaces = spaces
        self._run = bytearray()

    def push(self, token, token_id):
        del token_id
        if _BYTE_PIECE.fullmatch(token):
            self._run.append(int(token[3:5], 16))
            return ""
        return self._strip(self._take_run() + token.replace("▁", " "))

    def finish(self):
        return self._strip(self._take_run())

    def _take_run(self):
        raw, self._run = bytes(self._run), bytearray()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(raw)

    def _strip(self, text):
        while self._spaces and text:
            if text[0] != " ":
                self._spaces = 0
                break
            text, self._spaces = text[1:], self._spaces - 1
        return text


class _HeldText:
    """Any other decoder: nothing is certain before the end."""

    def __init__(self, decode):
        self._decode = decode
        self._ids = []

    def push(self, token, token_id):
        del token
        self._ids.append(int(token_id))
        return ""

    def finish(self):
        ids, self._ids = self._ids, []
        return self._decode(ids, skip_special_tokens=False)


_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")


def _byte_characters():
    """Byte → the character that stands for it in byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + n) for n, byte in enumerate(others)})
    return table


_CHARACTER_OF = _byte_characters()
_BYTE_OF = {character: byte for byte, character in _CHARACTER_OF.items()}


# Special tokens


def _make_twin(tokenizer, control):
    """(twin, {token: its secret name}, {twin's id: real id}); it shares the model's tables."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    twin = Library(tokenizer.model)
    if tokenizer.normalizer is not None:
        twin.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        twin.pre_tokenizer = tokenizer.pre_tokenizer
    secret = secrets.token_hex(16)
    names, real_ids = {}, {}
    for real_id, token in tokenizer.get_added_tokens_decoder().items():
        text = name = str(token.content)
        if text in control:
            names[text] = name = f"<{secret}-{real_id}>"
        flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "normalized")}
        # A name of ours is never part of a word, so what stands around it does not matter.
        single_word = token.single_word and name == text
        twin.add_tokens([AddedToken(name, special=False, single_word=single_word, **flags)])
        real_ids[twin.token_to_id(name)] = real_id
    return twin, names, real_ids


def _control_tokens_in(text, control):
    longest_first = sorted(control, key=len, reverse=True)
    return re.findall("|".join(map(re.escape, longest_first)) or "(?!)", text)


def _named_tokens(config, where):
    """bos_token and so on, as text, where the config has them."""
    found = {}
    for name in _NAMED_TOKENS:
        value = config.get(f"{name}_token")
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise CheckpointError(f"{where}: {name}_token is {value!r}, expected text")
        found[f"{name}_token"] = value
    return found


def _add_configured_tokens(tokenizer, config, where):
    """added_tokens_decoder of tokenizer_config.json, where it knows more than tokenizer.json."""
    from tokenizers import AddedToken

    rows = config.get("added_tokens_decoder") or {}
    try:
        rows = sorted((int(token_id), dict(row)) for token_id, row in rows.items())
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        tokens = [
            (i, AddedToken(row["content"], **{flag: row[flag] for flag in flags if flag in row}))
            for i, row in rows
        ]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: added_tokens_decoder cannot be read ({error})") from None
    known = tokenizer.get_added_tokens_decoder()
    for token_id, token in tokens:
        if repr(known.get(token_id)) == repr(token):
            continue
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{where}: token {token.content!r} has id {tokenizer.token_to_id(token.content)}, "
                f"but added_tokens_decoder says {token_id}"
            )


def _mark_special(tokenizer, names):
    """A named token is special even where the file does not say so (transformers)."""
    from tokenizers import AddedToken

    added = {str(token.content): token for token in tokenizer.get_added_tokens_decoder().values()}
    for name in names:
        token = added.get(name)
        if token is None and tokenizer.token_to_id(name) is not None:
            token = AddedToken(name, normalized=False)
        if token is not None and not token.special:
            token.special = True
            tokenizer.add_special_tokens([token])


# Reading the files


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

    tokenizer = _built(lambda: Library.from_buffer(raw), where)
    # Some are published as they were left after training; a prompt is never cut or padded here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _built(build, where):
    try:
        return build()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics derive from BaseException
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where}: not a tokenizer ({reason}); fetch it again") from None


def _from_tiktoken(raw, config, where):
    """Llama 3's tokenizer.model: a line a token, its bytes in base64 and its rank, which is its id.

    Returns the tokenizer and what Llama 3's code, instead of the file, says about it.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    ranks = _tiktoken_ranks(raw, where)
    vocab = {"".join(_CHARACTER_OF[b] for b in token): rank for token, rank in ranks.items()}
    # tiktoken takes a whole word that is a token as it is, without looking at merges.
    model = _built(
        lambda: models.BPE(vocab=vocab, merges=_merges(vocab, vocab.get), ignore_merges=True), where
    )
    tokenizer = Library(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    named = {int(i): row["content"] for i, row in config.get("added_tokens_decoder", {}).items()}
    special = [named.get(len(ranks) + n, token) for n, token in enumerate(_LLAMA3_SPECIAL)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tokenizer, {"bos_token": special[0], "eos_token": special[1], "add_bos_token": True}


def _tiktoken_ranks(raw, where):
    ranks = {}
    try:
        for line in raw.splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise CheckpointError(
            f"{where}: line {len(ranks) + 1} is not base64 and a rank; fetch it again"
        ) from None
    if sorted(ranks.values()) != list(range(raw.count(b"\n") + (not raw.endswith(b"\n")))):
        raise CheckpointError(f"{where}: ranks or tokens are missing or doubled; fetch it again")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise CheckpointError(f"{where}: not all 256 bytes are tokens; fetch it again")
    return ranks


def _merges(vocab, priority):
    """Every split of a token into two, by the token's priority, then its id, then the halves' ids.

    The order in which the published tokenizer.json of Llama 2, Llama 3 and Mistral list them.
    """
    found = []
    for token, token_id in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                order = (priority(token), token_id, vocab[left], vocab[right])
                found.append((order, (left, right)))
    found.sort()
    return [halves for _, halves in found]


def _from_sentencepiece(raw, where):
    """Llama 2's tokenizer.model: a SentencePiece BPE with byte fallback and no normalisation.

    Returns the tokenizer and what Llama 2's code, instead of the file, says about it.
    """
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Library

    pieces, trainer, normalizer = _read_sentencepiece(raw, where)
    vocab = {text: index for index, (text, _, _) in enumerate(pieces)}
    unknown = [text for text, _, kind in pieces if kind == _UNKNOWN]
    if len(vocab) != len(pieces) or len(unknown) != 1:
        raise CheckpointError(f"{where}: pieces are doubled or none is <unk>; fetch it again")
    normal = {text: vocab[text] for text, _, kind in pieces if kind == _NORMAL}
    model = _built(
        lambda: models.BPE(
            vocab=vocab,
            merges=_merges(normal, lambda text: -pieces[normal[text]][1]),
            unk_token=unknown[0],
            fuse_unk=True,
            byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
        ),
        where,
    )
    tokenizer = Library(model)
    spaces = [normalizers.Replace(" ", "▁")]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.get(_ADD_DUMMY_PREFIX, 1):
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    for text, _, kind in pieces:
        if kind in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=False)])
    defaults = {"unk_token": unknown[0], "add_bos_token": True}
    for name, field, usual in (("bos_token", _BOS_ID, 1), ("eos_token", _EOS_ID, 2)):
        index = trainer.get(field, usual)
        if index < len(pieces):  # -1, none, is a huge number here
            defaults[name] = pieces[index][0]
    return tokenizer, defaults


# Of sentencepiece_model.proto: kinds of pieces, and fields by number.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _SPACE_AS_SUFFIX, _BYTE_FALLBACK, _BOS_ID, _EOS_ID = 3, 24, 35, 41, 42
_CHARACTER_MAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_BPE = 2


def _read_sentencepiece(raw, where):
    """([(text, score, kind)], trainer's fields, normaliser's fields) of a SentencePiece BPE."""
    pieces, trainer, normalizer = [], {}, {}
    try:
        for field, value in protobuf_fields(raw):
            if field == _PIECES:
                piece = dict(protobuf_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append((piece[1].decode(), score, piece.get(3, _NORMAL)))
            elif field == _TRAINER:
                trainer = dict(protobuf_fields(value))
            elif field == _NORMALIZER:
                normalizer = dict(protobuf_fields(value))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        pieces = []
    if not pieces:
        raise CheckpointError(
            f"{where}: neither a SentencePiece model nor tiktoken ranks; fetch it again"
        )
    is_llamas = (
        trainer.get(_MODEL_TYPE, 1) == _BPE
        and not trainer.get(_SPACE_AS_SUFFIX, 0)
        and not normalizer.get(_CHARACTER_MAP)
        and not normalizer.get(_REMOVE_EXTRA_SPACES, 1)
        and normalizer.get(_ESCAPE_SPACES, 1)
    )
    if not is_llamas:
        raise UnsupportedModelError(
            f"{where}: a SentencePiece model other than BPE without normalisation; "
            "put the model's tokenizer.json beside it"
        )
    return pieces, trainer, normalizer


# Llama 3's code: how text is split into words, and the names of the 256 tokens after the ranks.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 251)),
]


# Small doors


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
