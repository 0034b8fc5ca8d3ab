"""Prompts that begin like one before take its cache entries from disk, and give the same tokens."""

import os
from contextlib import closing

import pytest
import safetensors

import jlayer
from jlayer.engine import entries, kept_blocks, prompt_cache
from jlayer.engine.pool import Pool, Table
from jlayer.errors import CheckpointError, StorageError, UsageError
from jlayer.families.base import CacheSpec
from jlayer.plan.shapes import PoolSizes
from tests.campaigns import slow_but
from tests.engine.lanes import Run, check_rows
from tests.engine.sessions import (
    DRAWN,
    KINDS,
    PLAIN,
    draft_of,
    opened,
    saved_model,
    tokens_of,
    undisturbed,
)

BLOCK = 8
PROMPT = [7 + n for n in range(61)]
OTHER = [*PROMPT[:37], *range(90, 110)]  # parts from it in its fifth block


@pytest.fixture(scope="module", autouse=True)
def short_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_cache, "BLOCK", BLOCK)
        patch.setattr(kept_blocks, "MOST_TOGETHER", 3)
        yield


@pytest.fixture(scope="module", params=slow_but(KINDS, ("qwen3_5",)))
def folder(request, tmp_path_factory):
    return saved_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(folder):
    with opened(folder) as model:
        return {
            (*prompt, drawn): undisturbed(model, prompt, **(DRAWN if drawn else PLAIN))
            for prompt in (PROMPT, OTHER)
            for drawn in (False, True)
        }


def run(model, prompt, **options):
    """(tokens, how many of the prompt's were there)"""
    found = jlayer.generate(model, prompt, **{**PLAIN, **options})
    return tokens_of(found), found.stats["kept_tokens"]


def last_whole(prompt):
    return (len(prompt) - 1) // BLOCK * BLOCK


def test_a_prompt_is_computed_once_for_all_processes(folder, expected, tmp_path):
    for n_kept in (0, last_whole(PROMPT)):
        with opened(folder, prompt_cache=tmp_path / "prompts") as model:
            assert run(model, PROMPT) == (expected[*PROMPT, False], n_kept)
            drawn, n_kept = run(model, PROMPT, **DRAWN)
            assert (drawn, n_kept) == (expected[*PROMPT, True], last_whole(PROMPT))
            assert not model.engine.n_alive


def test_a_prompt_that_begins_alike_takes_what_they_share(folder, expected, tmp_path):
    n_shared = 37 // BLOCK * BLOCK
    with opened(folder, prompt_cache=tmp_path) as model:
        run(model, PROMPT)
        can_be_cut = not model.engine.prompt_cache.has_ends
        # An end cannot be cut: the first that parts there computes it, and keeps it for others.
        assert run(model, OTHER) == (expected[*OTHER, False], n_shared if can_be_cut else 0)
        third = [*PROMPT[:37], *range(70, 90)]
        assert run(model, third)[1] == n_shared
        assert run(model, OTHER) == (expected[*OTHER, False], last_whole(OTHER))
        assert run(model, PROMPT) == (expected[*PROMPT, False], last_whole(PROMPT))


@pytest.mark.slow
def test_batches_and_runs_in_the_background_take_it_too(folder, expected, tmp_path):
    with opened(folder, prompt_cache=tmp_path) as model:
        assert model.submit(PROMPT, **PLAIN).result().token_ids == expected[*PROMPT, False][0]
        found = jlayer.generate(model, [PROMPT, OTHER, PROMPT], **PLAIN)
        one, two = expected[*PROMPT, False], expected[*OTHER, False]
        assert tokens_of(found) == [*one, *two, *one]
        each_reads = model.engine.prompt_cache.has_ends  # else the third has what the first has
        assert found[0].stats["kept_tokens"] == last_whole(PROMPT) * (1 + each_reads)
        assert not model.engine.n_alive


N_NEXT = PLAIN["max_new_tokens"] - 1  # rows of a text's next tokens


