"""Tokenizers written into GGUF files as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def of_json(folder: Path, pre: str, *, adds_bos: bool | None = None, size: int = 0):
    """What writes the BPE tokenizer of a folder's tokenizer.json, split as `pre` says. `size`: of
    the vocabulary, which is padded."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    config = folder / "tokenizer_config.json"
    config = json.loads(config.read_text()) if config.exists() else {}
    texts = {number: text for text, number in raw["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for token in raw["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    n_tokens = max(*texts, size - 1) + 1
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]
    ]
    ids = {text: number for number, text in texts.items()}

    def write(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([texts.get(n, f"[PAD{n}]") for n in range(n_tokens)])
        writer.add_token_types([kinds.get(n, UNUSED) for n in range(n_tokens)])
        writer.add_token_merges(merges)
        _add_ends(writer, config, ids)
        if adds_bos is not None:
            writer.add_add_bos_token(adds_bos)

    return write


def of_sentencepiece(path: Path, **flags):
    """What writes the tokenizer of a tokenizer.model in SentencePiece's form."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    numbers = range(model.vocab_size())

    def kind(number):
        checks = (
            (model.is_unknown, UNKNOWN),
            (model.is_control, CONTROL),
            (model.is_unused, UNUSED),
            (model.is_byte, BYTE),
        )
        return next((kind for check, kind in checks if check(number)), NORMAL)

    def write(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([model.id_to_piece(n) for n in numbers])
        writer.add_token_scores([model.get_score(n) for n in numbers])
        writer.add_token_types([kind(n) for n in numbers])
        writer.add_bos_token_id(model.bos_id())
        writer.add_eos_token_id(model.eos_id())
        writer.add_unk_token_id(model.unk_id())
        for name, flag in flags.items():
            getattr(writer, f"add_{name}")(flag)

    return write


def _add_ends(writer, config, ids):
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(ids[token])
    template = config.get("chat_template")
    if template is not None:
        writer.add_chat_template(template)
