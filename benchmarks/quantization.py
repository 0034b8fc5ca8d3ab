"""What quantizing costs: perplexity and divergence of int8 and int4, beside round-to-nearest and
NF4 in the same run, on a trained checkpoint and a held-out text.

    python benchmarks/quantization.py CHECKPOINT TEXT.gz [TEXT.gz ...] [--held-out 40000]

Texts are documents between lines of `<|endoftext|>`, each with the model's first and last token
around it; held out are the last tokens. Everything is computed in float32 by jlayer itself, in
windows of 1,024 tokens side by side. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import tempfile
from pathlib import Path

import common
import numpy as np
from safetensors.numpy import load_file, save_file

from jlayer import AutoModel
from jlayer.config import read_config
from jlayer.convert import convert_checkpoint
from jlayer.convert.transform.cast import NUMPY_DTYPE
from jlayer.families.registry import layer_of, published_tensors
from jlayer.measure.evaluate import compare
from jlayer.text.tokenizer import Tokenizer

# The sixteen levels of NF4, from QLoRA (Dettmers et al. 2023, appendix E): quantiles of a normal
# distribution, with an exact zero.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def round_to_nearest(rows: np.ndarray, group: int = 128) -> np.ndarray:
    """Symmetric, -8 to 7, the scale by the largest magnitude alone, kept in float16."""
    groups, width = _grouped(rows, group)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(7)
    scale = np.where(scale == 0, 1, scale).astype(np.float16).astype(np.float32)
    return _ungrouped(np.clip(np.rint(groups / scale), -8, 7) * scale, width)


def nf4(rows: np.ndarray, block: int = 64) -> np.ndarray:
    """The nearest of NF4's levels times the largest magnitude, kept in float32."""
    groups, width = _grouped(rows, block)
    scale = np.abs(groups).max(-1, keepdims=True)
    scale = np.where(scale == 0, 1, scale)
    codes = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, groups / scale)
    return _ungrouped(NF4[codes] * scale, width)


# name -> (what becomes of a block's matrix, bits a weight)
RIVALS = {"rtn g128": (round_to_nearest, 4 + 16 / 128), "nf4 b64": (nf4, 4 + 32 / 64)}


def _grouped(rows, group):
    """Groups along the input, the last one of a row filled up with zeros."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % group)))
    return padded.reshape(len(rows), -1, group), rows.shape[1]


def _ungrouped(groups, width):
    return groups.reshape(len(groups), -1)[:, :width].astype(np.float32)


def rewritten(checkpoint: Path, target: Path, change) -> Path:
    """A copy of a checkpoint in float32 with its blocks' matrices changed."""
    target.mkdir()
    tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
    wide = NUMPY_DTYPE["float32"]
    for name, array in tensors.items():
        found = array.astype(wide)
        inside = layer_of(name) is not None and array.ndim == 2
        tensors[name] = change(found) if inside else found
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return target


def held_out(checkpoint: Path, texts: list[Path], n_tokens: int) -> list[int]:
    """The last tokens of all documents."""
    tokenizer = Tokenizer.from_folder(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    ids: list[int] = []
    for path in texts:
        text = gzip.decompress(path.read_bytes()).decode()
        for document in text.split("<|endoftext|>"):
            if document.strip():
                own = tokenizer.encode(document.strip() + "\n", add_special_tokens=False)
                ids += [config["bos_token_id"], *own, config["eos_token_id"]]
    return ids[-n_tokens:]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--held-out", type=int, default=40_000)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    ids = held_out(args.checkpoint, args.texts, args.held_out)
    shapes = published_tensors(read_config(args.checkpoint))
    result = {"card": common.card(), "model": args.checkpoint.name, "tokens": len(ids), "rows": {}}
    with tempfile.TemporaryDirectory() as work:
        folders = {"published": (Path(work) / "published", 16.0)}
        convert_checkpoint(args.checkpoint, folders["published"][0])
        for number, (name, (change, bits)) in enumerate(RIVALS.items()):
            source = rewritten(args.checkpoint, Path(work) / f"source-{number}", change)
            folders[name] = (Path(work) / f"rival-{number}", bits)
            convert_checkpoint(source, folders[name][0])
        for scheme in ("int8", "int4"):
            folders[scheme] = (Path(work) / scheme, None)
            done = convert_checkpoint(args.checkpoint, folders[scheme][0], quantize=scheme)
            folders[scheme] = (folders[scheme][0], done.block_bits)
            result[f"{scheme} at_int8"] = done.quantization["at_int8"]

        def opened(name):
            return lambda: AutoModel.from_pretrained(
                folders[name][0], device=args.device, dtype="float32"
            )

        common.say(f"{args.checkpoint.name}: {len(ids):,} tokens held out, {len(shapes)} tensors")
        for name in [*RIVALS, "int8", "int4"]:
            found = compare(opened("published"), opened(name), lambda model: ids)
            base, own = found.first.perplexity, found.second.perplexity
            result["windows"] = dataclasses.asdict(found.first)
            result["rows"][name] = {
                "bits": folders[name][1],
                "perplexity": own,
                "change": own / base - 1,
                "mean_kl": found.mean_kl,
                "same_top_1": found.same_top_1,
            }
            common.say(
                f"{name:10} {folders[name][1]:.3f} bits  perplexity {own:.3f} (published "
                f"{base:.3f}, {own / base - 1:+.3%})  KL {found.mean_kl:.5f}  same top-1 "
                f"{found.same_top_1:.2%}"
            )
    assert all(math.isfinite(row["mean_kl"]) for row in result["rows"].values())
    common.last_line(result)


if __name__ == "__main__":
    main()
