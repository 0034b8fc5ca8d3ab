"""Opens and converts damaged folders of every quantized form: each must be refused in one line, or
give exactly the weights that the format's formula gives for what lies in it.

    python benchmarks/fuzz_quantized.py --count 20000 [--seed 0] [--kind nf4]

A tiny folder is changed at random: what its quantization_config says, the tensors and their header,
single scales, zeros and texts, and the bytes of the file. Each input is made from its number alone.
It has a second of processor time and 256 MB. The last line is one JSON object; code 1 if anything
went wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ml_dtypes
import numpy as np

from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.cores.decode import decoded, some_rows
from jlayer.encodings.registry import piece_name
from jlayer.errors import JlayerError
from jlayer.families.registry import published_tensors
from tests.convert.checkpoints import Tensor, tensors_of, write_tensors
from tests.convert.quantized_damage import DAMAGES, SECTION, damage_file
from tests.convert.quantized_kinds import (
    CONFIG,
    KINDS,
    SINGLE,
    arrays_of,
    meant,
    meant_by_experts,
    write,
)
from tests.reference.repacked_forms import FORMS as REPACKED

LIMIT_S, LIMIT_BYTES = 1.0, 256 << 20
MEASURED_EVERY = 10  # tracing of memory slows everything down
_EXPERT = re.compile(r"(.+\.experts\.)(\d+)\.(\w+)\.weight")
_LONG = 2000  # characters of a message


# What comes of it.


def weights_of(folder: str | Path) -> dict[str, np.ndarray]:
    """The weights of every tensor of a folder that is opened as for running it, float32."""
    store, found = Store(folder), {}
    for name, shape in published_tensors(store.cfg).items():
        row = store.quantization and store.quantization.scheme_of(name, shape)
        pieces = row.pieces(shape) if row else {"": (store.form_of(name), shape)}
        arrays = {
            piece: _array(store.segment_of(piece_name(name, piece)), *info)
            for piece, info in pieces.items()
        }
        with np.errstate(all="ignore"):
            if row is None:
                found[name] = arrays[""].astype(np.float32)
            else:
                arrays = some_rows(row.name, arrays, 0, shape[0])
                found[name] = decoded(row.name, arrays, shape[1])
    return found


def _array(segment, dtype, shape):
    with open(segment.file, "rb") as file:
        file.seek(segment.offset)
        raw = file.read(segment.stored.n_bytes)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if segment.nested is not None:
        decoded_scales = np.empty(len(raw), np.float32)
        codes = np.frombuffer(raw, np.uint8)
        segment.nested.decode(codes, decoded_scales, first=segment.first_code)
        return decoded_scales.reshape(shape)
    return np.frombuffer(raw, kind).reshape(shape)


def check_weights(found: dict[str, np.ndarray], folder: Path) -> None:
    """Raises AssertionError where a weight is not what the formula says."""
    held = arrays_of(folder / SINGLE)
    said = json.loads((folder / CONFIG).read_text()).get(SECTION)
    for name, weights in found.items():
        of_expert = _EXPERT.fullmatch(name)
        if of_expert:
            stem, expert, part = of_expert.groups()
            expected = meant_by_experts(held, f"{stem}{part}", int(expert))
        elif len(weights.shape) == 2:
            expected = meant(said, held, name, weights.shape)
        else:
            continue  # norms and biases
        assert expected is not None, f"{name}: no formula for it"
        same = np.array_equal(weights, expected, equal_nan=True)
        assert same, f"{name}: {np.count_nonzero(weights != expected)} other weights"


def judge(folder: Path, target: Path, *, in_place: bool) -> str:
    """What became of a folder: "read", or "refused". Raises AssertionError."""
    outcomes = []
    if in_place:
        outcomes.append(_outcome(lambda: check_weights(weights_of(folder), folder)))

    def converted():
        convert_checkpoint(folder, target)
        check_weights(weights_of(target), folder)

    try:
        outcomes.append(_outcome(converted))
    finally:
        shutil.rmtree(target, ignore_errors=True)
    lines = [line for line in outcomes if line is not None]
    told = [line for line in lines if "NaN or infinite" not in line]
    assert not told or len(lines) == len(outcomes), f"refused once alone: {lines}"
    return "refused" if lines else "read"


def _outcome(attempt) -> str | None:
    """The line that a folder was refused with; None: it was not."""
    try:
        attempt()
    except JlayerError as error:
        line = str(error)
        assert line.isprintable(), f"not one line: {line[:300]!a}"
        assert len(line) < _LONG, f"{len(line)} characters: {line[:300]}"
        return line
    return None


class Folders:
    """Whole folders of every kind, and a place for damaged ones."""

    def __init__(self, home: Path):
        self.home, self.whole = home, {}
        for kind in KINDS:
            write(home / "whole", kind)
            config = json.loads((home / "whole" / CONFIG).read_text())
            self.whole[kind] = config, tensors_of(home / "whole" / SINGLE)
            shutil.rmtree(home / "whole")
        self._said = [config[SECTION] for config, _ in self.whole.values()]
        (home / "source").mkdir()

    def damaged(self, kind: str, rng: random.Random) -> Path:
        """A folder of this kind, changed once to three times."""
        config, tensors = copy.deepcopy(self.whole[kind][0]), dict(self.whole[kind][1])
        in_file = rng.random() < 0.1
        for _ in range(0 if in_file else rng.choice((1, 1, 1, 2, 3))):
            if not isinstance(config.get(SECTION), dict) or not config[SECTION]:
                break
            rng.choice(DAMAGES)(config, tensors, rng, self._said)
        folder = self.written(config, tensors)
        if in_file:
            damage_file(folder / SINGLE, rng)
        return folder

    def sound(self, kind: str) -> Path:
        """A whole folder of this kind."""
        return self.written(*self.whole[kind])

    def written(self, config: dict, tensors: dict[str, Tensor]) -> Path:
        """A folder of these."""
        folder = self.home / "source"
        (folder / CONFIG).write_text(json.dumps(config))
        write_tensors(folder / SINGLE, tensors)
        return folder


def fuzz(count: int, *, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> dict:
    """Opens and converts `count` damaged folders; returns figures, `problems` among them."""
    outcomes, problems, rng = Counter(), [], random.Random()
    slowest, most_bytes, worst = 0.0, 0, ""
    began = time.perf_counter()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as home:
        folders = Folders(Path(home))
        for number in range(count):
            rng.seed(seed * (1 << 40) + number)
            kind = rng.choice(kinds)
            folder = folders.damaged(kind, rng)
            measured = number % MEASURED_EVERY == 0
            if measured:
                tracemalloc.start()
            started = time.process_time()
            try:
                outcomes[judge(folder, Path(home) / "t", in_place=kind not in REPACKED)] += 1
            except Exception as error:
                outcomes["wrong"] += 1
                *_, last = traceback.extract_tb(error.__traceback__)
                told = f"{error!a:.400} at {last.filename}:{last.lineno}".replace(home, "")
                problems.append(f"{kind} {seed}:{number}: {told}")
            if measured:
                most_bytes = max(most_bytes, tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
            elif time.process_time() - started > slowest:
                slowest, worst = time.process_time() - started, f"{kind} {seed}:{number}"
    if slowest > LIMIT_S:
        problems.append(f"{worst}: {slowest:.2f} s of the processor")
    if most_bytes > LIMIT_BYTES:
        problems.append(f"{most_bytes:,} bytes")
    return {
        "count": count,
        "outcomes": dict(outcomes),
        "slowest_s": round(slowest, 3),
        "worst": worst,
        "most_bytes": most_bytes,
        "problems": problems,
        "took_s": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="only this one")
    args = parser.parse_args()
    kinds = (args.kind,) if args.kind else KINDS
    found = fuzz(args.count, seed=args.seed, kinds=kinds)
    for line in found["problems"][:40]:
        print(line, file=sys.stderr)
    print(json.dumps(found | {"problems": len(found["problems"])}))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
