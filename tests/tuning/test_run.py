"""A run of tuning from its first step to OUT: what it ends with is the same in whatever parts it is
done, and its steps are those of torch and Transformers."""

import contextlib
import errno
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from jlayer.config import read_config
from jlayer.durable import LOCK
from jlayer.engine import alike
from jlayer.errors import (
    CheckpointError,
    DoesNotFitError,
    LockedError,
    StorageError,
    UsageError,
)
from jlayer.plan.need import total
from jlayer.run_config import RunConfig
from jlayer.sizes import human
from jlayer.tuning import base, planning
from jlayer.tuning.adapter import AdapterConfig, fresh, targets_of
from jlayer.tuning.disk import MADE, UNFINISHED, WORK, WorkFolder
from jlayer.tuning.examples import Example
from jlayer.tuning.lanes import cut
from jlayer.tuning.optimizer import AdamW, Moments, clip_factor, length_of, rates_of
from jlayer.tuning.run import Tuning, Work, check_same
from jlayer.tuning.settings import Settings
from tests.reference import dense_forms
from tests.tuning.states import assert_equal_states

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RUN = RunConfig(device="cpu", device_memory=1 << 30, host_memory=4 << 30, dtype="float32")
HOW = AdapterConfig(rank=2, alpha=4, targets=("q_proj", "down_proj"))
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def texts(seed, n=12):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(4, 20, n)
    return [Example.of(draw.integers(3, 133, size)) for size in sizes.tolist()]


@pytest.fixture
def work(tiny, tmp_path):
    """Call it with the name of OUT, settings and facts."""
    cfg = read_config(tiny)

    def make(out="out", facts=None, held_out=True, **more):
        more = {"steps": 5, "dropout": 0.1, "eval_every": 2, "save_every": 0, **more}
        settings = Settings(learning_rate=0.02, tokens_per_step=32, length=16, **more)
        return Work(
            folder=os.fspath(tiny),
            out=os.fspath(tmp_path / out),
            run=RUN,
            settings=settings,
            how=HOW,
            begun=fresh(targets_of(cfg, HOW), HOW, settings.seed),
            examples=cut(texts(0), settings.length),
            held_out=cut(texts(1, 3), settings.length) if held_out else (),
            facts=facts or {},
        )

    return make


class Stopped(BaseException):
    """In the place of a signal, or of a kill."""


def stop_at(n):
    """A safe point at which the nth call ends the run."""

    def check():
        nonlocal n
        n -= 1
        if not n:
            raise Stopped

    return check


def go(work, check=lambda: None, *, n_steps=None):
    """Takes steps, at most `n_steps`, and ends the run where none is left. (what is told, the
    state)"""
    tuning, told = Tuning(work), []
    try:
        try:
            for step in tuning.go_on(check):
                told.append(step)
                if len(told) == n_steps:
                    raise Stopped
            tuning.finish("a card", base="base", lead="model.")
        except Stopped:
            tuning.save()
        return told, tuning.state
    finally:
        tuning.close()


def files(folder):
    assert sorted(os.listdir(folder)) == FILES
    assert not os.path.lexists(f"{folder}{WORK}")
    return {name: (folder / name).read_bytes() for name in FILES}


def same(told):
    """What is told of steps, without what hangs on the machine."""
    return [replace(one, seconds=0, put_bytes=0) for one in told]


def test_two_steps_and_three_are_five(work, tmp_path):
    told, state = go(work("whole"))
    assert [one.step for one in told] == [1, 2, 3, 4, 5]
    assert [one.perplexity is None for one in told] == [True, False, True, False, False]
    first, _ = go(work(), n_steps=2)
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path / f"out{WORK}") == ["2"]
    # These may be others than at first.
    rest, found = go(work(save_every=1, eval_every=2))
    assert same(first + rest) == same(told)
    assert_equal_states(found, state)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.fixture
def less(work, monkeypatch):
    """(a run with less memory, for which a new plan cuts a step into other chunks; how many bytes
    of the device the first plan needs)"""
    monkeypatch.setattr(planning, "CHUNK_ROWS", (32, 16))
    tuning = Tuning(work("asked"))
    n_bytes, chunk = total(tuning.base.plan.device), tuning.base.plan.order.chunk_lanes
    tuning.close()
    small = replace(RUN, device_memory=n_bytes - 1)
    tuning = Tuning(replace(work("asked"), run=small))
    assert tuning.base.plan.order.chunk_lanes < chunk
    tuning.close()
    return small, n_bytes


