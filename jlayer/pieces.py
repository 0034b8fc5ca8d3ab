"""How attention and a gated DeltaNet are cut into pieces that stay within some bytes. Compiled
programs and the plan both use it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from jlayer.parts import Attention, Delta, Latent

# Attention takes as many lanes and cached entries at a time as stay within these bytes: of scores,
# float32 [lanes, N, T, entries], and of the keys and values that are gathered.
SCORE_BYTES = 64 << 20
GATHERED_BYTES = 64 << 20
# Flash attention gives a block of the card the rows of a key/value head, up to FLASH_ROWS. Where
# that makes few blocks, the entries are cut too, up to FLASH_BLOCKS: about the multiprocessors of a
# card (H200: 64 rows and 8192 entries take 0.17 ms in 32 blocks, 0.09 in 128, 0.14 in 512).
FLASH_ROWS = 128
FLASH_BLOCKS = 128


# A gated DeltaNet takes so many rows of a long chain at once.
DELTA_BLOCK = 64


def delta_block(tokens: int, *, is_chain: bool) -> int:
    """How many of a lane's rows a gated DeltaNet takes at once: all of a tree, since a branch may
    begin anywhere in it."""
    is_cut = is_chain and tokens > DELTA_BLOCK and tokens % DELTA_BLOCK == 0
    return DELTA_BLOCK if is_cut else tokens


def delta_bytes(delta: Delta, *, lanes: int, tokens: int, is_chain: bool) -> int:
    """Bytes of a gated DeltaNet's temporaries, float32: states, as they are read (of two lanes at
    least), as they go on and as they are written; for each pair of rows that are taken at once the
    decay between them, and their products; for each row what is convolved, and what the heads'
    values become."""
    heads, block = delta.n_value_heads, delta_block(tokens, is_chain=is_chain)
    state = heads * delta.key_dim * delta.value_dim
    states = (3 if block == tokens else 4) * max(lanes, 2) * state
    pairs = 4 * lanes * heads * block**2
    rows = lanes * tokens * (4 * delta.channels + 5 * heads * delta.value_dim)
    return 4 * (states + pairs + rows)


def expands(latent: Latent, *, tokens: int) -> bool:
    """Whether latent attention makes a key and a value of each entry, for lanes of so many rows.

    Multiplications of a head for an entry: to make its key and value, rank * (nope + value); then
    for each row the key's numbers, nope + rope, and the value's. Among the latents it is two times
    the entry's L numbers for each row, and nothing before. What a row costs once is little beside
    what it costs at every entry, and how many heads and entries there are makes no difference.

    Two busy cores of a CPU, float32, 32 heads of DeepSeek V3 and 4096 entries: 0.09 s among the
    latents and 0.94 with keys and values at 2 rows, 0.85 and 1.49 at 64, 1.76 both ways at 128,
    3.3 and 2.2 at 256, 5.0 and 3.4 at 512. The formula says 158 rows.
    """
    made = latent.nope_dim + latent.value_dim
    over_heads = latent.rank * made + tokens * (made + latent.rope_dim)
    return over_heads < tokens * 2 * latent.entry


def latent_bytes(latent: Latent, *, n_rows: int, among: int) -> int:
    """Bytes of latent attention's temporaries. `among`: those of attention among the latents.

    The matrix of keys and values, cut by heads, as float32 at most; where it is two, once more.
    Before and after what is among
    the latents, for each row its queries, those among the latents, and what a head gives, float32
    and as it goes on."""
    of_head = latent.nope_dim + latent.value_dim
    matrix = (1 + latent.is_apart) * latent.n_heads * of_head * latent.rank
    row = latent.n_heads * (latent.entry + of_head + latent.rope_dim) + latent.entry
    return 4 * matrix + max(among, 2 * 4 * n_rows * row)


def expanded_bytes(latent: Latent, *, n_rows: int, lanes: int, tokens: int, capacity: int) -> int:
    """Bytes of latent attention's temporaries where a key and a value are made of each entry.

    The matrix of keys and values, as float32 at most; where it is joined of two, once more. Of a
    piece of the entries what is made of them (float32, and as it goes on), the keys with their
    shared part, and both as float32 again; the scores, as in any attention. Of each row its query,
    as it comes and by head, and what is mixed so far, before and after a piece, and as it goes
    on."""
    how, made = latent.of_heads, latent.nope_dim + latent.value_dim
    pieces = attention_pieces(how, lanes=lanes, tokens=tokens, capacity=capacity)
    entries = pieces.lanes * max(capacity // pieces.committed, tokens // pieces.fresh)
    of_entries = 2 * (made + how.head_dim) + latent.value_dim
    of_rows = 2 * how.head_dim + 3 * latent.value_dim
    scores = 7 * tokens * entries // 2
    matrix = (1 + latent.is_apart) * latent.rank * made
    numbers = matrix + entries * of_entries + n_rows * of_rows + scores
    return 4 * latent.n_heads * numbers


@dataclass(frozen=True)
class Pieces:
    """How the attention of a pane is cut: `lanes` at a time; their committed entries in `committed`
    pieces, and the entries of the chunk itself in `fresh` pieces. `splits`: into how many parts
    flash attention cuts a piece of the committed entries, all at once; 0: it is not used."""

    lanes: int
    committed: int
    fresh: int
    splits: int = 0


def attention_pieces(
    attention: Attention, *, lanes: int, tokens: int, capacity: int, flash: bool = False
) -> Pieces:
    """The fewest pieces that stay within SCORE_BYTES and GATHERED_BYTES, fewer lanes first.

    The compiled program and the plan both use it. `capacity` is the length of the lanes' tables.
    `flash`: the device has flash attention, which keeps no scores. A single row for each lane does
    without: it is faster so (H200, one lane with 8192 entries: 0.05 ms against 0.08 at best).
    """
    score = 4 * attention.n_heads * tokens
    # With flash attention the numbers have 16 bits. A CPU makes float32 of such.
    gathered = 2 * (2 if flash else 4) * attention.n_kv_heads * attention.head_dim
    flash = flash and tokens > 1 and attention.is_plain

    def fits(at_once, entries):
        return (flash or at_once * entries * score <= SCORE_BYTES) and (
            at_once * entries * gathered <= GATHERED_BYTES
        )

    at_once, committed, fresh = lanes, 1, 1
    while at_once > 1 and at_once % 2 == 0 and not fits(at_once, capacity):
        at_once //= 2
    while capacity % (2 * committed) == 0 and not fits(at_once, capacity // committed):
        committed *= 2
    while tokens % (2 * fresh) == 0 and at_once * (tokens // fresh) * score > SCORE_BYTES:
        fresh *= 2
    if not flash:
        return Pieces(at_once, committed, fresh)
    rows = tokens * (attention.n_heads // attention.n_kv_heads)
    blocks = at_once * attention.n_kv_heads * -(-rows // FLASH_ROWS)
    entries, splits = capacity // committed, 1
    while (
        entries % (2 * splits) == 0
        and entries // splits > FLASH_ROWS
        and (2 * splits * blocks <= FLASH_BLOCKS)
    ):
        splits *= 2
    return Pieces(at_once, committed, fresh, splits)
