"""The device's budget is checked before JAX starts, by what the driver says is free, and not by an
allocation that fails."""

import os
from itertools import pairwise
from types import SimpleNamespace

import jax
import pytest

from jlayer.engine import device
from jlayer.engine.gpu import gpu_memories, gpu_memory
from jlayer.errors import DoesNotFitError, StorageError, UsageError
from jlayer.plan.machine import PLATFORMS
from jlayer.streaming import exchange
from jlayer.streaming.devices import MESH_AXES, ROWS, Devices

GIB = 1 << 30
CONTEXT = PLATFORMS["gpu"].context_bytes
COLLECTIVE = PLATFORMS["gpu"].collective_bytes
CAP = "XLA_PYTHON_CLIENT_MEM_FRACTION"
ASYNC = "PJRT_GPU_ENABLE_ASYNC_DISPATCH"


class Gpu:
    """A device whose allocator was capped by the environment when JAX started."""

    platform = "gpu"
    process_index = 0

    def __init__(self, total):
        self._total = total

    def memory_stats(self):
        return {"bytes_limit": int(float(os.environ[CAP]) * self._total)}


@pytest.fixture
def gpu(monkeypatch):
    """Puts a GPU with so many bytes in the place of what the driver and JAX find."""
    monkeypatch.delenv(CAP, raising=False)
    monkeypatch.delenv(ASYNC, raising=False)

    def put(total, free, *, n=1, is_started=False):
        monkeypatch.setattr(device, "gpu_memories", lambda: [(total, free)] * n)
        monkeypatch.setattr(jax, "devices", lambda *_: [Gpu(total) for _ in range(n)])
        # Private, since these exchange nothing, and since JAX has started in this process, and
        # nothing undoes that.
        monkeypatch.setattr(device, "_meet", lambda *_: None)
        monkeypatch.setattr(device, "_is_started", lambda: is_started)

    return put


def test_the_allocator_gets_what_the_context_leaves(gpu):
    gpu(8 * GIB, 6 * GIB)
    _, budget, context = device.choose("gpu", 4 * GIB)
    assert (budget, context) == (4 * GIB, CONTEXT)
    assert float(os.environ[CAP]) == pytest.approx((4 * GIB - CONTEXT) / (8 * GIB), abs=1e-6)


@pytest.fixture
def two_gpus(gpu, monkeypatch):
    """Chooses two GPUs that can exchange by copies, or cannot -> what `choose` returns."""

    def choose(*, by_copies):
        monkeypatch.setattr(exchange, "missing", lambda: None if by_copies else "install it")
        monkeypatch.setattr(exchange, "begin", lambda *_: by_copies)
        for name in device.NCCL_SETTINGS:
            monkeypatch.delenv(name, raising=False)
        gpu(8 * GIB, 6 * GIB, n=2)
        return device.choose("gpu", 4 * GIB, n_devices=2)

    return choose


def test_copies_between_devices_need_no_memory(two_gpus):
    devices, budget, context = two_gpus(by_copies=True)
    assert (len(devices), budget, context) == (2, 4 * GIB, CONTEXT)
    assert not any(name in os.environ for name in device.NCCL_SETTINGS)
    assert devices.notes == ()


def test_programs_are_launched_in_a_thread_of_their_own_unless_the_environment_says_no(
    gpu, monkeypatch
):
    gpu(8 * GIB, 6 * GIB)
    device.choose("gpu", 4 * GIB)
    assert os.environ[ASYNC] == "1"
    monkeypatch.setenv(ASYNC, "0")
    device.choose("gpu", 4 * GIB)
    assert os.environ[ASYNC] == "0"


def test_what_nccl_takes_is_taken_from_the_allocator_and_kept_small(two_gpus):
    """It takes memory of its own: without room for it 1536 MiB became 2349."""
    devices, budget, context = two_gpus(by_copies=False)
    assert (len(devices), budget, context) == (2, 4 * GIB, CONTEXT + COLLECTIVE)
    assert float(os.environ[CAP]) == pytest.approx((4 * GIB - context) / (8 * GIB), abs=1e-6)
    assert {name: os.environ[name] for name in device.NCCL_SETTINGS} == device.NCCL_SETTINGS
    (note,) = devices.notes
    assert "by NCCL, which takes 450 MiB of each: install it" in note