def test_a_run_goes_on_with_its_plan_whatever_memory_is_free(work, less, tmp_path):
    """Of other chunks dropout would be another, and sums be in another order."""
    small, _ = less
    few = {"held_out": False, "steps": 2}
    go(replace(work("whole", **few), run=small))
    go(work("of more", **few))
    go(replace(work(**few), run=small), n_steps=1)
    go(work(**few))
    expected = files(tmp_path / "whole")
    assert files(tmp_path / "out") == expected != files(tmp_path / "of more")


def test_a_plan_that_does_not_fit_any_more_is_one_line(work, less, tmp_path):
    small, n_bytes = less
    go(work(), n_steps=2)
    with pytest.raises(DoesNotFitError) as error:
        Tuning(replace(work(), run=small))
    start = f"{tmp_path}/out{WORK}: goes on with the plan that it was begun with; tuning needs "
    assert str(error.value).startswith(f"{start}{human(n_bytes)} of device memory, of which ")
    end = "give it --device-memory, or remove the folder to begin anew with another plan"
    assert str(error.value).endswith(end)
    assert [one.step for one in go(work())[0]] == [3, 4, 5]


def test_a_run_goes_on_on_the_kind_of_device_that_it_was_begun_on(work, monkeypatch):
    go(work(), n_steps=1)
    real = alike.measured_machine
    there = lambda *given, **more: replace(real(*given, **more), platform="gpu")  # noqa: E731
    monkeypatch.setattr(base, "measured_machine", there)
    with pytest.raises(UsageError, match="was begun with --device cpu, not gpu; give what it was"):
        Tuning(work())


def test_a_loss_that_is_not_finite_ends_it_and_the_last_checkpoint_stands(work, tmp_path):
    whole = work(held_out=False, steps=2, save_every=1)
    go(whole, n_steps=1)
    tuning = Tuning(whole)
    for pair in tuning.state.values():  # views of what it goes on with
        pair["a"][:], pair["b"][:] = 1e30, 1e30
    with contextlib.closing(tuning), pytest.raises(CheckpointError, match="step 2: the loss or"):
        list(tuning.go_on())
    assert os.listdir(tmp_path / f"out{WORK}") == ["1"]
    measured = work("measured", steps=1)
    begun = {
        name: {part: a + 1e30 for part, a in pair.items()} for name, pair in measured.begun.items()
    }
    with pytest.raises(CheckpointError, match="the held-out text after step 0 has nan nats"):
        go(replace(measured, begun=begun))


