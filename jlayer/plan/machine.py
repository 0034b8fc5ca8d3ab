"""The machine of a plan: its budgets and speeds, and figures measured on CPUs and GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

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

# A GPU's own page tables for pinned host memory take one byte for so many: 8 for each page of 4 KiB
# (measured: 68 MiB for 36 GB).
PINNED_PAGE_TABLES = 512
# Pools in host memory take at most so many times the device budget: room for their page tables is
# kept from the start (2% of the budget), since the allocator's limit is set before any run.
CACHE_PINNED = 11

# Host slots beyond the tiles that are on the device, for the reads in progress.
READING = 2
# Time between two transfers over the link (5% of the time of 32 MiB), and between two reads.
LINK_GAP_S = 30e-6
DISK_GAP_S = 200e-6


@dataclass(frozen=True)
class Platform:
    """A kind of device: what was measured of it, and what follows for a plan.

    `has_link`: weights cross a link into a memory of the device's own; without one they are
    multiplied in host memory. `joins`: quantized tiles cross as one array. `ahead`: tiles on the
    device at a time.

    Time of a tile besides its bytes, in Python and the driver: `step_s` for the tile, `array_s` for
    each array that crosses the link, `program_s` for each program and chunk of tokens. It varies
    more than the speed of bytes does, so plans are chosen as if it were `steps_vary` times as long.

    Device memory: `context_bytes` of the driver's context and libraries outside the allocator,
    until measured; `collective_bytes` more of them where several exchange their products by NCCL;
    `library_bytes` inside it, for XLA's libraries, the workspace of a product, and fragmentation,
    and `shared_bytes` more beside NCCL. Host memory: `baseline_bytes` of the process with
    JAX started and a model opened, if not measured (a plan from a config alone); `compiler_bytes`
    for compiling a run's programs.
    """

    has_link: bool
    joins: bool
    ahead: int
    step_s: float
    array_s: float
    program_s: float
    steps_vary: float
    context_bytes: int
    collective_bytes: int
    library_bytes: int
    shared_bytes: int
    baseline_bytes: int
    compiler_bytes: int

    def context_of(self, *, collectives: bool) -> int:
        """`context_bytes` on each device. `collectives`: whether NCCL is used."""
        return self.context_bytes + (self.collective_bytes if collectives else 0)

    def libraries_of(self, *, collectives: bool) -> int:
        """`library_bytes` on each device."""
        return self.library_bytes + (self.shared_bytes if collectives else 0)


PLATFORMS = {
    "gpu": Platform(
        has_link=True,
        joins=True,
        ahead=4,
        step_s=220e-6,  # an H200 takes 0.29 to 0.44 ms for a tile of one or two matrices
        array_s=60e-6,
        program_s=50e-6,
        steps_vary=1.5,
        context_bytes=640 << 20,  # 0.62 GiB on an H200
        collective_bytes=496 << 20,  # NCCL: 404 MiB of programs, 48 of buffers (two H100s)
        library_bytes=256 << 20,  # libraries 140 MB, workspace 40 MB on an H200
        shared_bytes=128 << 20,  # without it, 14 bfloat16 layers in 1536 MiB each ran out of memory
        baseline_bytes=270 << 20,
        compiler_bytes=384 << 20,
    ),
    "cpu": Platform(
        has_link=False,
        joins=False,
        ahead=2,
        step_s=80e-6,
        array_s=0.0,
        program_s=0.0,
        steps_vary=1.0,
        context_bytes=0,
        collective_bytes=0,
        library_bytes=0,
        shared_bytes=0,
        baseline_bytes=76 << 20,
        compiler_bytes=128 << 20,
    ),
}


# Bytes/s at which a core multiplies weights where they lie, by encoding; many columns take longer.
# The memory's limit is CPU_MOST.
CORE_SPEEDS = {"int4": 5e9, "int8": 8e9, "bfloat16": 9e9, "float16": 9e9, "float32": 10e9}
# What one core takes for what an adapter adds, beside products of the host: numbers of A and B a
# second, which are read and made float32, and multiplications and additions (ranks of 16 and 64, 1
# to 128 columns, AVX-512: 0.5e9 to 2.8e9, 4e9 to 42e9; the fewer columns, the fewer).
CORE_LOW_RANK_NUMBERS, CORE_LOW_RANK_OPERATIONS = 1.5e9, 1.5e10
COLUMNS_OF_CORES = ((1, 1.0), (16, 0.5), (64, 0.125))


def platform_of(jax_platform: str) -> str:
    """The name among PLATFORMS of what JAX calls a device's platform."""
    return "cpu" if jax_platform == "cpu" else "gpu"