def test_each_prompt_of_a_batch_takes_what_is_kept_of_it(folder, expected, tmp_path):
    with opened(folder, prompt_cache=tmp_path) as model:
        run(model, PROMPT)
        run(model, OTHER)
        found = jlayer.generate(model, [OTHER, PROMPT], **PLAIN)
        assert tokens_of(found) == [*expected[*OTHER, False], *expected[*PROMPT, False]]
        n_computed = sum(len(one) - last_whole(one) for one in (OTHER, PROMPT))
        assert found[0].stats["rows"] == n_computed + 2 * N_NEXT
        assert not model.engine.n_alive


def test_what_is_kept_is_read_in_the_order_of_its_tokens(folder, expected, tmp_path):
    with opened(folder, prompt_cache=tmp_path) as model:
        # Two texts that leave give their rows back: the last tokens of the next one get lower ones.
        runs = [Run(model, [n] * length, **PLAIN) for n, length in ((3, 20), (4, 52), (5, 20))]
        for one in runs:
            one.scheduler.advance(one.lanes)
        for one in runs[:2]:
            one.close()
        assert run(model, PROMPT)[0] == expected[*PROMPT, False]
        runs[2].close()
    with opened(folder, prompt_cache=tmp_path) as model:
        assert run(model, PROMPT) == (expected[*PROMPT, False], last_whole(PROMPT))


def first_pass_of(model, prompts):
    """((rows computed, pool rows held) once each text of a batch has a token, all its tokens)."""
    with closing(model.session(prompts, **PLAIN)) as session:
        while not all(session.token_ids):
            next(session)
        check_rows(model, session.decoding)
        pool = model.engine.caches.pool
        found = session.decoding.stats.rows, pool.n_rows - pool.n_free
        return found, [one.token_ids for one in session.result()]


LINE = [5, *range(80, 130)]
LONGER = [*LINE[:44], *range(60, 70)]  # parts from it within its sixth block


@pytest.mark.parametrize(
    ("before", "batch", "n_read"),
    [
        ([PROMPT, LINE], [PROMPT, LINE], 56 + 48),
        ([LINE], [PROMPT, LINE], 48),
        # What they begin with is held once, and computed never.
        ([PROMPT, OTHER], [PROMPT, OTHER], 56 + 56 - 37),
        ([OTHER, LINE], [PROMPT, LINE, OTHER], 56 + 48),
        ([LONGER[:41]], [LINE, LONGER, PROMPT], 40),
        ([PROMPT], [PROMPT, PROMPT, PROMPT[:50]], 56),
        ([], [PROMPT, OTHER], 0),
    ],
)
def test_what_prompts_of_a_batch_share_is_held_once(tiny, tmp_path, before, batch, n_read):
    with opened(tiny) as model:
        (n_rows, n_held), expected = first_pass_of(model, batch)
    with opened(tiny, prompt_cache=tmp_path) as model:
        for one in before:
            run(model, one)
        assert first_pass_of(model, batch) == ((n_rows - n_read, n_held), expected)
        assert not model.engine.n_alive


@pytest.mark.slow
def test_with_a_draft_model(folder, expected, tmp_path):
    options = {"draft": draft_of(tmp_path), "prompt_cache": tmp_path / "prompts"}
    with opened(folder, **options) as model:
        for n_kept in (0, last_whole(PROMPT)):
            found = run(model, PROMPT, speculate="draft", draft_tokens=4)
            assert found == (expected[*PROMPT, False], n_kept)


def test_entries_of_a_run_in_memory_are_shared_rather_than_read(tiny, tmp_path):
    with opened(tiny, prompt_cache=tmp_path) as model:
        expected, _ = run(model, PROMPT)
        with closing(model.session(PROMPT, **PLAIN)) as session:
            next(session)
            pool = model.engine.caches.pool
            n_held = pool.n_rows - pool.n_free
            with closing(model.session(PROMPT, **PLAIN)) as other:
                next(other)
                assert other.decoding.stats.rows == 2  # the last one of each
                assert other.decoding.stats.kept_tokens == 0
                assert pool.n_rows - pool.n_free == n_held + 2
                assert [other.result().token_ids] == expected
            assert [session.result().token_ids] == expected
        assert not model.engine.n_alive