def test_stopped_at_any_safe_point_nothing_is_lost(work, tmp_path):
    """Also between a step and the perplexity after it."""
    n_calls = 0

    def count():
        nonlocal n_calls
        n_calls += 1

    told, _ = go(work("whole"), count)
    assert n_calls > 40
    for n in range(3, n_calls, n_calls // 7):
        found = go(work(f"out {n}"), stop_at(n))[0]
        found += go(work(f"out {n}"))[0]
        assert same(found) == same(told), n
        assert files(tmp_path / f"out {n}") == files(tmp_path / "whole")


CHANGES = ("rename", "rmdir", "unlink", "mkdir", "fsync")


def killed_at(n, monkeypatch):
    """From the nth change to the disk on, none is made: as of a process that was killed there."""

    def counted(real):
        def change(*words, **more):
            nonlocal n
            n -= 1
            if n <= 0:
                raise Stopped
            return real(*words, **more)

        return change

    for name in CHANGES:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return lambda: n


def ended(work, n, monkeypatch):
    """Ends a run whose steps are taken already; killed at its nth change to the disk. Whether that
    many were made."""
    place = WorkFolder(work.out)
    with place:
        tuning = Tuning(work, place=place)
        assert tuning.step == tuning.n_steps
        with monkeypatch.context() as patch:
            left = killed_at(n, patch)
            with contextlib.suppress(Stopped):
                tuning.finish("a card", base="base", lead="model.")
            is_over = left() > 0
        tuning.close()
        with monkeypatch.context() as patch:  # the system gives a lock back, and no more
            for name in CHANGES:
                patch.setattr(os, name, lambda *_, **__: None)
            place.__exit__(None, None, None)
    return is_over


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_killed_at_any_change_to_the_disk_at_the_end(work, tmp_path, monkeypatch, every):
    work = work(held_out=False, steps=1, dropout=0.0)
    out, n = tmp_path / "out", 1
    go(replace(work, out=str(tmp_path / "whole")))
    expected = files(tmp_path / "whole")
    tuning = Tuning(work)
    list(tuning.go_on())
    tuning.close()
    shutil.copytree(f"{out}{WORK}", tmp_path / "kept")
    states = set()
    while not ended(work, n, monkeypatch):
        is_work = os.path.isdir(f"{out}{WORK}")
        states.add((out.exists(), is_work))
        if is_work:
            go(work)
        else:  # complete, but for what is aside
            shutil.rmtree(f"{out}{WORK}{UNFINISHED}", ignore_errors=True)
        assert files(out) == expected
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", f"{out}{WORK}")
        n += every
    assert states == {(False, True), (True, True), (True, False)}
    assert files(out) == expected
    assert n > 10


def test_texts_share_no_lane_where_a_model_keeps_a_state(work, tmp_path):
    dense_forms.save(tmp_path / "model", "qwen3_next")
    folder = os.fspath(tmp_path / "model")
    with pytest.raises(UsageError, match=r"give each a lane of its own \(--padded\)"):
        Tuning(replace(work(), folder=folder))
    assert not os.path.lexists(tmp_path / f"out{WORK}")


def test_an_out_of_another_is_never_replaced(work, tmp_path):
    out = tmp_path / "out"
    go(work(), n_steps=2)
    out.mkdir()
    (out / "own").write_text("of the user")
    with pytest.raises(UsageError, match=r"is there already, and is not of the run in .*move it"):
        Tuning(work())
    out.rename(tmp_path / "away")
    # Or at the last moment.
    tuning = Tuning(work())
    list(tuning.go_on())
    shutil.copytree(tmp_path / "away", out)
    with pytest.raises(UsageError, match=r"is there already, and is not of the run in .*move it"):
        tuning.finish("a card", base="base", lead="model.")
    tuning.close()
    assert os.listdir(out) == ["own"]
    shutil.rmtree(out)
    go(work())
    assert len(files(out)) == 3


def test_a_full_disk_at_the_end_keeps_all_steps(work, tmp_path, monkeypatch):
    tuning = Tuning(work(held_out=False))
    list(tuning.go_on())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(StorageError) as found:
                tuning.finish("a card", base="base", lead="model.")
        assert str(found.value) == (
            f"{tmp_path}/out{WORK}/{MADE}: cannot be written (No space left on device); free some "
            "space; all steps are kept, and the same command ends the run"
        )
        assert not (tmp_path / "out").exists()
    tuning.close()
    assert go(work(held_out=False))[0] == []
    files(tmp_path / "out")


def test_a_folder_is_of_one_run_at_a_time(tmp_path):
    out = str(tmp_path / "more" / "out")
    with WorkFolder(out) as place:
        assert os.listdir(place.path) == [LOCK]
        with pytest.raises(LockedError) as error, WorkFolder(out):
            pass
        assert str(error.value).startswith(
            f"{out}{WORK}: another run is at work on it (process {os.getpid()} on "
        )
        assert os.listdir(place.path) == [LOCK]
    assert os.listdir(tmp_path) == []  # nothing was saved in it
    with WorkFolder(out):
        pass


def test_a_lock_that_was_just_given_back_is_taken_anew(tmp_path, monkeypatch):
    """It is opened before its holder removes it, and locked after that."""
    import fcntl

    out, real = str(tmp_path / "out"), fcntl.flock

    def flock(fd, how):
        monkeypatch.setattr(fcntl, "flock", real)
        os.unlink(f"{out}{WORK}/{LOCK}")
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with WorkFolder(out), pytest.raises(LockedError), WorkFolder(out):
        pass


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    told = []
    with WorkFolder(str(tmp_path / "out"), note=told.append):
        assert "its file system has no locks (No locks available)" in told[0]


def test_what_was_begun_otherwise_is_told_by_its_name():
    there = {"jlayer": "0.1", "DATA": "a" * 64, "--layers": [0, 1], "--rank": 2, "--held-out": None}
    check_same(there, dict(there), where="there")

    def told(**here):
        with pytest.raises(UsageError) as error:
            check_same(there, there | here, where="there")
        return str(error.value)

    end = "give what it was begun with, or remove the folder to begin anew"
    assert told(jlayer="0.2") == f"there: was begun with jlayer 0.1, not 0.2; {end}"
    assert told(DATA="b" * 64) == f"there: was begun with another DATA; {end}"
    assert told(**{"--held-out": "b" * 64}) == f"there: was begun without --held-out; {end}"
    assert told(**{"--layers": [2], "--rank": 3}) == (
        f"there: was begun with --layers 0,1, not 2, and with --rank 2, not 3; {end}"
    )


def test_a_run_that_was_begun_by_another_version_or_otherwise(work):
    go(work(facts={"jlayer": "0.1"}), n_steps=1)
    with pytest.raises(UsageError, match=r"out.tuning: was begun with jlayer 0.1, not 0.2; give"):
        Tuning(work(facts={"jlayer": "0.2"}))
    assert [one.step for one in go(work(facts={"jlayer": "0.1"}))[0]] == [2, 3, 4, 5]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("n_steps", "warmup"), [(40, 0.1), (40, 0.0), (7, 0.5), (1, 0.0), (3, 1)])
