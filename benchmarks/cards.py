"""Several cards beside one: seconds of a forward pass over one, over two, ..., and what the links
bring, in turns.

    python benchmarks/cards.py FOLDER --devices 1,2 --device-memory 1536MiB --tokens 1,64,512
    python benchmarks/cards.py FOLDER --devices 1,2 --host-share auto

Each number of cards is run by `sweep.py` in a process of its own, and all take turns, pass by pass:
what others do with the host's memory meets them alike. Without a core of the host beside them
(`--host-share 0`, as it is here unless told), the links do all the work, and n cards are n links.
Memory is that of the fullest card by nvidia-smi, once the process has passed through the model and
waits for its turn, without what others hold there. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import common
from sweep import TURN


class Cards:
    """`sweep.py` over some cards, in a process that waits for its turns."""

    def __init__(self, args, n_devices: int, n_tokens: int):
        script, held = Path(__file__).with_name("sweep.py"), common.used_mib()
        words = [sys.executable, str(script), args.folder, "--no-raw", "--tokens", str(n_tokens)]
        words += ["--sweeps", str(args.turns), "--devices", str(n_devices), "--in-turn"]
        words += ["--host-share", args.host_share, "--context", str(max(64, n_tokens))]
        for option in ("device", "device_memory", "host_memory"):
            if getattr(args, option):
                words += [f"--{option.replace('_', '-')}", getattr(args, option)]
        faults = os.environ | {"PYTHONFAULTHANDLER": "1"}  # a crash says where
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._child = subprocess.Popen(words, env=faults, **pipes)
        self._said: list[str] = []
        self._wait()
        self.n_devices, self.smi_mib = n_devices, common.used_mib() - held

    def take_turn(self):
        """Has it pass through the model once, and waits for that."""
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        self._wait()

    def found(self) -> dict:
        """What it found; it has ended."""
        if self._child.wait():
            raise SystemExit(f"sweep.py over {self.n_devices} ended with {self._child.returncode}")
        for line in self._said[:-1]:
            common.say(f"  {line}")
        row = json.loads(self._said[-1])["sweeps"][0]
        return {**row, "devices": self.n_devices, "smi_mib": self.smi_mib}

    def _wait(self):
        for line in self._child.stdout:
            if line.strip() == TURN:
                return
            self._said.append(line.strip())


def in_turns(args, numbers: list[int], n_tokens: int) -> list[dict]:
    """What each number of cards takes, and how many times as fast as the first it is: turn by
    turn."""
    of_all = [Cards(args, n, n_tokens) for n in numbers]
    for _ in range(args.turns):
        for cards in of_all:
            cards.take_turn()
    rows = [cards.found() for cards in of_all]
    for row in rows:
        pairs = zip(rows[0]["seconds"], row["seconds"], strict=True)
        row["times_as_fast"] = common.summary([first / own for first, own in pairs])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--devices", default="1,2", help="numbers of cards, the smallest first")
    parser.add_argument("--device")
    parser.add_argument("--device-memory")
    parser.add_argument("--host-memory")
    parser.add_argument("--host-share", default="0")
    parser.add_argument("--tokens", default="1,64,512")
    parser.add_argument("--turns", type=int, default=12)
    args = parser.parse_args()
    numbers, sizes = ([int(n) for n in words.split(",")] for words in (args.devices, args.tokens))
    result = {"card": common.card(), "options": {**vars(args), "folder": None}, "rows": []}
    for n_tokens in sizes:
        for row in in_turns(args, numbers, n_tokens):
            result["rows"].append(row)
            times, seconds = row["times_as_fast"], row["sweep_s"]
            common.say(
                f"{n_tokens:5} tokens, {row['devices']} cards: {seconds['median']:.3f} s "
                f"({seconds['min']:.3f}-{seconds['max']:.3f}), {times['median']:.3f} times as fast "
                f"as {numbers[0]} ({times['min']:.3f}-{times['max']:.3f}); "
                f"{row['put_bytes_per_s'] / 1e9:.1f} GB/s; {row['smi_mib']} MiB"
            )
    common.last_line(result)


if __name__ == "__main__":
    main()
