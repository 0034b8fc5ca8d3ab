"""What tests of guessed tokens share: draft models that are often right, trees made by hand, and
what plain decoding gives."""

import numpy as np
from safetensors.numpy import load_file, save_file

import jlayer
from jlayer.drafting.tree import ROOT
from jlayer.plan.shapes import PoolSizes, pool_sizes
from tests.engine.test_engine import opened
from tests.tiny import tiny_llama

PROMPT = [7 + n for n in range(20)]
POOL = 1024  # rows: of one size, so that few programs are compiled


def few_pools(patch):
    """Pools of one size, and nothing timed for long ahead of a run."""
    patch.setattr("jlayer.engine.pace.ENOUGH_S", 0.0)
    patch.setattr("jlayer.engine.engine.pool_sizes", _at_least)


def _at_least(load, windows):
    found = pool_sizes(load, windows)
    return PoolSizes(max(POOL, load.entries), found.windows)


def noisy_copy(source, folder, *, scale=0.05, seed=0):
    """The same model with noise on every weight: often right, and often not."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    rng = np.random.default_rng(seed)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        noise = rng.normal(0, scale, tensor.shape)
        tensors[name] = (tensor + noise).astype(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_pair(folder, **config):
    """A random model and a noisy copy of it, opened as target and draft."""
    source = tiny_llama(folder / "source", **config)
    return opened(source, draft=noisy_copy(source, folder / "noisy"))


def all_of(found):
    """What is compared: tokens, text, why it ended, and the tokens of the logprobs."""
    found = found if isinstance(found, list) else [found]
    return [(one.token_ids, one.text, one.finish_reason) for one in found]


class Plain:
    """What plain decoding gives, computed once."""

    def __init__(self, model):
        self.model, self._known = model, {}

    def generations(self, prompt, **options):
        key = repr((prompt, options))
        if key not in self._known:
            found = jlayer.generate(self.model, prompt, speculate="off", **options)
            self._known[key] = found if isinstance(found, list) else [found]
            assert all(one.stats["verified"] == 0 for one in self._known[key])
        return self._known[key]

    def check(self, prompt, *, speculate, draft_tokens=None, **options):
        """Speculates, holds that against plain decoding -> what speculating gave."""
        want = self.generations(prompt, **options)
        guesses = {"speculate": speculate, "draft_tokens": draft_tokens}
        found = jlayer.generate(self.model, prompt, **guesses, **options)
        found = found if isinstance(found, list) else [found]
        assert all_of(found) == all_of(want), (guesses, options)
        if options.get("logprobs") is not None:
            for one, other in zip(found, want, strict=True):
                same_logprobs(one.logprobs, other.logprobs)
        return found


def same_logprobs(found, want):
    """Within rounding: the rows of a forward pass are multiplied together."""
    assert [one["token_id"] for one in found] == [one["token_id"] for one in want]
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one["logprob"], other["logprob"], rtol=0, atol=1e-3)
        logprobs = [[value for _, value in each["top"]] for each in (one, other)]
        np.testing.assert_allclose(*logprobs, rtol=0, atol=1e-3)


class Made:
    """Trees made by hand instead of grown. `wants`: of each lane, by the tokens of its prompt, what
    it will give. `tree_of(the next tokens, most nodes, deepest)` -> the nodes, as pairs (parent,
    token) with parents before children; the best node is the first.

    `depths`: how many of each tree in a row were right.
    """

    def __init__(self, tree_of, wants):
        self._tree_of, self._wants, self.depths = tree_of, wants, []

    def __call__(self, seats, plan, pool):
        for seat in seats:
            lane = seat.lane
            want = self._wants[tuple(lane.history[: lane.n_prompt])][len(lane.token_ids) :]
            nodes = self._tree_of(want, seat.tree.most, seat.deepest)
            plant(seat.tree, nodes)
            guesses = seat.tree.best(seat.tree.most)
            self.depths.append(n_right(guesses.parents, guesses.tokens, want))

    def within(self, model, monkeypatch):
        monkeypatch.setattr(model.engine.speculation.grower, "grow", self)
        return self


def plant(tree, nodes):
    """Adds nodes to an empty tree so that they are its best ones in this order, which is that of
    whole families."""
    numbers, children = {ROOT: ROOT}, {}
    for number, (parent, token) in enumerate(nodes):
        children.setdefault(parent, []).append((number, token))
    for parent in [ROOT, *range(len(nodes))]:
        family = children.get(parent, [])
        if not family:
            continue
        before = len(tree)
        log_p = np.full(len(family), np.log(0.9))
        tree.add(numbers[parent], [token for _, token in family], log_p)
        for place, (number, _) in enumerate(family[: len(tree) - before]):
            numbers[number] = before + place
    assert len(tree) == len(nodes)


def n_right(parents, tokens, want):
    """How many of the tokens `want` a tree holds below its root, one below the other."""
    below = {pair: node for node, pair in enumerate(zip(parents, tokens, strict=True))}
    node, count = ROOT, 0
    for token in want:
        node = below.get((node, token))
        if node is None:
            break
        count += 1
    return count


def n_passes(n_tokens, depths):
    """Forward passes for so many tokens, if every tree gives one more than it has right."""
    count = passes = 0
    while count < n_tokens:
        count += depths[passes] + 1 if passes < len(depths) else 1
        passes += 1
    return passes


def is_whole(model):
    """No run is alive, no pool row is used."""
    engine = model.engine
    pool = engine.caches.pool
    return engine.n_alive == 0 and pool.n_free == pool.n_rows
