"""Llama 2's tokenizer.model (SentencePiece's form) as a tokenizer of the `tokenizers` library."""

from __future__ import annotations

from jlayer.errors import CheckpointError, UnsupportedModelError
from jlayer.text.bpe import bpe_merges, build
from jlayer.tokenizer_files import BPE, PieceKind, SentencePieceModel, read_sentencepiece


def from_sentencepiece(raw: bytes, *, where: str) -> tuple[object, dict]:
    """The tokenizer, and defaults for tokenizer_config.json that only Llama 2's code states.

    Raises CheckpointError (a damaged file) or UnsupportedModelError (a model other than BPE without
    normalisation).
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    found = read_sentencepiece(raw, where=where)
    _check_supported(found, where)
    unknown = [piece.text for piece in found.pieces if piece.kind == PieceKind.UNKNOWN]
    if len({piece.text for piece in found.pieces}) != len(found.pieces) or len(unknown) != 1:
        raise CheckpointError(f"{where}: pieces are doubled or none is <unk>; fetch it again")
    tokenizer = Library(_bpe(found, unknown[0], where))
    tokenizer.normalizer, tokenizer.decoder = _spaces(found)
    for piece in found.pieces:
        if piece.kind in (PieceKind.UNKNOWN, PieceKind.CONTROL):
            token = AddedToken(piece.text, normalized=False, special=True)
            tokenizer.add_special_tokens([token])
        elif piece.kind == PieceKind.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.text, normalized=False, special=False)])
    defaults = {"unk_token": unknown[0], "add_bos_token": True}
    for name, index in (("bos_token", found.bos_id), ("eos_token", found.eos_id)):
        if index < len(found.pieces):
            defaults[name] = found.pieces[index].text
    return tokenizer, defaults


def _check_supported(found: SentencePieceModel, where):
    is_supported = (
        found.model_type == BPE
        and not found.treat_whitespace_as_suffix
        and not found.precompiled_charsmap
        and not found.remove_extra_whitespaces
        and found.escape_whitespaces
    )
    if not is_supported:
        raise UnsupportedModelError(
            f"{where}: a SentencePiece model other than BPE without normalisation; "
            "put the model's tokenizer.json beside it"
        )


def _bpe(found, unknown, where):
    from tokenizers import models

    vocab = {piece.text: index for index, piece in enumerate(found.pieces)}
    normal = {text: i for text, i in vocab.items() if found.pieces[i].kind == PieceKind.NORMAL}
    return build(
        lambda: models.BPE(
            vocab=vocab,
            merges=bpe_merges(normal, lambda text: -found.pieces[normal[text]].score),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bool(found.byte_fallback),
        ),
        where=where,
    )


def _spaces(found):
    """(normalizer, decoder): a space is written ▁, and one is put before the text."""
    from tokenizers import decoders, normalizers

    written = [normalizers.Replace(" ", "▁")]
    read = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if found.add_dummy_prefix:
        written.insert(0, normalizers.Prepend("▁"))
        read.append(decoders.Strip(" ", 1, 0))
    return normalizers.Sequence(written), decoders.Sequence(read)
