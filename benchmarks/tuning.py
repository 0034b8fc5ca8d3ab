"""Steps of tuning under a memory budget: seconds beside what the link needs for the bytes, and
beside the same programs with the weights on the device already; memory by nvidia-smi.

    python benchmarks/tuning.py FOLDER --device-memory 4GiB --tokens-per-step 4096 --length 512

With `--resident`, in a process of its own with more memory, the weights of one layer are there
already and stand for all layers: nothing crosses the link but what a step keeps, and its adapters.
What a step says means nothing: its text is random. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import time

import common
import jax


class Resident:
    """Sweeps as the executor's, with the weights of one tile of each shape on the device already;
    the first one brings them there."""

    def __init__(self, base):
        self._base, self._arrays = base, {}

    def sweep(self, run, *, n_tiles=None, n_rows=1):
        """As the executor's."""
        if not self._arrays:
            self._base.executor.sweep(self._keeping(run), n_tiles=n_tiles, n_rows=n_rows)
            return
        outputs = []
        for tile in self._base.plan.tiles[:n_tiles]:
            outputs.append(run(tile, self._arrays[tile.signature]))
            if len(outputs) > 4:
                jax.block_until_ready(outputs.pop(0))
        jax.block_until_ready(outputs)

    def _keeping(self, run):
        def keeping(tile, found):
            if tile.signature not in self._arrays:
                self._arrays[tile.signature] = jax.tree.map(lambda array: array + 0, found)
            return run(tile, found)

        return keeping


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--device-memory", default="4GiB")
    parser.add_argument("--host-memory")
    parser.add_argument("--device")
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--chunk-rows", type=int, help="in the place of the plan's choice")
    parser.add_argument("--resident", action="store_true", help="with the weights there already")
    parser.add_argument("--profile")
    args = parser.parse_args()
    result = {"card": common.card(), "options": vars(args)}
    if args.device != "cpu":
        result["raw_link"] = common.summary(common.raw_link_speed())
        common.say(f"raw link {result['raw_link']['median'] / 1e9:.2f} GB/s")
    with common.GpuWatch() as watch:
        import numpy as np

        from jlayer.config import read_config
        from jlayer.run_config import RunConfig
        from jlayer.tuning import planning
        from jlayer.tuning.adapter import AdapterConfig, fresh, low_ranks, targets_of
        from jlayer.tuning.base import Base
        from jlayer.tuning.lanes import Lanes
        from jlayer.tuning.rows import chunks_of
        from jlayer.tuning.settings import Settings

        how = AdapterConfig(rank=args.rank)
        state = fresh(targets_of(read_config(args.folder), how), how, 0)
        run = RunConfig.from_options(
            device_memory=args.device_memory, host_memory=args.host_memory, device=args.device
        )
        settings = Settings(tokens_per_step=args.tokens_per_step, length=args.length)
        if args.chunk_rows:
            planning.CHUNK_ROWS = (args.chunk_rows,)
        base = Base(args.folder, run, settings, low_ranks(state, how), state)
        flats = base.stepper.layout.flat(state)
        result["plan"] = base.plan.as_dict()
        shape = (settings.lanes, args.length)
        ids = np.random.default_rng(0).integers(0, base.cfg.vocab_size, (*shape[:1], shape[1] + 1))
        lanes = Lanes(
            ids=ids[:, :-1].astype(np.int32),
            targets=ids[:, 1:].astype(np.int32),
            weights=np.ones(shape, np.float32),
            positions=np.broadcast_to(np.arange(args.length, dtype=np.int32), shape),
            texts=np.ones(shape, np.int32),
        )
        count = base.plan.order.chunk_lanes
        chunks = list(chunks_of(base.cfg, lanes, count, share=1 / lanes.ids.size))

        def timed(executor, steps):
            seconds, before = [], base.totals.put_bytes
            for _ in range(steps):
                began = time.perf_counter()
                found = base.stepper.run(executor, chunks, flats, following=chunks)
                seconds.append(time.perf_counter() - began)
            loss = float(sum(part.sum() for part in found.losses)) / lanes.ids.size
            return seconds, (base.totals.put_bytes - before) / steps, loss

        executor = Resident(base) if args.resident else base.executor
        first, _, _ = timed(executor, 1)
        if args.profile:
            with jax.profiler.trace(args.profile):
                timed(executor, 1)
        seconds, put, loss = timed(executor, args.steps)
        result |= {"first_s": first[0], "step_s": common.summary(seconds), "put_bytes": put}
        result |= {"loss": loss, "smi_streamed_mib": watch.peak, "visits": len(base.plan.visits)}
        stats = base.devices.first.memory_stats() or {}
        result["allocator_peak_bytes"] = stats.get("peak_bytes_in_use")
        result["temporary_bytes"] = base.programs.temporary_bytes
        step = result["step_s"]["median"]
        words = f"{step:.3f} s a step, {put / 1e9:.2f} GB put"
        if "raw_link" in result:
            result["link_s"] = put / result["raw_link"]["median"]
            words += f", {result['link_s']:.3f} s of the link"
        plan = base.plan
        words += f" ({plan.seconds:.3f} s foreseen)"
        common.say(words + f"; smi {watch.peak} MiB of {plan.as_dict()['device_peak_bytes'] >> 20}")
        common.say(f"{count} lanes a chunk, tiles of {plan.tiling.tile_bytes >> 20} MiB")
        base.close()
    result["smi_peak_mib"], result["smi_before_mib"] = watch.peak, watch.before
    common.last_line(result)


if __name__ == "__main__":
    main()
