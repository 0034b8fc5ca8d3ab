"""Write a layered checkpoint of random bfloat16 (or quantized) weights at a real shape, without a
published one in between; or the same weights as published shards.

    python benchmarks/make_model.py OUT --shape 70b --layers 20 [--quantize int4 | --published]
    python benchmarks/make_model.py OUT --shape qwen2.5-72b-instruct --layers 8
    python benchmarks/make_model.py OUT --shape qwen3-30b-a3b-thinking-2507 --layers 8 --skew
    python benchmarks/make_model.py OUT --shape 70b --layers 20 --fp8 --published

A shape is one of Llama's sizes, a known model (configs/models), or the path of a config.json.
Experts that are published in an encoding (gpt-oss: MXFP4) are written in it, whatever the rest is.
With `--fp8` the matrices of the layers are FP8 with scales for blocks of 128 x 128, as DeepSeek V3.

Every layer holds the same random bytes under its own names (a fast disk writes faster than numbers
can be drawn), scaled so that activations stay finite. Benchmarks measure bytes and time; what such
a model says means nothing, but it says it firmly: the head's row of a token points where the
embedding of the token before it does, so that the likeliest token stands clear of the next one and
rounding in bfloat16 does not decide between them.

With `--skew` tokens like some experts better than others: a router begins with long rows, in pairs
of opposites, as many pairs as a token chooses experts. A token chooses one of each pair, so about
half of what it chooses is what the one before it chose (`experts.py` counts it).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from jlayer.catalogue import model_json
from jlayer.checkpoint.digest import TensorDigest
from jlayer.checkpoint.encoded import NONE_ENCODED, EncodingTable, form_of, pieces_of
from jlayer.checkpoint.layout import (
    INDEX,
    MANIFEST,
    FileEntry,
    Manifest,
    encode_header,
    encode_index,
    encode_manifest,
    weight_files,
)
from jlayer.checkpoint.quantization import (
    Quantization,
    block_matrices,
    piece_dtypes,
    published_quantization,
    quantization_of,
)
from jlayer.checkpoint.safetensors import TensorEntry
from jlayer.config import OWN_QUANTIZATION, model_config
from jlayer.convert.transform.packed import LEVELS, decode_scales
from jlayer.encodings.base import WHOLE
from jlayer.encodings.registry import SCHEMES, piece_name, split_piece
from jlayer.families.base import EMBEDDING, HEAD
from jlayer.families.holders import text_only
from jlayer.families.registry import is_of_an_expert, published_tensors, stacked_tensors
from jlayer.spec import PUBLISHED_DTYPE, STORED_BYTES

# hidden, heads, key/value heads, mlp, vocabulary
SHAPES = {
    "tiny": (256, 8, 4, 704, 1024),
    "1b": (2048, 32, 8, 8192, 128256),
    "1.5b": (1536, 12, 4, 8960, 151936),
    "8b": (4096, 32, 8, 14336, 128256),
    "70b": (8192, 64, 8, 28672, 128256),
    "405b": (16384, 128, 8, 53248, 128256),
}
# Heads of another size than 128, and a head that is the embedding: as in Llama 3.2 1B.
HEAD_DIM = {"1b": 64}
TIED = {"1b"}
# DeepSeek V3's quantization_config.
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
SKEWED = "skewed"  # (the end of a router's name, its pairs of opposite rows)
LONGER = 32  # times other rows


def config(shape: str, layers: int, *, fp8: bool = False) -> dict:
    """The config.json of a shape, cut to so many layers; `fp8`: with its matrices in FP8."""
    said = {"quantization_config": FP8} if fp8 else {}
    if shape not in SHAPES:
        text = Path(shape).read_bytes() if shape.endswith(".json") else model_json(shape)
        raw = text_only(json.loads(text), where=shape)
        types = {"layer_types": raw["layer_types"][:layers]} if raw.get("layer_types") else {}
        if "first_k_dense_replace" in raw:  # of two layers the last one is still one of experts
            types["first_k_dense_replace"] = min(raw["first_k_dense_replace"], layers - 1)
        return {**raw, **types, "num_hidden_layers": layers, "torch_dtype": "bfloat16", **said}
    hidden, heads, kv_heads, mlp, vocab = SHAPES[shape]
    head_dim = 128 if hidden % 128 == 0 and hidden >= 1024 else hidden // heads
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM.get(shape, head_dim),
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": shape in TIED,
        "torch_dtype": "bfloat16",
        **said,
    }


def make(
    folder: Path,
    shape: str,
    layers: int,
    scheme: str | None = None,
    *,
    skew: bool = False,
    fp8: bool = False,
    encoding: str | None = None,
) -> None:
    """Writes the folder; files in parallel, hashes along the way. `skew`: some experts are chosen
    more often. `fp8`: see `config`. `encoding`: that of all matrices of the layers, as if the model
    were published in it."""
    folder.mkdir(parents=True)
    raw = config(shape, layers, fp8=fp8)
    published = published_quantization(model_config(raw, where="benchmark"))
    if scheme is not None:
        raw["quantization_config"] = {**OWN_QUANTIZATION, "scheme": scheme}
    text = (json.dumps(raw, indent=1) + "\n").encode()
    (folder / "config.json").write_bytes(text)
    cfg = model_config(raw, where="benchmark")
    shapes = published_tensors(cfg)
    if encoding is not None:
        table = EncodingTable.of(dict.fromkeys(block_matrices(shapes), encoding))
        published = Quantization(None, table=table)
    quantization = published
    if scheme is not None:
        quantization = quantization_of(scheme, shapes, published=published)
    dtypes = piece_dtypes(shapes, quantization)
    drawn = _draw(quantized=scheme is not None, tied=cfg.tie_word_embeddings)
    if skew:
        drawn[SKEWED] = (cfg.experts.routing, cfg.experts.router.n_chosen)
    drawn |= _draw_encoded(
        {
            piece_name(name, piece): (kept.name, piece)
            for name, dims in shapes.items()
            if published and (kept := published.scheme_of(name, dims))
            for piece in kept.pieces(dims)
        }
    )

    def write(item):
        file, held = item
        kinds = {name: dtypes.get(name, "bfloat16") for name in held}
        header, entries = encode_header(held, kinds)
        return file, _write(folder / file, header, entries, drawn)

    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        files = dict(pool.map(write, weight_files(cfg, quantization).items()))
    index = encode_index({name: entry.tensors for name, entry in files.items()})
    (folder / INDEX).write_bytes(index)
    for name, data in (("config.json", text), (INDEX, index)):
        files[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest(), {}, {})
    fingerprint = hashlib.sha256(text + shape.encode()).hexdigest()
    (folder / MANIFEST).write_bytes(
        encode_manifest(Manifest(cfg.model_type, fingerprint, files, quantization))
    )


def publish(
    folder: Path, shape: str, layers: int, shard_bytes: int = 5 << 30, *, fp8: bool = False
) -> None:
    """The same weights as they are published: shards in the order of the model, whose data begins
    where the header happens to end, which is hardly ever where a slot would have it."""
    folder.mkdir(parents=True)
    raw = config(shape, layers, fp8=fp8)
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
    shards, room, kept, cfg = [], 0, {}, model_config(raw, where="benchmark")
    for name, dims, dtype, use in _published(cfg):
        kept |= {name: use} if use else {}
        n_bytes = STORED_BYTES[dtype] * math.prod(dims)
        if n_bytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = (dims, dtype, n_bytes)
        room -= n_bytes
    drawn = _draw(quantized=False, tied=cfg.tie_word_embeddings) | _draw_encoded(kept)
    weight_map = {}
    for number, held in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(held, file)
        table, entries, at = {}, {}, 0
        for name, (dims, dtype, n_bytes) in held.items():
            place = {"shape": dims, "data_offsets": [at, at + n_bytes]}
            table[name] = {"dtype": PUBLISHED_DTYPE[dtype], **place}
            entries[name] = TensorEntry(dtype, dims, at, n_bytes)
            at += n_bytes
        text = json.dumps(table).encode()
        text = text.ljust(-(-len(text) // 64) * 64)  # data begins at a multiple of 64, plus 8
        _write(folder / file, len(text).to_bytes(8, "little") + text, entries, drawn)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def _published(cfg):
    """Yields (name, shape, dtype, (encoding, piece) or None) of each tensor as it is published;
    experts in tensors of all of them where the family has no other form."""
    stacks = stacked_tensors(cfg)
    stacks = stacks if stacks and all(stack.is_only for stack in cfg.experts.stacks) else {}
    shapes, quantization = published_tensors(cfg), published_quantization(cfg)
    table, form = quantization.table if quantization else NONE_ENCODED, form_of(cfg)
    for name, dims in shapes.items():
        if not (stacks and is_of_an_expert(name)):
            yield from _as_pieces(name, dims, None, table.of_tensor(name), form)
    for name, stack in stacks.items():
        encoding = table.of_tensor(stack.parts[0][0])
        yield from _as_pieces(name, stack.shape, stack, encoding, form)


def _as_pieces(name, dims, stack, encoding, form):
    if encoding is None:
        yield name, dims, "bfloat16", None
        return
    for piece, (dtype, axes) in pieces_of(encoding, form, dims, stack).items():
        yield form.name_of(name, piece), axes, dtype, (encoding, piece)


def _draw_encoded(kept):
    """What encoded tensors are filled with, by their names; `kept`: name -> (encoding, piece). The
    scales are such that the weights have the spread of others, 0.01."""
    half_bytes = np.random.default_rng(2).integers(0, 256, 16 << 20, dtype=np.uint8)
    numbers = np.random.default_rng(3).standard_normal(16 << 20, dtype=np.float32)
    noise = {
        ("mxfp4", "q"): half_bytes,
        ("mxfp4", "scale"): np.full(1 << 20, 119, np.uint8),
        ("fp8_128x128", "q"): (numbers * 40.96).astype(ml_dtypes.float8_e4m3fn),
        ("fp8_128x128", "scale"): np.full(1 << 20, 2**-12, np.float32),
        ("q4_k", "q"): _q4_k_blocks(),
    }
    return {name: noise[use] for name, use in kept.items()}


def _q4_k_blocks():
    """Blocks of 256 weights: random codes, scales and minima, and two numbers that all of these are
    multiplied by: such that a mean weight is 0."""
    blocks = np.random.default_rng(4).integers(0, 256, (1 << 16, 144), dtype=np.uint8)
    d = 0.01 / (32 * 4.6)  # the mean of a scale, the deviation of a code
    blocks[:, :4] = np.array([d, 7.5 * d], np.float16).view(np.uint8)
    return blocks.reshape(-1)


def _draw(*, quantized, tied=False):
    """Noise to fill matrices with: by what it is for and, quantized, by piece and dtype. The scales
    are such that the weights they stand for have the same spread. A `tied` table is the head too:
    its likeliest tokens stand as far apart as those of a trained model do."""
    noise = np.random.default_rng(0).standard_normal(16 << 20, dtype=np.float32)
    table = 0.06 if tied else 4.0
    spread = {EMBEDDING.published: table, HEAD.published: 0.01, None: 0.01}
    if not quantized:
        return {key: (noise * own).astype(ml_dtypes.bfloat16) for key, own in spread.items()}
    steps = 32  # of int8 within one standard deviation
    small = np.clip(np.rint(noise * steps), -127, 127).astype(np.int8)
    drawn = {
        ("scale", "bfloat16", key): np.full(1 << 20, own / steps, ml_dtypes.bfloat16)
        for key, own in spread.items()
    }
    # Signs at random, since the levels of int4 are no mean of zero.
    rng, one = np.random.default_rng(1), np.arange(128, dtype=np.uint8)
    code = one[np.abs(decode_scales(one) * LEVELS.std() - spread[None]).argmin()]
    signs = rng.integers(0, 2, 1 << 20, dtype=np.uint8) << 7
    return drawn | {
        None: (noise[: 1 << 20] * spread[None]).astype(ml_dtypes.bfloat16),  # of biases, say
        ("q", "int8"): small,
        ("q", "uint8"): rng.integers(0, 256, 16 << 20, dtype=np.uint8),
        ("scale", "uint8", None): code | signs,
    }


def _write(path, header, entries, drawn):
    digest, digests = hashlib.sha256(header), {}
    with open(path, "wb") as file:
        file.write(header)
        for name, entry in entries.items():
            rows = TensorDigest(entry.shape, entry.n_bytes)
            for piece in _pieces(name, entry, drawn):
                raw = piece.reshape(-1).view(np.uint8).data
                file.write(raw)
                digest.update(raw)
                rows.update(raw)
            digests[name] = rows.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(path.stat().st_size, digest.hexdigest(), entries, digests)


def _pieces(name, entry, drawn):
    """A tensor's values from its first row to its last."""
    base, piece = split_piece(name)
    use = base if base in (EMBEDDING.published, HEAD.published) else None
    if name in drawn and name not in (EMBEDDING.published, HEAD.published):
        yield from _repeated(drawn[name], math.prod(entry.shape))
    elif name.endswith("norm.weight"):
        yield np.ones(entry.shape, ml_dtypes.bfloat16)
    elif SKEWED in drawn and name.endswith(drawn[SKEWED][0]):
        _, n_pairs = drawn[SKEWED]
        rows = drawn[None][: math.prod(entry.shape)].reshape(entry.shape).copy()
        rows[: 2 * n_pairs : 2] *= LONGER
        rows[1 : 2 * n_pairs : 2] = -rows[: 2 * n_pairs : 2]
        yield rows
    elif use is not None and piece != "scale":
        noise = drawn[use] if piece == WHOLE else drawn[piece, entry.dtype]
        yield from _rows_apart(noise, entry.shape, shift=use == HEAD.published)
    else:
        if piece == WHOLE:
            noise = drawn[None]
        else:
            noise = drawn[(piece, entry.dtype) + ((use,) if piece == "scale" else ())]
        yield from _repeated(noise, math.prod(entry.shape))


