"""The machine that a plan is made for: budgets and speeds, and what was measured of its kinds."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes/s where nothing was measured or given: a PCIe 4 x16 link, an NVMe disk.
DEFAULT_LINK = 25e9
DEFAULT_DISK = 2e9
# How fast a CPU multiplies plain bfloat16 weights in memory: each core, and all that memory gives
# (2 cores: 14 GB/s; 16 cores beside eight channels: 113 to 136 GB/s).
CPU_CORE = 7e9
CPU_MOST = 120e9
# How many weights a second a CPU multiplies that are decoded first. XLA runs that on one core,
# however many there are (70B shape on 16 cores: int8 2.3e9, int4 2.5e9).
CPU_DECODED_WEIGHTS = 2.3e9
# How fast a GPU's programs go through bfloat16 weights that are there, for up to 512 tokens (H200).
# Weights that are decoded first take as long as if each had DECODED_BYTES.
GPU_ARITHMETIC = 1e12
DECODED_BYTES = 4

# Tiles on the device at a time, and host slots beyond them that are being read meanwhile.
AHEAD = {"gpu": 4, "cpu": 2}
READING = 2
# What each tile costs beside its bytes, in Python and the driver: a turn of its own, one more for
# each array that crosses the link, and for each program that each chunk of tokens goes through; a
# gap on the link (5% of the time of 32 MiB), a gap on the disk. H200: 0.29 to 0.44 ms for a tile of
# a matrix or two, from one machine to the next. Bytes do not vary so; a plan is therefore chosen as
# if steps took STEPS_VARY times as long.
STEP_S = {"gpu": 220e-6, "cpu": 80e-6}
ARRAY_S = {"gpu": 60e-6, "cpu": 0.0}
PROGRAM_S = {"gpu": 50e-6, "cpu": 0.0}
STEPS_VARY = {"gpu": 1.5, "cpu": 1.0}
LINK_GAP_S = 30e-6
DISK_GAP_S = 200e-6

# The driver's context and libraries beside the allocator, until measured (0.62 GiB on an H200).
CONTEXT_BYTES = {"gpu": 640 << 20, "cpu": 0}
# What XLA's libraries hold in the allocator all the time (140 MB measured on an H200), the
# workspace of a matrix product (40 MB), and what is lost between blocks of different sizes.
LIBRARY_BYTES = {"gpu": 256 << 20, "cpu": 0}
# Anonymous memory of the process with JAX started and a model opened, where it was not measured (a
# plan made from a config alone), and what compiling a run's programs adds to it.
BASELINE_BYTES = {"cpu": 76 << 20, "gpu": 270 << 20}
COMPILER_BYTES = {"cpu": 128 << 20, "gpu": 384 << 20}


@dataclass(frozen=True)
class Machine:
    """What a plan is made for. `platform`: "cpu" or "gpu"; budgets in bytes, speeds in bytes a
    second. On a CPU `link_speed` is that of multiplying plain weights where they lie."""

    platform: str
    device_budget: int
    host_budget: int
    context_bytes: int
    disk_speed: float = DEFAULT_DISK
    link_speed: float | None = None
    baseline_bytes: int | None = None
    cores: int = 2

    @property
    def runtime_bytes(self) -> int:
        """What the process holds beside what is counted one by one."""
        baseline = self.baseline_bytes or BASELINE_BYTES[self.platform]
        return baseline + COMPILER_BYTES[self.platform]

    @property
    def bytes_per_s(self) -> float:
        """How fast plain weights come from the host to where they are multiplied."""
        if self.link_speed:
            return self.link_speed
        return DEFAULT_LINK if self.platform == "gpu" else min(CPU_CORE * self.cores, CPU_MOST)
