"""How many guesses ride: the best rate, by the times that were measured."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.drafting.width import Pace, Patience, best_width, goes_on

seconds = st.floats(0.1, 10)


@given(
    st.lists(st.floats(0, 1), max_size=40),
    st.dictionaries(st.integers(1, 50), seconds, min_size=1),
    st.integers(0, 10),
    st.floats(0, 1),
    st.floats(0.1, 3),
)
def test_no_other_width_gives_more_tokens_a_second(gains, sizes, fixed, drafting_s, ratio):
    gains = np.sort(np.array(gains))[::-1]

    def rate(count):
        fitting = [s for rows, s in sizes.items() if rows >= fixed + count]
        return (1 + ratio * gains[:count].sum()) / (min(fitting) + drafting_s) if fitting else -1

    width = best_width(gains, sizes, fixed=fixed, drafting_s=drafting_s, ratio=ratio)
    assert 0 <= width <= len(gains)
    if max(sizes) >= fixed:
        assert width + fixed <= max(sizes)
        assert rate(width) == pytest.approx(max(rate(n) for n in range(len(gains) + 1)))


def test_guesses_fill_the_size_that_pays():
    gains, sizes = np.full(100, 0.05), {2: 1.0, 16: 1.02, 64: 1.1, 128: 9.0}
    assert best_width(gains, sizes, fixed=1, drafting_s=0.0, ratio=1.0) == 63
    assert best_width(gains, sizes, fixed=70, drafting_s=0.0, ratio=1.0) == 58
    assert best_width(gains, {1: 1.0, 16: 9.0}, fixed=1, drafting_s=0.0, ratio=1.0) == 0
    assert best_width(gains, sizes, fixed=129, drafting_s=0.0, ratio=1.0) == 0
    # The more seconds guessing took, the less a wider pass adds to them.
    two = {1: 1.0, 16: 1.6}
    assert best_width(gains[:10], two, fixed=1, drafting_s=0.0, ratio=1.0) == 0
    assert best_width(gains[:10], two, fixed=1, drafting_s=0.5, ratio=1.0) == 10
    assert best_width(gains[:4], sizes, fixed=1, drafting_s=0.0, ratio=1.0) == 4


def test_drafting_goes_on_while_it_adds_more_tokens_than_time():
    assert goes_on(0.1, expected=3.0, step_s=0.003, sweep_s=0.7)
    assert not goes_on(0.1, expected=3.0, step_s=0.03, sweep_s=0.7)


def test_the_pace_is_the_prediction_until_it_is_measured():
    pace = Pace({1: 1.0, 16: 2.0, 64: 4.0})
    assert pace.seconds() == {1: 1.0, 16: 2.0, 64: 4.0}
    pace.saw(16, 3.0)
    assert pace.seconds() == {1: 1.5, 16: 3.0, 64: 6.0}
    for _ in range(3):
        pace.saw(1, 1.0)
    pace.saw(1, 50.0)
    assert pace.seconds() == {1: 1.0, 16: 3.0, 64: 5.0}


def test_guesses_that_fail_are_made_less_and_less_often_until_one_pays():
    patience, passes = Patience(), []
    for number in range(400):
        if patience.ready():
            passes.append(number)
            patience.note(paid=False)
    gaps = [after - before for before, after in pairwise(passes)]
    assert gaps[:9] == [1, 1, 1, 2, 4, 8, 16, 32, 64]
    assert set(gaps[9:]) == {64}
    patience.note(paid=True)
    assert patience.ready()