@dataclass(frozen=True)
class HostSpeeds:
    """How fast the host's cores multiply weights where they lie, as measured.

    `forms`: (encoding, ((columns, bytes/s), ...) from few to many columns). `link`: bytes/s of the
    link meanwhile; None where there is none.
    """

    forms: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]
    link: float | None = None

    def seconds_a_byte(self, form: str, columns: int) -> float:
        """Between two measured numbers of columns on a line; beyond the last in proportion."""
        points = dict(self.forms)[form]
        for (few, fast), (many, slow) in pairwise(points):
            if few <= columns <= many:
                share = (columns - few) / (many - few)
                return (1 - share) / fast + share / slow
        most, speed = points[-1] if columns > points[-1][0] else points[0]
        return max(1, columns / most) / speed


@dataclass(frozen=True)
class Machine:
    """The machine of a plan. `platform`: one of PLATFORMS; budgets in bytes, speeds in bytes/s.

    `n_devices`: alike, with the device budget each; `link_speed`: of all of their links. On a CPU
    it is the speed of multiplying plain weights in memory. `host`: the speeds of the host's own
    cores, where they were measured. `collectives`: whether GPUs exchange their products by NCCL,
    and not by the driver's copies. With several hosts this is `host_number` of `n_hosts` alike: a
    plan is of what one of them reads and holds.
    """

    platform: str
    device_budget: int
    host_budget: int
    context_bytes: int
    disk_speed: float = DEFAULT_DISK
    link_speed: float | None = None
    baseline_bytes: int | None = None
    cores: int = 2
    host: HostSpeeds | None = None
    n_devices: int = 1
    n_hosts: int = 1
    host_number: int = 0
    collectives: bool = False

    @property
    def kind(self) -> Platform:
        return PLATFORMS[self.platform]

    @property
    def all_devices(self) -> int:
        """Those of all hosts."""
        return self.n_devices * self.n_hosts

    @property
    def runtime_bytes(self) -> int:
        """Host memory of the process itself, besides what the plan counts one by one."""
        return (self.baseline_bytes or self.kind.baseline_bytes) + self.kind.compiler_bytes

    def holding(self, n_bytes: int) -> Machine:
        """The machine, where the process holds so many bytes of host memory more."""
        held = self.runtime_bytes - self.kind.compiler_bytes + n_bytes
        return replace(self, baseline_bytes=held)

    @property
    def bytes_per_s(self) -> float:
        """Bytes/s of plain weights: over the link on a GPU; on a CPU, of multiplying them."""
        if self.link_speed:
            return self.link_speed
        links = DEFAULT_LINK * self.n_devices
        return links if self.kind.has_link else min(CPU_CORE * self.cores, CPU_MOST)


def expected_speeds(machine: Machine) -> HostSpeeds:
    """The speeds of the host's cores by their number, for plans where nothing is measured."""
    most = min(CPU_MOST, machine.cores * CPU_CORE * 1.25)
    forms = tuple(
        (
            form,
            tuple(
                (columns, min(most, machine.cores * speed * part))
                for columns, part in COLUMNS_OF_CORES
            ),
        )
        for form, speed in CORE_SPEEDS.items()
    )
    return HostSpeeds(forms, machine.bytes_per_s if machine.kind.has_link else None)
