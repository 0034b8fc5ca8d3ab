"""Experts that are put before their layer has decided: a guess changes no number, whatever it is;
what moves is what was chosen and not there, and what was guessed in vain."""

import threading
import time

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.engine import engine
from jlayer.engine.choosing import Chooser
from jlayer.engine.picking import likeliest
from jlayer.errors import StorageError, UsageError
from jlayer.parts import Router
from jlayer.plan.experts import guess_rooms, passing
from jlayer.streaming.guesses import CREDIT
from jlayer.streaming.incoming import Incoming
from jlayer.streaming.record import Recorder
from jlayer.streaming.steps import Decision, Fetch, Put
from tests.engine.mixture import CONFIG, save
from tests.streaming.conftest import set_expert_rooms

# Five layers with experts, the last three of them after one without.
LAYERS = {"num_hidden_layers": 6, "mlp_only_layers": [2]}
N_EXPERTS = CONFIG["num_experts"]
PROMPTS = [[5, 17, 90, 33, 2, 61], [77, 3, 40]]
N_CHOSEN = CONFIG["num_experts_per_tok"]
GREEDY = {"temperature": 0, "max_new_tokens": 12, "eos_token_id": None, "speculate": "off"}
ALL = N_EXPERTS
IDS = np.random.default_rng(3).integers(3, 133, (2, 20))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return save(tmp_path_factory.mktemp("guesses") / "model", **LAYERS)


@pytest.fixture
def guess(monkeypatch):
    """Call it with the experts that each layer keeps on the device and in host memory, and how many
    are put by guess at a time."""

    def rooms(on_device, in_host, guessed):
        set_expert_rooms(monkeypatch, on_device=on_device, in_host=in_host, guessed=guessed)

    return rooms


def opened(folder):
    return AutoModel.from_pretrained(folder, device="cpu", dtype="float32")


def told(model):
    """What a model says to some prompts one after another, to all at once, and of a text."""
    alone = [jlayer.generate(model, prompt, **GREEDY).token_ids for prompt in PROMPTS]
    together = [found.token_ids for found in jlayer.generate(model, PROMPTS, **GREEDY)]
    return alone, together, model.logits(IDS)


class Seen:
    """Decisions of all layers and passes, and what was put by guess."""

    def __init__(self, model):
        self.chosen, self.tiles, self.put = [], model.plan.tiles, []
        self._also = model.engine.watch.also(self.on_step, self.on_taken)

    def on_step(self, step, tile):
        if isinstance(step, Put) and step.guessed:
            self.put.append((tile.layer, tile.expert))

    def on_taken(self, step, result):
        if isinstance(step, Fetch):
            self.chosen.append((self.tiles[step.tile].layer, tuple(result.chosen)))

    def __enter__(self):
        self._also.__enter__()
        return self

    def __exit__(self, *error):
        self._also.__exit__(*error)


@pytest.fixture(scope="module")
def plain(published):
    """By how many experts are kept on the device and in host memory: what is said without guesses,
    what was chosen, and the totals."""
    found = {}

    def of(guess, kept):
        if kept not in found:
            guess(*kept, 0)
            with opened(published) as model, Seen(model) as seen:
                found[kept] = told(model), seen.chosen, model.engine.totals
                assert not seen.put
        return found[kept]

    return of


def foretold(how, chosen):
    """In place of `Chooser.decide`: guesses that are right or wrong on purpose, for the same
    decisions as in `chosen`."""
    real, rest = Chooser.decide, iter(chosen[1:])

    def decide(self, passing, following):
        found, (_, coming) = real(self, passing, following), next(rest, (None, ()))
        others = [n for n in range(N_EXPERTS) if n not in coming]
        if following is None:
            return found
        return Decision(found.chosen, HOW[how](found.guessed, [*coming], others))

    return decide


HOW = {
    "as they come": lambda guessed, coming, others: guessed,
    "all right": lambda guessed, coming, others: coming,
    "all wrong": lambda guessed, coming, others: others,
    "some wrong": lambda guessed, coming, others: [*others[:1], *coming, *others[1:]],
    "all experts": lambda guessed, coming, others: list(range(N_EXPERTS)),
    "none": lambda guessed, coming, others: [],
}


