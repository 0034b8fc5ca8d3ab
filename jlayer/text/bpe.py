"""What byte-pair encodings share: the byte alphabet, the order of merges, and checked calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from jlayer.errors import CheckpointError

T = TypeVar("T")
LONG_TEXT = 1 << 16  # characters: some hundredths of a second of work


def _byte_alphabet():
    """Byte → the printable character that stands for it in byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + n) for n, byte in enumerate(others)})
    return table


CHARACTER_OF = _byte_alphabet()
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}


def bpe_merges(vocab: Mapping[str, int], priority: Callable[[str], float]) -> list[tuple[str, str]]:
    """Every split of a token into two tokens, by the token's priority, its id, the halves' ids.

    The published tokenizer.json of Llama 2, Llama 3 and Mistral list them in this order.
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


def build(make: Callable[[], T], *, where: str) -> T:
    """`make()`, where an error or a panic of the `tokenizers` library becomes a CheckpointError."""
    try:
        return make()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics derive from BaseException
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where}: not a tokenizer ({reason}); fetch it again") from None


def ids_of(tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Ids of `text` by the `tokenizers` library. It stops every thread of Python while it encodes
    one text, but not for a list of them; for short texts that costs more than it gives."""
    if len(text) < LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def spelled(
    tokenizer, text: str, *, add_special_tokens: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids that `ids_of` gives, and of each the (begin, end) of its characters in `text`: (0, 0)
    for those that are added. Tokens of one character's bytes all have that character."""
    if len(text) < LONG_TEXT:
        found = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    else:
        found = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]
    return found.ids, found.offsets
