"""Who begins next."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.serving.queue import Limits, Queue, QueueFull


@dataclass(eq=False)
class One:
    client: str = "a"
    is_batch: bool = False


def filled(*ones):
    queue = Queue(Limits())
    for one in ones:
        queue.add(one)
    return queue


def test_people_go_before_batches_and_clients_in_turn():
    a, b, batch, c, d = One("a"), One("a"), One("x", True), One("b"), One("a")
    queue = filled(a, b, batch, c, d)
    assert queue.order({}) == [a, c, b, d, batch]
    assert queue.order({"a": 1}) == [c, a, b, d, batch]
    assert queue.order({"b": 2}) == [a, b, c, d, batch]
    assert [queue.place(one, {}) for one in (a, b, batch, c, d)] == [1, 3, 5, 2, 4]
    assert queue.remove(c)
    assert not queue.remove(c)
    assert queue.place(c, {}) is None


def test_what_had_begun_is_put_back_before_the_others_of_its_kind():
    one, two, back, first = One("x", True), One("x", True), One("x", True), One("x", True)
    queue = filled(one, two)
    queue.add_first(back)
    queue.add_first(first)
    assert queue.order({}) == [first, back, one, two]


@given(
    st.lists(st.sampled_from("abc"), max_size=12),
    st.dictionaries(st.sampled_from("abc"), st.just(1)),
)
def test_the_order_is_that_of_choosing_one_at_a_time(clients, running):
    ones = [One(client) for client in clients]
    begun, left, expected = Counter(running), list(ones), []
    while left:
        one = min(left, key=lambda each: (begun[each.client], left.index(each)))
        begun[one.client] += 1
        left.remove(one)
        expected.append(one)
    assert filled(*ones).order(running) == expected


@pytest.mark.parametrize(
    ("kind", "most"), [(One("a"), 2), (One("b"), 3), (One("a", True), 4), (One("c", True), 4)]
)
def test_a_full_queue_says_when_to_come_again(kind, most):
    queue = Queue(Limits(people=3, batch=4, client=2))
    for _ in range(most):
        queue.check(kind, 7.0)
        queue.add(
            One("a" if kind.client == "a" and not kind.is_batch else str(len(queue)), kind.is_batch)
        )
    with pytest.raises(QueueFull, match=f"{most} requests .*at most {most} may") as full:
        queue.check(kind, 7.0)
    assert full.value.retry_after_s == 7
    with pytest.raises(QueueFull) as full:
        queue.check(kind, 10_000)
    assert full.value.retry_after_s == 120, "openai-python gives up at once where it is more"