def test_rates_are_those_of_transformers(schedule, n_steps, warmup):
    settings = Settings(learning_rate=3e-4, schedule=schedule, warmup=warmup)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    own = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    there = transformers.get_scheduler(
        name, own, num_warmup_steps=math.ceil(warmup * n_steps), num_training_steps=n_steps
    )
    rate_at = rates_of(settings, n_steps)
    for step in range(n_steps):
        expected = there.get_last_lr()[0]  # in float64; here in float32
        np.testing.assert_allclose(rate_at(step), expected, rtol=1e-6, atol=3e-4 * 1e-7)
        own.step()
        there.step()


def test_a_run_of_one_step_learns_something():
    """With transformers' schedule its rate would be 0, as that of every first step."""
    assert rates_of(Settings(learning_rate=3e-4, warmup=0.03), 1)(0) == pytest.approx(3e-4)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_torch_s_adamw(weight_decay):
    """Of random gradients, of which some are longer than the clip, with a rate of each step."""
    import jax

    settings = Settings(weight_decay=weight_decay, beta1=0.8, beta2=0.95, epsilon=1e-6, clip=9.0)
    draw = np.random.default_rng(0)
    here = {layer: draw.standard_normal(n, np.float32) for layer, n in ((0, 37), (2, 64))}
    there = {layer: torch.tensor(one.copy(), requires_grad=True) for layer, one in here.items()}
    betas = (settings.beta1, settings.beta2)
    other = torch.optim.AdamW(there.values(), betas=betas, eps=1e-6, weight_decay=weight_decay)
    adam, moments = AdamW(settings, jax.device_put), Moments.of(here)
    factors = []
    for step in range(30):
        rate = 1e-2 / (step + 1)
        gradients = {n: draw.standard_normal(len(one), np.float32) for n, one in here.items()}
        length = length_of(gradients)
        factors.append(clip_factor(length, settings.clip))
        here, moments = adam.step(here, gradients, moments, rate=rate, factor=factors[-1])
        for layer, one in there.items():
            one.grad = torch.tensor(gradients[layer])
        found = torch.nn.utils.clip_grad_norm_(there.values(), settings.clip)
        np.testing.assert_allclose(length, float(found), rtol=1e-6)
        other.param_groups[0]["lr"] = rate
        other.step()
    assert min(factors) < 1 == max(factors)
    assert moments.count == 30
    for layer, one in there.items():
        expected = one.detach().numpy()
        # Of each number; those near 0 came there from others that were larger.
        np.testing.assert_allclose(here[layer], expected, rtol=1e-6, atol=1e-6)
        distance = np.linalg.norm(here[layer] - expected) / np.linalg.norm(expected)
        assert distance < 1e-6


def test_gradients_are_clipped_together_where_they_are_longer():
    gradients = {0: np.full(9, 1.0, np.float32), 1: np.full(16, -1.0, np.float32)}
    assert length_of(gradients) == 5
    assert clip_factor(5.0, 0.0) == 1
    assert clip_factor(5.0, 6.0) == 1
    assert clip_factor(5.0, 2.0) == pytest.approx(0.4, rel=1e-6)


def test_a_run_clips_and_follows_its_rates(work):
    """What is told of each step is of the schedule; a small clip makes small steps."""
    told, state = go(work("free", clip=0.0, steps=3, warmup=0.0, weight_decay=0.0))
    rates = [0.02 * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]
    np.testing.assert_allclose([one.rate for one in told], rates, rtol=1e-6)
    clipped, other = go(work("clipped", clip=1e-9, steps=3, warmup=0.0, weight_decay=0.0))
    assert clipped[0].length == told[0].length > 1e-3
    # Gradients of 1e-9 are small beside AdamW's epsilon, 1e-8.
    begun = work().begun
    moved = [
        max(float(np.abs(one[name]["b"] - begun[name]["b"]).max()) for name in begun)
        for one in (state, other)
    ]
    assert moved[1] < 0.2 * moved[0]