def test_entries_of_a_text_are_listed_in_the_order_of_its_tokens():
    pool, spec = Pool((4,)), CacheSpec("rows", (), window=4)
    pool.grow(PoolSizes(16, (16,)))
    one, other, table = Table(pool), Table(pool), Table(pool)
    one.append(pool.take(5))
    other.append(pool.take(5))
    one.close()
    other.close()  # its rows, the higher ones, are taken first
    table.append(pool.take(7))
    in_order = entries.in_order(pool, table)
    assert in_order.rows.tolist() == table.rows.tolist() != sorted(table.rows)
    seen = pool.windows[0].places[table.rows[-3:]]
    assert in_order.where(spec).tolist() == seen.tolist()


def bytes_of(path):
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def prompt(number):
    return [20 + number, *range(30, 30 + 3 * BLOCK)]


def test_it_stays_within_its_bytes_and_the_oldest_goes(tiny, tmp_path):
    with opened(tiny, prompt_cache=tmp_path) as model:
        run(model, prompt(0))
        most = int(bytes_of(tmp_path) * 3.5)
    with opened(tiny, prompt_cache=tmp_path, prompt_cache_size=most) as model:
        run(model, prompt(1))
        run(model, prompt(2))
        assert run(model, prompt(0))[1] == 3 * BLOCK
        run(model, prompt(3))
        assert bytes_of(tmp_path) <= most
        assert run(model, prompt(0))[1] == 3 * BLOCK, "it was used since"
        kept = [run(model, prompt(number))[1] for number in (3, 2)]
        assert kept == [3 * BLOCK] * 2
        assert run(model, prompt(1))[1] < 3 * BLOCK


