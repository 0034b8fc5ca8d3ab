"""tokenizer.model in SentencePiece's form as a tokenizer of the `tokenizers` library."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.text.bpe import bpe_merges, build
from jlayer.text.declared import Defaults
from jlayer.tokenizer_files import (
    BPE,
    UNIGRAM,
    PieceKind,
    SentencePieceModel,
    read_sentencepiece,
)


def from_sentencepiece(
    raw: bytes, names: Mapping[int, str], *, legacy: bool, where: str
) -> tuple[object, Defaults]:
    """The tokenizer, and what the file says where no file beside it does.

    `names`: id → text of pieces that tokenizer_config.json gives other names. `legacy`: a space is
    put before each text between special tokens, not only before the first.
    Raises CheckpointError (a damaged file) or UnsupportedModelError (a kind of model other than BPE
    and unigram).
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    found = read_sentencepiece(raw, where=where)
    _check_supported(found, where)
    pieces = [piece.text for piece in found.pieces]
    unknown = [i for i, piece in enumerate(found.pieces) if piece.kind == PieceKind.UNKNOWN]
    if len(set(pieces)) != len(pieces) or len(unknown) != 1:
        raise CheckpointError(f"{where}: pieces are doubled or none is <unk>; fetch it again")
    texts = _renamed(pieces, names)
    tokenizer = Library(_model(found, texts, unknown[0], where))
    _split_as(tokenizer, found, texts, legacy=legacy)
    tokenizer.decoder = _decoder(found)
    named = {}
    for name in ("unk", "bos", "eos"):
        if getattr(found, f"{name}_id") < len(pieces):  # -1, for none, reads as a huge number
            named[f"{name}_token"] = getattr(found, f"{name}_piece").decode()
    control, user_defined = (
        [
            AddedToken(piece.text, normalized=False, special=kind == PieceKind.CONTROL)
            for piece in found.pieces
            if piece.kind == kind
        ]
        for kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED)
    )
    return tokenizer, Defaults(
        named, control, user_defined=user_defined, matches_raw_text=bool(found.add_dummy_prefix)
    )


def _check_supported(found: SentencePieceModel, where):
    if found.model_type not in (BPE, UNIGRAM) or found.treat_whitespace_as_suffix:
        raise UnsupportedModelError(
            f"{where}: a SentencePiece model of type {found.model_type}, expected unigram (1) or "
            "BPE (2) with spaces before words; put the model's tokenizer.json beside it"
        )


def _renamed(pieces, names):
    """The pieces under the names that the config gives; a name that is another piece's is kept."""
    kept = {piece for index, piece in enumerate(pieces) if index not in names}
    return [
        names[index] if names.get(index, piece) not in kept else piece
        for index, piece in enumerate(pieces)
    ]


def _model(found, texts, unknown, where):
    from tokenizers import models

    if found.model_type == UNIGRAM:
        pieces = list(zip(texts, (piece.score for piece in found.pieces), strict=True))
        return build(
            lambda: models.Unigram(pieces, unknown, bool(found.byte_fallback)), where=where
        )
    normal = {
        text: index
        for index, text in enumerate(texts)
        if found.pieces[index].kind == PieceKind.NORMAL
    }
    return build(
        lambda: models.BPE(
            vocab={text: index for index, text in enumerate(texts)},
            merges=bpe_merges(normal, lambda text: -found.pieces[normal[text]].score),
            unk_token=texts[unknown],
            fuse_unk=True,
            byte_fallback=bool(found.byte_fallback),
            ignore_merges=bool(_user_defined(found, texts)),
        ),
        where=where,
    )


def _user_defined(found, texts):
    """Pieces that are taken whole wherever they stand, the longest first."""
    pieces = zip(texts, found.pieces, strict=True)
    own = [text for text, piece in pieces if piece.kind == PieceKind.USER_DEFINED]
    return sorted(own, key=len, reverse=True)


def _split_as(tokenizer, found, texts, *, legacy):
    """The normalizer and the pre-tokenizer, step by step in SentencePiece's order."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps, words = [], []
    if found.precompiled_charsmap:
        steps.append(normalizers.Precompiled(found.precompiled_charsmap))
    if found.remove_extra_whitespaces:  # spaces alone: a newline is no white space here
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if found.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    if found.add_dummy_prefix:
        if legacy:  # Metaspace puts no space before a text that begins with one; SentencePiece does
            steps.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))
        scheme = "always" if legacy else "first"
        words.append(pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False))
    if own := _user_defined(found, texts):
        words.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, own))), "isolated"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)


def _decoder(found):
    from tokenizers import decoders

    steps = [decoders.Replace("▁", " ")]
    if found.byte_fallback:
        steps.append(decoders.ByteFallback())
    if found.byte_fallback or found.add_dummy_prefix:
        steps.append(decoders.Fuse())
    if found.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