KEPT = ((0, ALL), (3, ALL), (2, 5))
QUICK = {("some wrong", (2, 5))}


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        pytest.param(how, kept, marks=() if (how, kept) in QUICK else pytest.mark.slow)
        for how in HOW
        for kept in KEPT
    ],
)
def test_no_guess_changes_a_number_and_what_moves_more_was_guessed_in_vain(
    published, guess, plain, monkeypatch, how, kept
):
    """Texts alone, several at once, and a prompt; where nothing, some or more is kept on the
    device, and all or some in host memory."""
    expected, chosen, before = plain(guess, kept)
    monkeypatch.setattr(Chooser, "decide", foretold(how, chosen))
    guess(*kept, 2)
    with opened(published) as model, Seen(model) as seen:
        found, totals = told(model), model.engine.totals
        sizes = [tile.n_bytes for tile in model.plan.tiling.experts[0]]
        # Those that pass, and by guess two experts of each of two layers.
        most_tiles = passing(model.plan.tiles, model.plan.ahead) + 4 * len(sizes)
    assert found[:2] == expected[:2]
    np.testing.assert_array_equal(found[2], expected[2])
    assert totals.put_bytes - before.put_bytes == totals.experts_wasted * sum(sizes)
    for name in ("read_bytes", "experts_used", "experts_on_device", "experts_in_host"):
        assert getattr(totals, name) == getattr(before, name)
    assert len(seen.put) == len(sizes) * totals.experts_guessed
    assert totals.most_live_tiles <= most_tiles
    assert totals.most_live_bytes <= most_tiles * max(sizes)
    right = totals.experts_guessed - totals.experts_wasted
    assert (right > 0) == (how not in ("all wrong", "none"))
    assert (totals.experts_wasted > 0) == (how not in ("all right", "none"))
    # After the last layer comes none, and after the one without experts none is guessed.
    assert {layer for layer, _ in seen.put} <= {1, 4, 5}


def test_guesses_are_right_where_no_layer_changes_what_its_router_looks_at(
    published, guess, tmp_path
):
    """All layers but the first add nothing, and their norms are the same: so the next router gets
    what this one gets. It has other weights."""
    added, norm = ("o_proj.weight", "down_proj.weight"), "post_attention_layernorm.weight"

    def change(name, values):
        if name.endswith(norm):
            return np.ones_like(values)
        return np.zeros_like(values) if name.endswith(added) else values

    folder = save(tmp_path / "model", change=change, **LAYERS)
    guess(0, ALL, N_CHOSEN)
    with opened(folder) as model:
        for prompt in ([7], [88], [7], [88]):
            model.logits(np.array([prompt]))
        totals = model.engine.totals
    # Each token twice: what it uses is in host memory the second time.
    assert totals.experts_guessed >= 2 * 3 * N_CHOSEN  # of the layers that are guessed
    assert totals.experts_wasted == 0


def test_a_long_prompt_makes_guesses_too(published, guess):
    """The link would idle from the last expert of a layer to the next layer's decision."""
    guess(0, ALL, 2)
    with opened(published) as model:
        model.logits(IDS)  # in host memory from now on
        before = model.engine.totals.experts_guessed
        model.logits(IDS)
        assert model.engine.totals.experts_guessed - before == 2 * 3  # of the layers that can be
        assert any(label.startswith("guess experts") for label in model.engine.compiles)


def test_the_timeline_shows_what_was_waited_for_and_what_was_guessed(published, guess):
    guess(0, ALL, 2)
    with opened(published) as model, Seen(model) as seen:
        jlayer.generate(model, PROMPTS[0], **GREEDY)
        seen.put.clear()
        recorder = Recorder(model.engine.watch, model.plan.tiles, model.plan.tiers)
        with recorder:
            jlayer.generate(model, PROMPTS[0][:1], **GREEDY | {"max_new_tokens": 2})
        timeline = recorder.timeline()
    waits, puts = timeline.lane("decide"), timeline.lane("put")
    assert [timeline.tiles[span.tile].layer for span in waits] == [0, 1, 3, 4, 5] * 2
    assert all(wait.begin <= wait.end for wait in waits)
    guessed = [timeline.tiles[span.tile] for span in puts if span.guessed]
    assert sorted((tile.layer, tile.expert) for tile in guessed) == sorted(seen.put)
    assert guessed
    assert any(not span.guessed for span in puts)


def test_there_is_a_timeline_where_nothing_is_freed(published, guess):
    """All experts that are used are on the device."""
    guess(ALL, ALL, 0)
    with opened(published) as model:
        for _ in range(2):
            with Recorder(model.engine.watch, model.plan.tiles, model.plan.tiers) as recorder:
                model.logits(np.array([[7]]))
        timeline = recorder.timeline()
    assert not timeline.lane("free")
    assert timeline.end == max(span.end for span in timeline.lane("run"))


