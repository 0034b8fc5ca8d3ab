"""The host's cores are measured alone and beside a link, which is made up here."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from jlayer import AutoModel
from jlayer.convert import convert_checkpoint
from jlayer.cores.crew import NAME
from jlayer.engine import speeds as engine_speeds
from jlayer.errors import UsageError
from jlayer.measure import cores as measuring
from jlayer.measure.cores import main_form, measure_cores
from jlayer.plan.tiles import Tier
from jlayer.streaming.slots import HostMemory
from tests.conftest import BUNDLED


@pytest.fixture
def link(monkeypatch):
    """A CPU's device has a link; what crosses it is not pinned. -> what moved."""
    moved, real = [], engine_speeds.jax.device_put

    def put(array, device):
        moved.append(array.nbytes)
        return real(array.copy(), device)

    def unpinned(slot_bytes, *, pin):
        return HostMemory(slot_bytes, pin=False)

    linked = {"cpu": replace(engine_speeds.PLATFORMS["cpu"], has_link=True)}
    monkeypatch.setattr(engine_speeds, "PLATFORMS", linked)
    monkeypatch.setattr(engine_speeds, "HostMemory", unpinned)
    monkeypatch.setattr(engine_speeds, "LINK_BYTES", 1 << 20)
    monkeypatch.setattr(engine_speeds, "MATRIX_BYTES", 1 << 20)
    monkeypatch.setattr(engine_speeds.jax, "device_put", put)
    return moved


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cores") / "int4"
    convert_checkpoint(BUNDLED, folder, quantize="int4")
    return folder


def on_a_gpu(plan):
    return replace(plan, machine=replace(plan.machine, platform="gpu"))


def test_the_link_is_busy_only_when_it_is_asked_to(link, int4):
    with AutoModel.from_pretrained(int4, device="cpu", host_share=0.6) as model:
        link.clear()
        cores, devices = model.engine.host.cores, model.engine.devices
        alone = engine_speeds.host_speeds(
            cores, ["int4"], devices, dtype="float32", link_is_busy=False
        )
        assert (alone.link, link) == (None, [])
        beside = engine_speeds.host_speeds(cores, ["int4"], devices, dtype="float32")
        assert beside.link > 0
        assert link


def test_alone_and_beside_the_link(link, int4):
    with AutoModel.from_pretrained(int4, device="cpu", host_share=0.6) as model:
        plan = model.engine.plan
        assert main_form(plan) == "int4"
        found = measure_cores(model.engine, plan)
        assert [form for form, _ in found.alone.forms] == ["int4"]
        assert found.alone.link is None
        assert {form for form, _ in found.beside.forms} == {"int4", "int8"}
        assert found.n_threads == model.engine.host.cores.n_threads
        figures = found.as_dict()
        assert figures["encoding"] == "int4"
        for row, (tokens, speed) in zip(
            figures["speeds"], dict(found.alone.forms)["int4"], strict=True
        ):
            assert (row["tokens"], row["alone_bytes_per_s"]) == (tokens, speed)
            assert row["beside_bytes_per_s"] == dict(dict(found.beside.forms)["int4"])[tokens]
            both = row["beside_bytes_per_s"] + row["link_bytes_per_s"]
            assert row["together_bytes_per_s"] == both


def test_the_speed_with_4_bits_is_measured_for_a_plain_model_too(link, tiny):
    with AutoModel.from_pretrained(tiny, device="cpu", host_share=0.6) as model:
        found = measure_cores(model.engine, model.engine.plan)
    assert [form for form, _ in found.beside.forms] == ["float32", "int4"]
    assert [form for form, _ in found.alone.forms] == ["float32"]


def test_cores_that_the_user_left_alone_are_measured_where_they_could_help(link, tiny, monkeypatch):
    before, made, make = set(threading.enumerate()), [], measuring.cores_beside
    monkeypatch.setattr(measuring, "cores_beside", lambda on: made.append(make(on)) or made[-1])
    with AutoModel.from_pretrained(tiny, device="cpu") as model:  # too small to be measured
        assert measure_cores(model.engine, on_a_gpu(model.engine.plan)) is None
    with AutoModel.from_pretrained(tiny, device="cpu", host_share=0) as model:
        engine, plan = model.engine, model.engine.plan
        assert measure_cores(engine, plan) is None  # no link, so that no share would help
        kept = replace(on_a_gpu(plan), tiers=(Tier.DEVICE,) * len(plan.tiers))
        assert measure_cores(engine, kept) is None  # nothing passes
        assert not made
        assert measure_cores(engine, on_a_gpu(plan)).beside.link > 0
        assert engine.host is None
        with pytest.raises(UsageError):
            made.pop().multiply([], np.ones((1, 8), np.float32))  # it was closed
        monkeypatch.setattr(measuring, "missing", lambda: "llvmlite is not installed")
        assert measure_cores(engine, on_a_gpu(plan)) is None
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not {NAME, "jlayer-link"} & left