def test_what_a_killed_process_has_left_goes_first(tiny, tmp_path):
    with opened(tiny, prompt_cache=tmp_path) as model:
        run(model, prompt(0))
        most = int(bytes_of(tmp_path) * 2.2)
        (key,) = (path for path in tmp_path.iterdir() if path.is_dir())
        left = key / ("0" * 32 + ".safetensors.jlayer-tmp")
        left.write_bytes(b"x" * (most // 2))
    with opened(tiny, prompt_cache=tmp_path, prompt_cache_size=most) as model:
        run(model, prompt(1))
        assert not left.exists()
        assert run(model, prompt(0))[1] == 3 * BLOCK


@pytest.mark.slow
def test_another_model_or_dtype_takes_nothing_of_it(tiny, fable, tmp_path):
    with opened(tiny, prompt_cache=tmp_path) as model:
        run(model, PROMPT)
    with opened(tiny, prompt_cache=tmp_path, dtype="bfloat16") as model:
        assert run(model, PROMPT)[1] == 0
    with opened(fable, prompt_cache=tmp_path) as model:
        assert run(model, PROMPT)[1] == 0


def test_what_is_wrong_with_it_is_said_by_name(tiny, tmp_path):
    with opened(tiny, prompt_cache=tmp_path / "prompts") as model:
        expected, _ = run(model, PROMPT)
        (block, *_) = sorted((tmp_path / "prompts").rglob("*.safetensors"))
        whole = block.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")  # of the numbers
        for said, damaged in (
            ("its facts are not those", whole.replace(b'"prompt', b'"promqt', 1)),
            (
                "is not that of its digest",
                whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :],
            ),
            ("is not that of its digest", whole[:-1] + bytes([whole[-1] ^ 1])),
            ("cut off", whole[:-1]),
            ("trailing bytes", whole + b"x"),
            ("header", whole[: start // 2]),
            ("empty", b""),
        ):
            block.write_bytes(damaged)
            path = r"prompts/\w+/\w+\.safetensors: a damaged block of a kept prompt"
            with pytest.raises(CheckpointError, match=rf"^[^\n]*{path} \([^\n]*{said}.*remove it$"):
                run(model, PROMPT)
            assert not model.engine.n_alive
            block.unlink()
            assert run(model, PROMPT)[0] == expected
            block.write_bytes(whole)
            assert run(model, PROMPT) == (expected, last_whole(PROMPT))
    with pytest.raises(UsageError, match=r"prompt_cache_size: .* of this model take"):
        opened(tiny, prompt_cache=tmp_path, prompt_cache_size=1000).__enter__()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"prompt_cache: .*file.*; name another folder$"):
        opened(tiny, prompt_cache=tmp_path / "file").__enter__()
    with pytest.raises(UsageError, match="prompt_cache: found 3, expected a folder"):
        opened(tiny, prompt_cache=3).__enter__()


def test_an_end_is_kept_where_a_pass_has_ended(tmp_path):
    """A text that goes on from the entries of one in memory passes by its last whole block."""
    folder = saved_model("gemma3", tmp_path)
    long = {**DRAWN, "max_new_tokens": 60}
    with opened(folder) as model:
        ((*tokens,),) = undisturbed(model, [1, 2, 3, 4, 5, 6, 7], **long)
        text = [1, 2, 3, 4, 5, 6, 7, *tokens]
        expected = undisturbed(model, text[: 8 * BLOCK], **DRAWN)
        shorter = undisturbed(model, text[: 7 * BLOCK + 1], **DRAWN)
    with opened(folder, prompt_cache=tmp_path / "prompts") as model:
        with closing(model.session(text[:7], **long)) as session:
            while len(session.token_ids[0]) < 7 * BLOCK:
                next(session)
            found = jlayer.generate(model, text[: 8 * BLOCK], **DRAWN)
            assert (tokens_of(found), found.stats["rows"] < 2 * BLOCK) == (expected, True)
        for n_kept in (0, 7 * BLOCK):
            found = jlayer.generate(model, text[: 7 * BLOCK + 1], **DRAWN)
            assert (tokens_of(found), found.stats["kept_tokens"]) == (shorter, n_kept)


def test_a_full_disk_ends_the_run_and_says_why(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    with opened(tiny, prompt_cache=tmp_path) as model:
        monkeypatch.setattr("jlayer.engine.kept_blocks.check_room", full)
        with pytest.raises(StorageError, match="No space left"):
            run(model, PROMPT)
        assert not model.engine.n_alive


def test_blocks_that_were_whole_stay_where_the_disk_fails(tiny, tmp_path, monkeypatch):
    real, left = os.rename, 4

    def failing(*given):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(5, os.strerror(5))
        real(*given)

    with opened(tiny, prompt_cache=tmp_path) as model:
        with monkeypatch.context() as patch:
            patch.setattr(kept_blocks.os, "rename", failing)
            with pytest.raises(StorageError, match=r"safetensors: cannot be kept \(Input/output"):
                run(model, PROMPT)
        assert not model.engine.n_alive
        names = [path.name for path in tmp_path.rglob("*") if path.is_file()]
        assert len([name for name in names if name.endswith(".safetensors")]) == 4
        assert not [name for name in names if "tmp" in name]
        assert run(model, PROMPT)[1] == 4 * BLOCK


def test_a_block_is_a_file_that_the_library_reads(tiny, tmp_path):
    with opened(tiny, prompt_cache=tmp_path, dtype="bfloat16") as model:
        expected, _ = run(model, PROMPT)
        assert run(model, PROMPT) == (expected, last_whole(PROMPT))
        for path in tmp_path.rglob("*.safetensors"):
            with safetensors.safe_open(path, "numpy") as file:
                names = list(file.keys())
                assert len(names) == 2 * model.config.num_hidden_layers
                assert {file.get_tensor(name).shape[0] for name in names} == {BLOCK}


def test_a_stream_reads_it_once(tiny, tmp_path, monkeypatch):
    reads, real = [], kept_blocks.place_blocks
    with opened(tiny, prompt_cache=tmp_path) as model:
        expected, _ = run(model, PROMPT)
        monkeypatch.setattr(
            prompt_cache,
            "place_blocks",
            lambda caches, wanted: reads.extend(wanted) or real(caches, wanted),
        )
        steps = list(jlayer.stream(model, PROMPT, **PLAIN))
        assert [[one for step in steps for one in step.token_ids]] == expected
        assert len(reads) == last_whole(PROMPT) // BLOCK