def test_a_layer_whose_guesses_are_wrong_stops_making_them(published, guess, plain, monkeypatch):
    _, chosen, _ = plain(guess, (0, ALL))
    monkeypatch.setattr(Chooser, "decide", foretold("all wrong", chosen))
    guess(0, ALL, 2)
    with opened(published) as model:
        told(model)
        totals = model.engine.totals
    assert 0 < totals.experts_wasted <= 3 * (CREDIT + 2)


INTERRUPT = pytest.param(KeyboardInterrupt, (2, 5), marks=pytest.mark.slow)


@pytest.mark.parametrize(("fault", "kept"), [(StorageError, (0, ALL)), INTERRUPT])
def test_a_failure_while_a_guess_is_put_leaves_nothing_behind(published, guess, plain, kept, fault):
    """An error of the device or an interrupt; at the first guess, and later ones."""
    expected, *_ = plain(guess, kept)
    guess(*kept, 2)
    threads = set(threading.enumerate())
    with opened(published) as model:
        for n_before in (0, 1, 5):
            with (
                model.engine.watch.also(fails_after(n_before, fault("on purpose"))),
                pytest.raises(fault, match="on purpose"),
            ):
                told(model)
            assert told(model)[:2] == expected[:2]
        np.testing.assert_array_equal(model.logits(IDS), expected[2])
    assert set(threading.enumerate()) <= threads


def test_an_error_of_the_reader_after_a_guess_leaves_nothing_behind(
    published, guess, plain, monkeypatch
):
    """What is guessed is in host memory; what was not foreseen is read while it is on the
    device."""
    expected, *_ = plain(guess, (2, 5))
    guess(2, 5, 2)
    with opened(published) as model, Seen(model) as seen:
        real = Incoming.read_tile

        def read(self, tile, slot):
            if seen.put and self.tiles[tile].expert is not None:
                raise StorageError("on purpose")
            return real(self, tile, slot)

        with monkeypatch.context() as patched:
            patched.setattr(Incoming, "read_tile", read)
            with pytest.raises(StorageError, match="on purpose"):
                told(model)
        assert told(model)[:2] == expected[:2]


def fails_after(n_before, error):
    left = iter(range(n_before))

    def on_step(step, tile):
        if isinstance(step, Put) and step.guessed and next(left, None) is None:
            raise error

    return on_step


@pytest.mark.parametrize("after", [Put, Fetch])
def test_a_model_may_be_closed_while_a_guess_is_on_its_way(published, guess, after):
    guess(0, ALL, 2)
    threads, put, errors = set(threading.enumerate()), threading.Event(), []
    model = opened(published)

    def on_step(step, tile):
        is_guess = isinstance(step, Put) and step.guessed
        if is_guess or (put.guessed and isinstance(step, after)):
            put.guessed = True
            put.set()
            time.sleep(0.05)  # the other thread closes it meanwhile

    def run():
        try:
            for _ in range(20):
                jlayer.generate(model, PROMPTS[0], **GREEDY)
        except UsageError as error:
            errors.append(error)

    put.guessed = False
    with model.engine.watch.also(on_step):
        worker = threading.Thread(target=run)
        worker.start()
        assert put.wait(60)
        model.close()
        worker.join(60)
    assert [str(error) for error in errors] == [engine.CLOSED]
    assert set(threading.enumerate()) <= threads


def test_the_rooms_of_guesses_hold_few_experts_of_few_bytes():
    router = Router(128, 8)
    mib = 1 << 20
    assert guess_rooms(router, 9 * mib, 1000 * mib) == 8
    assert guess_rooms(router, 20 * mib, 1000 * mib) == 4
    assert guess_rooms(router, 9 * mib, 40 * mib) == 2  # for each of two layers
    assert guess_rooms(Router(256, 16), mib, 1000 * mib) == 8
    assert guess_rooms(Router(32, 2), mib, 1000 * mib) == 2  # no more than a token uses
    assert guess_rooms(router, 44 * mib, 1000 * mib) == 1
    assert guess_rooms(router, 88 * mib, 1000 * mib) == 1  # of one that is larger at least one
    assert guess_rooms(router, 44 * mib, 80 * mib) == 0
    assert guess_rooms(router, 129 * mib, 1000 * mib) == 0


def test_the_likeliest_expert_has_the_most_weight_of_all_rows():
    rows = np.array([[0, 0.5, 0.2, 0, 0.1], [0, 0.1, 0.6, 0, 0]], np.float32)
    assert likeliest(rows.sum(axis=0)) == [2, 1, 4]
    assert likeliest(np.array([0.0, -0.3, np.nan, 0.1])) == [1, 3]
