"""The memory and time that `convert` takes for an Orbax checkpoint whose layers are stacked.

    python benchmarks/stacked.py [--shape 8b] [--layers 4] [--zarr3] [--home FOLDER]

Orbax itself saves random bfloat16 weights, which lie in memory for that, in a process of its own:
an array is then one chunk, in which the numbers of all layers follow each other, compressed. What
`convert` holds is its anonymous memory, read from outside, less what the process held with all its
libraries loaded (the 12 MiB that it writes from are shared pages, and not in it); the bound is one
layer plus the largest tensor. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import make_model
import ml_dtypes
import numpy as np

from jlayer.config import model_config
from jlayer.convert import convert_checkpoint
from jlayer.families.registry import published_tensors


def save(folder: Path, shape: str, layers: int, *, zarr3: bool) -> None:
    """Saves stacked random weights as Orbax's users do."""
    import orbax.checkpoint as ocp

    config = make_model.config(shape, layers)
    noise = np.random.default_rng(0).standard_normal(16 << 20, dtype=np.float32)
    noise = (noise * 0.02).astype(ml_dtypes.bfloat16)
    tree = {}
    for name, dims in published_tensors(model_config(config, where="benchmark")).items():
        if ".layers." in name:
            _, _, number, leaf = name.split(".", 3)
            if number != "0":
                continue
            name, dims = f"model.layers.{leaf}", (layers, *dims)
        size = math.prod(dims)
        tree[name] = np.resize(np.roll(noise, 1 + len(tree)), size).reshape(dims)
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(folder, tree)
    (folder / "config.json").write_text(json.dumps(config))


def bound(shape: str, layers: int) -> tuple[int, int]:
    """Bytes of a layer, and of the largest tensor."""
    cfg = model_config(make_model.config(shape, layers), where="benchmark")
    sizes = {name: 2 * math.prod(dims) for name, dims in published_tensors(cfg).items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    return layer, max(sizes.values())


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().split("RssAnon:")
    return int(lines[1].split()[0]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=make_model.SHAPES, default="8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--zarr3", action="store_true", help="saved in the newer form")
    parser.add_argument("--home", help="where to work (default: a temporary folder)")
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.save:
        save(args.save, args.shape, args.layers, zarr3=args.zarr3)
        return
    common.say(str(common.card()))
    with tempfile.TemporaryDirectory(dir=args.home) as home:
        source = Path(home) / "source"
        words = [sys.executable, __file__, *sys.argv[1:], "--save", str(source)]
        subprocess.run(words, check=True)
        import tensorstore  # noqa: F401  (so that it counts as held before)

        before = anonymous()
        started = time.perf_counter()
        with common.AnonymousWatch() as watch:
            done = convert_checkpoint(source, Path(home) / "target")
        took_s = time.perf_counter() - started
    layer, largest = bound(args.shape, args.layers)
    common.last_line(
        {
            "card": common.card(),
            "shape": args.shape,
            "layers": args.layers,
            "zarr3": args.zarr3,
            "bytes": done.target_bytes,
            "convert_s": took_s,
            "before_bytes": before,
            "held_bytes": watch.peak_bytes - before,
            "bound_bytes": layer + largest,
            "share_of_bound": (watch.peak_bytes - before) / (layer + largest),
        }
    )


if __name__ == "__main__":
    main()