def test_page_tables_of_pinned_memory_are_taken_from_the_allocator(gpu):
    gpu(8 * GIB, 6 * GIB)
    pinned = GIB // 2
    _, budget, context = device.choose("gpu", 4 * GIB, pinned_bytes=pinned)
    assert (budget, context) == (4 * GIB, CONTEXT + pinned // 512)
    assert float(os.environ[CAP]) == pytest.approx((4 * GIB - context) / (8 * GIB), abs=1e-6)


@pytest.mark.parametrize(("free", "found"), [(6 * GIB, 4 * GIB), (3 * GIB, 3 * GIB)])
def test_without_a_promise_it_is_4_gib_or_what_is_free_if_less(gpu, free, found):
    gpu(8 * GIB, free)
    assert device.choose(None, None)[1] == found


def test_a_busy_device_is_refused_with_what_is_free(gpu):
    gpu(8 * GIB, GIB)
    with pytest.raises(DoesNotFitError, match=f"{GIB} free of {8 * GIB}"):
        device.choose("gpu", 4 * GIB)


def test_less_than_the_drivers_own_context_is_refused(gpu):
    gpu(8 * GIB, 8 * GIB)
    with pytest.raises(DoesNotFitError, match=f"context alone takes {CONTEXT}"):
        device.choose("gpu", GIB // 2)


def test_jax_started_with_a_larger_allocator_breaks_the_promise(gpu, monkeypatch):
    gpu(8 * GIB, 8 * GIB, is_started=True)
    monkeypatch.setenv(CAP, "0.75")
    assert device.choose("gpu", 6 * GIB)[1] == 6 * GIB
    with pytest.raises(UsageError, match=f"an allocator of {6 * GIB} bytes") as caught:
        device.choose("gpu", 4 * GIB)
    assert f"unset {CAP}" in caught.value.command_line


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, []), ("1", ["1"]), ("GPU-7f,0", ["GPU-7f", "0"]), ("", None)]
)
def test_the_driver_is_asked_for_the_gpu_that_jax_will_use(tmp_path, monkeypatch, visible, asked):
    """It was asked for the machine's first one, and another card's memory was compared."""
    program, seen = tmp_path / "nvidia-smi", tmp_path / "seen"
    program.write_text(f'#!/bin/sh\necho "$@" >> {seen}\necho "100, 50"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    memory = gpu_memory()
    if asked is None:
        assert memory is None
        assert not seen.exists()
        return
    assert memory == (100 << 20, 50 << 20)
    assert chosen(seen) == asked[:1]
    seen.unlink()
    assert gpu_memories() == [memory] * max(1, len(asked))
    assert chosen(seen) == asked


def chosen(seen):
    """The GPUs that the driver was asked for by name, in order."""
    words = seen.read_text().split()
    return [name for option, name in pairwise(words) if option == "-i"]


class Card:
    """A device as JAX shows it, or a CPU, which has no compute capability."""

    def __init__(self, capability=None):
        if capability is not None:
            self.compute_capability = capability


HOPPER = Card("9.0")


@pytest.mark.parametrize(
    ("card", "head_dim", "dtype", "cudnn", "has"),
    [
        (HOPPER, 128, "bfloat16", 91900, True),
        (Card("8.0"), 64, "float16", 91100, True),
        (Card("12.0"), 8, "bfloat16", 91100, True),
        (Card("7.5"), 128, "float16", 91900, False),
        (Card("gfx942"), 128, "bfloat16", 91900, False),
        (Card(), 128, "bfloat16", 91900, False),
        (HOPPER, 128, "float32", 91900, False),
        (HOPPER, 256, "bfloat16", 91900, False),
        (HOPPER, 100, "bfloat16", 91900, False),
        (HOPPER, 128, "bfloat16", 90700, False),
        (HOPPER, 128, "bfloat16", None, False),
    ],
)
def test_flash_attention_is_for_16_bits_on_cards_that_have_it(
    monkeypatch, card, head_dim, dtype, cudnn, has
):
    found = cudnn and SimpleNamespace(cudnn_get_version=lambda: cudnn)
    monkeypatch.setattr(jax._src.lib, "cuda_versions", found)
    assert device.has_flash(card, head_dim=head_dim, dtype=dtype) is has


def test_devices_that_do_not_get_what_was_sent_are_refused(monkeypatch):
    """On some boards copies from GPU to GPU arrive damaged: tokens would be wrong."""
    devices = Devices(jax.devices("cpu")[:2])
    device._meet(jax, devices)
    monkeypatch.setattr(devices, "all_gather", lambda x: jax.lax.all_gather(x, MESH_AXES[ROWS]) ^ 1)
    with pytest.raises(StorageError, match="did not arrive as it was; run with one device"):
        device._meet(jax, devices)

    def fails(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: the driver refused to copy\nof no interest")

    monkeypatch.setattr(devices, "all_gather", fails)
    found = r"cannot exchange what each has \(INTERNAL: the driver refused to copy\); run with one"
    with pytest.raises(StorageError, match=found):
        device._meet(jax, devices)
