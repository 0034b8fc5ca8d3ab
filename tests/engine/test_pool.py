"""Who uses which pool row: whatever tables take, share, cut and close, no row is lost or twice."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.engine.pool import Pool, Table
from jlayer.plan.shapes import PoolSizes

ACTS = ["take", "share", "fail", "cut", "close", "grow"]
acts = st.lists(
    st.tuples(st.sampled_from(ACTS), st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)),
    max_size=60,
)


@given(acts)
def test_every_row_is_free_or_counted_once_for_each_table_that_lists_it(acts):
    pool, tables = Pool(), {}
    pool.grow(PoolSizes(40))
    listed: dict[int, list[int]] = {}  # what each table must hold
    for act, one, other, number in acts:
        table = tables.setdefault(one, Table(pool))
        rows = listed.setdefault(one, [])
        if act == "take":
            new = pool.take(min(number, pool.n_free))
            table.append(new)
            rows += new.tolist()
        elif act == "share" and not rows:
            shared = listed.get(other, [])[:number]
            pool.share(np.array(shared, np.int32))
            table.append(shared)
            rows += shared
        elif act == "fail":  # a pass that comes to nothing
            shared, new = np.array(rows[:number], np.int32), pool.take(min(number, pool.n_free))
            pool.share(shared)
            pool.release(np.concatenate([shared, new]))
        elif act == "cut":
            table.cut(number)
            del rows[number:]
        elif act == "close":
            table.close()
            assert table.is_closed
            del tables[one], listed[one]
        elif act == "grow":
            pool.grow(PoolSizes(pool.n_rows + number))
        check(pool, tables, listed)
    for one in list(tables):
        tables.pop(one).close()
    assert pool.n_free == pool.n_rows
    assert sorted(pool.take(pool.n_rows).tolist()) == list(range(pool.n_rows))


def check(pool, tables, listed):
    for one, table in tables.items():
        assert table.rows.tolist() == listed[one]
        assert len(table) == len(listed[one])
        assert len(set(listed[one])) == len(listed[one])
    used = Counter(row for rows in listed.values() for row in rows)
    assert pool.n_free + len(used) == pool.n_rows
    # What is taken now is in no table; what is given back at once changes nothing.
    taken = pool.take(pool.n_free)
    assert not set(taken.tolist()) & set(used)
    assert len(set(taken.tolist())) == len(taken)
    pool.release(taken)


def test_a_row_is_free_only_when_the_last_table_has_given_it_up():
    pool = Pool()
    pool.grow(PoolSizes(8))
    first, second, third = (Table(pool) for _ in range(3))
    first.append(pool.take(5))
    for table in (second, third):
        pool.share(first.rows[:3])
        table.append(first.rows[:3].copy())
    first.close()
    assert pool.n_free == 5
    second.cut(1)
    assert pool.n_free == 5
    third.close()
    assert pool.n_free == 7
    second.close()
    second.close()
    assert pool.n_free == 8


def test_more_rows_than_are_free_are_never_given():
    pool = Pool()
    pool.grow(PoolSizes(3))
    pool.take(2)
    with pytest.raises(AssertionError):
        pool.take(2)
    assert pool.n_free == 1