def _repeated(noise, left):
    while left:
        yield noise[:left]
        left -= min(left, len(noise))


def _rows_apart(noise, shape, *, shift):
    """Rows that begin at different places of the noise, so that no two are alike; the same places
    for every matrix, `shift` rows on."""
    rows, width = shape
    places = np.random.default_rng(1).choice(len(noise) - width, rows, replace=False)
    windows = np.lib.stride_tricks.sliding_window_view(noise, width)
    places = np.roll(places, shift)
    for first in range(0, rows, 1024):
        yield windows[places[first : first + 1024]]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--layers", type=int, required=True)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--published", action="store_true", help="shards, not layers")
    kind.add_argument("--quantize", choices=tuple(SCHEMES))
    parser.add_argument("--fp8", action="store_true", help="matrices of layers in FP8")
    parser.add_argument("--encoding", choices=("q4_k",), help="that of matrices of layers")
    parser.add_argument("--skew", action="store_true", help="some experts are chosen more often")
    args = parser.parse_args()
    if args.skew and args.published:
        parser.error("--skew: only of layered folders")
    if args.fp8 and args.quantize:
        parser.error("--fp8: its weights stay so, and are not quantized again")
    if args.encoding and (args.published or args.quantize or args.fp8):
        parser.error("--encoding: only of layered folders, and instead of another one")
    if args.published:
        publish(args.out, args.shape, args.layers, fp8=args.fp8)
    else:
        how = {"skew": args.skew, "fp8": args.fp8, "encoding": args.encoding}
        make(args.out, args.shape, args.layers, args.quantize, **how)
    print(args.out, "holds", args.layers, "layers")


if __name__ == "__main__":
    main()
