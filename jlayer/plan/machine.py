"""The machine of a plan: its budgets and speeds, and figures measured on CPUs and GPUs."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes/s if nothing was measured or given: a PCIe 4 x16 link, an NVMe disk.
DEFAULT_LINK = 25e9
DEFAULT_DISK = 2e9
# Bytes/s at which a CPU multiplies plain bfloat16 weights in memory: per core, and the limit of the
# memory (2 cores: 14 GB/s; 16 cores with eight channels: 113 to 136 GB/s).
CPU_CORE = 7e9
CPU_MOST = 120e9
# How many weights a second a CPU multiplies that are decoded first. XLA runs that on one core,
# however many there are (70B shape on 16 cores: int8 2.3e9, int4 2.5e9).
CPU_DECODED_WEIGHTS = 2.3e9
# How fast a GPU's programs go through bfloat16 weights that are there, for up to 512 tokens (H200).
# Weights that are decoded first take as long as if each had DECODED_BYTES.
GPU_ARITHMETIC = 1e12
DECODED_BYTES = 4

# Tiles on the device at a time, and further host slots for the reads in progress.
AHEAD = {"gpu": 4, "cpu": 2}
READING = 2
# Time of a tile besides its bytes, in Python and the driver: STEP_S per tile, ARRAY_S per array
# that crosses the link, PROGRAM_S per program and chunk of tokens; LINK_GAP_S between two transfers
# (5% of the time of 32 MiB), DISK_GAP_S between two reads. On H200s a tile of one or two matrices
# takes 0.29 to 0.44 ms, depending on the machine. The speed of bytes varies less. So plans are
# chosen as if steps took STEPS_VARY times as long.
STEP_S = {"gpu": 220e-6, "cpu": 80e-6}
ARRAY_S = {"gpu": 60e-6, "cpu": 0.0}
PROGRAM_S = {"gpu": 50e-6, "cpu": 0.0}
STEPS_VARY = {"gpu": 1.5, "cpu": 1.0}
LINK_GAP_S = 30e-6
DISK_GAP_S = 200e-6

# Device memory of the driver's context and libraries, outside the allocator, until measured
# (0.62 GiB on an H200).
CONTEXT_BYTES = {"gpu": 640 << 20, "cpu": 0}
# Device memory inside the allocator for XLA's libraries (140 MB measured on an H200), the workspace
# of a matrix product (40 MB), and fragmentation.
LIBRARY_BYTES = {"gpu": 256 << 20, "cpu": 0}
# BASELINE_BYTES: anonymous memory of the process with JAX started and a model opened, if not
# measured (a plan from a config alone). COMPILER_BYTES: what compiling a run's programs adds.
BASELINE_BYTES = {"cpu": 76 << 20, "gpu": 270 << 20}
COMPILER_BYTES = {"cpu": 128 << 20, "gpu": 384 << 20}


@dataclass(frozen=True)
class Machine:
    """The machine of a plan. `platform`: "cpu" or "gpu"; budgets in bytes, speeds in bytes/s.

    On a CPU `link_speed` is the speed of multiplying plain weights in memory.
    """

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
        """Host memory of the process itself, besides what the plan counts one by one."""
        baseline = self.baseline_bytes or BASELINE_BYTES[self.platform]
        return baseline + COMPILER_BYTES[self.platform]

    @property
    def bytes_per_s(self) -> float:
        """Bytes/s of plain weights: over the link on a GPU; on a CPU, of multiplying them."""
        if self.link_speed:
            return self.link_speed
        return DEFAULT_LINK if self.platform == "gpu" else min(CPU_CORE * self.cores, CPU_MOST)
