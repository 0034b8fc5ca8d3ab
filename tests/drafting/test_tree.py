"""Trees of guesses: growing best-first finds the best nodes, and any number of them is a tree."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.drafting.tree import ROOT, Tree

# Few values, so that many scores are equal; 0 is a probability of 1, -inf one of 0.
log_p = st.sampled_from([0.0, -0.5, -0.5, -0.6, -1.0, -3.0, -np.inf])
families = st.lists(st.lists(log_p, max_size=4), min_size=1, max_size=40)


def grown(families, *, most, count, deepest=5):
    """A tree in which the children of a path are a function of it."""
    tree = Tree(most)
    while nodes := tree.next(count):
        for node in nodes:
            path = tree.path(node)
            if len(path) < deepest:
                tree.add(node, *children(families, path))
    return tree


def children(families, path):
    log_p = families[sum((place + 1) * token for place, token in enumerate(path)) % len(families)]
    return np.arange(len(log_p)), np.array(log_p)


def all_scores(families, deepest=5):
    scores, level = [], [((), 0.0)]
    for _ in range(deepest):
        level = [
            ((*path, int(token)), score + step)
            for path, score in level
            for token, step in zip(*children(families, path), strict=True)
            if step > -np.inf
        ]
        scores += [score for _, score in level]
    return sorted(scores, reverse=True)


@given(families, st.integers(1, 20), st.integers(1, 4))
def test_growing_until_nothing_is_next_finds_the_best_of_all_nodes(families, most, count):
    tree = grown(families, most=most, count=count)
    best = tree.best(most)
    assert np.allclose(best.scores, all_scores(families)[:most])
    assert best.expected == pytest.approx(tree.expected)
    assert best.expected == pytest.approx(1 + np.exp(best.scores).sum())


@given(families, st.integers(1, 20), st.integers(0, 25))
def test_the_best_nodes_are_a_tree_with_parents_first(families, most, count):
    tree = grown(families, most=most, count=3)
    best = tree.best(count)
    assert len(best.tokens) == min(count, most, len(tree))
    for place, (token, parent, score, node) in enumerate(
        zip(best.tokens, best.parents, best.scores, best.nodes, strict=True)
    ):
        assert parent == ROOT or 0 <= parent < place
        above = [] if parent == ROOT else tree.path(best.nodes[parent])
        assert tree.path(node) == [*above, token]
        assert len(above) + 1 == tree.depths[node]
        assert score <= (0.0 if parent == ROOT else best.scores[parent])
    assert list(best.scores) == sorted(best.scores, reverse=True)
    assert best.nodes == tree.best(most).nodes[:count], "fewer nodes are the first of more"


@given(families, st.integers(1, 20), st.integers(1, 4))
def test_nodes_are_grown_once_and_best_first(families, most, count):
    tree, seen = Tree(most), []
    while nodes := tree.next(count):
        assert len(nodes) <= count
        scores = [0.0 if node == ROOT else tree.scores[node] for node in nodes]
        assert scores == sorted(scores, reverse=True)
        seen += nodes
        for node in nodes:
            if len(tree.path(node)) < 5:
                tree.add(node, *children(families, tree.path(node)))
    assert seen[0] == ROOT
    assert len(set(seen)) == len(seen)


def test_a_lineage_leads_from_the_root_to_the_node():
    tree = Tree(8)
    tree.add(ROOT, [7, 8], np.log([0.3, 0.6]))
    assert tree.tokens.tolist() == [8, 7]
    assert tree.next(2) == [0, 1]
    tree.add(1, [9], np.log([0.5]))
    assert tree.lineage(2) == [1, 2]
    assert tree.path(2) == [7, 9]
    assert tree.path(ROOT) == tree.lineage(ROOT) == []
    assert tree.parents.tolist() == [ROOT, ROOT, 1]
    assert tree.best(2).tokens == (8, 7)


def test_a_log_probability_above_zero_counts_as_zero():
    tree = Tree(4)
    tree.add(ROOT, [3], np.array([1e-12]))
    tree.add(0, [4], np.array([1e-12]))
    assert tree.best(4).parents == (ROOT, 0)
    assert tree.best(4).scores == (0.0, 0.0)


def test_what_cannot_be_among_the_best_is_left_out():
    tree = Tree(2)
    tree.add(ROOT, [1, 2, 3], np.log([0.1, 0.5, 0.4]))
    assert tree.tokens.tolist() == [2, 3]
    tree.add(0, [4], np.log([0.7]))
    assert len(tree) == 2
    assert tree.next(4) == [], "children of the other one would come after it"


def test_a_tree_without_guesses_gives_one_token():
    assert Tree(4).best(4).expected == Tree(4).expected == 1.0
    assert Tree(4).best(4).tokens == ()
