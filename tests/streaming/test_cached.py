"""What lies in the page cache is taken from there; the rest is read as if there were none."""

import errno
import os
import shutil
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

import jlayer
from jlayer import AutoModel
from jlayer.checkpoint.source import identity_of
from jlayer.checkpoint.store import Segment
from jlayer.engine import engine
from jlayer.errors import CheckpointError, StorageError
from jlayer.plan.tiles import Tier
from jlayer.streaming import direct
from jlayer.streaming.cached import CachedFile, PageCache, Turn, page_cache_use
from jlayer.streaming.direct import Reader, aligned_buffer, aligned_span, n_readers
from tests.campaigns import slow_but

IDS = [5, 17, 99, 3, 64, 128, 1]
N_BYTES = 1 << 20
REQUEST = 64 << 10
TAIL = 100  # bytes in the last page
READ = N_BYTES + TAIL


def evict(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    for _ in range(3):  # a page that somebody is at stays
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        time.sleep(0.005)
    os.close(fd)


def warm(path):
    path.read_bytes()


def cached_bytes(path):
    """By asking for every page, as nobody else does."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    pages = 0
    for offset in range(0, os.path.getsize(path), 4096):
        try:
            os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
            pages += 1
        except BlockingIOError:
            pass
    os.close(fd)
    return 4096 * pages


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A file of 1 MiB and a bit, read in requests of 64 KiB; skips where nothing can be evicted."""
    monkeypatch.setattr(direct, "REQUEST_BYTES", REQUEST)
    path = tmp_path / "data"
    path.write_bytes(np.random.default_rng(3).bytes(READ))
    evict(path)
    try:
        is_there = cached_bytes(path) > 0
    except (AttributeError, OSError):
        is_there = True
    reader = Reader([str(path)])
    is_direct = reader.reads_directly
    reader.close()
    if is_there or not is_direct:
        pytest.skip("this file system keeps what was evicted, or reads nothing directly")
    evict(path)
    return path


def read_all(path, *, fills=False, **options):
    """(the bytes, those of them from the page cache) of the file but for its first 100."""
    segment = Segment(str(path), TAIL, N_BYTES)
    into = aligned_buffer(aligned_span(segment)[1])
    reader = Reader([str(path)], **options)
    try:
        with reader.turn(fills=fills) as turn:
            shift = reader.read(segment, into, turn=turn)
        assert reader.reads_directly
    finally:
        reader.close()
    return into[shift : shift + N_BYTES].tobytes(), turn.cached_bytes


def test_a_file_is_taken_from_the_page_cache_exactly_if_it_lies_there(data):
    cold, from_cache = read_all(data)
    assert from_cache == 0
    warm(data)
    hot, from_cache = read_all(data)
    assert from_cache == READ  # to the file's end, inside the last page
    assert read_all(data, page_cache=PageCache.PAST) == (hot, 0)
    assert cold == hot == data.read_bytes()[TAIL:]


def test_each_request_is_taken_from_where_it_lies(data):
    with open(data, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no further than asked
        file.seek(N_BYTES // 2)
        file.read(N_BYTES // 4)
    found, from_cache = read_all(data)
    assert 0 < from_cache < N_BYTES // 2
    assert found == data.read_bytes()[TAIL:]


def test_reading_what_is_not_there_leaves_it_where_it_is(data):
    """The kernel brings in a page that was asked for: one for each request, and no more."""
    for _ in range(3):
        assert read_all(data)[1] <= TAIL  # the last request, of one page
    assert cached_bytes(data) <= 3 * 4096 * (N_BYTES // REQUEST + 1)


@pytest.mark.parametrize("fills", [False, True])
def test_only_what_is_read_once_is_left_in_the_page_cache(data, fills):
    found, _ = read_all(data, fills=fills, page_cache=PageCache.FILL)
    again, from_cache = read_all(data)
    assert (from_cache == READ) == fills
    assert found == again == data.read_bytes()[TAIL:]


def nowait(monkeypatch, answer):
    """Has `answer(real, fd, buffers, offset)` instead of reads that do not wait; returns where they
    were tried."""
    real, asked = os.preadv, []

    def preadv(fd, buffers, offset, *flags):
        if not flags:
            return real(fd, buffers, offset)
        asked.append(offset)
        return answer(lambda some=buffers: real(fd, some, offset, *flags), buffers)

    monkeypatch.setattr(os, "preadv", preadv)
    return asked


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.EIO, errno.ENOSYS])
def test_a_file_system_that_cannot_tell_is_read_directly(data, monkeypatch, code):
    def refuses(*_):
        raise OSError(code, "not supported")

    warm(data)
    asked = nowait(monkeypatch, refuses)
    found, from_cache = read_all(data)
    assert (from_cache, len(asked)) == (0, 1)
    monkeypatch.undo()
    assert found == data.read_bytes()[TAIL:]


def test_a_system_without_such_reads_is_not_asked(data, monkeypatch):
    warm(data)
    monkeypatch.delattr(os, "RWF_NOWAIT")
    monkeypatch.delattr(os, "posix_fadvise")
    found, from_cache = read_all(data)
    assert from_cache == 0
    assert found == data.read_bytes()[TAIL:]


@pytest.mark.parametrize("kept", [5000, 4096, 4095, 1])
def test_what_ends_inside_a_page_goes_on_at_its_beginning(data, monkeypatch, kept):
    """The kernel gives some bytes of a request, of any number; O_DIRECT cannot go on there."""
    given = []

    def answer(read, some):
        if len(some[0]) == 1:
            return read()
        if given:
            raise BlockingIOError(errno.EAGAIN, "not there")
        given.append(kept)
        return read([some[0][:kept]])

    warm(data)
    nowait(monkeypatch, answer)
    found, from_cache = read_all(data)
    assert from_cache == kept // 4096 * 4096
    monkeypatch.undo()
    assert found == data.read_bytes()[TAIL:]


def test_pages_that_vanish_after_they_were_asked_for_come_from_the_disk(data, monkeypatch):
    def answer(read, some):
        if len(some[0]) > 1:
            raise BlockingIOError(errno.EAGAIN, "not there")
        return read()

    warm(data)
    nowait(monkeypatch, answer)
    found, from_cache = read_all(data)
    assert from_cache == 0
    monkeypatch.undo()
    assert found == data.read_bytes()[TAIL:]


@pytest.mark.parametrize("fills", [False, True])
@pytest.mark.parametrize("prepare", [evict, warm])
def test_a_file_that_was_cut_off_says_so_wherever_it_lies(data, prepare, fills):
    os.truncate(data, N_BYTES // 2 + 5)
    prepare(data)
    with pytest.raises(CheckpointError, match=rf"ends at byte \d+, expected {READ}; it"):
        read_all(data, fills=fills, page_cache=PageCache.FILL)


@pytest.mark.parametrize("page_cache", list(PageCache))
def test_another_file_under_the_same_name_is_refused(data, tmp_path, page_cache):
    identity = identity_of(os.stat(data))
    shutil.copy(data, tmp_path / "other")
    os.replace(tmp_path / "other", data)
    with pytest.raises(CheckpointError, match="changed since"):
        Reader([str(data)], {str(data): identity}, page_cache=page_cache)


@pytest.mark.parametrize("n_before", [1, 2])
def test_a_file_replaced_between_two_openings_is_refused(data, tmp_path, monkeypatch, n_before):
    """Each of the three descriptors is of the file that was checked."""
    identity, real, opened = identity_of(os.stat(data)), os.open, []

    def replacing(path, *flags, **more):
        if path == str(data):
            opened.append(path)
            if len(opened) == n_before + 1:
                shutil.copy(data, tmp_path / "other")
                os.replace(tmp_path / "other", data)
        return real(path, *flags, **more)

    monkeypatch.setattr(os, "open", replacing)
    with pytest.raises(CheckpointError, match="changed"):
        Reader([str(data)], {str(data): identity}, page_cache=PageCache.FILL)


def test_a_stopped_reader_stops_between_two_requests_and_goes_on_when_resumed(data, monkeypatch):
    warm(data)
    segment = Segment(str(data), 0, N_BYTES)
    into = aligned_buffer(N_BYTES)
    reader, read = Reader([str(data)]), CachedFile.read

    def stopping(file, view, offset):
        reader.stop()
        return read(file, view, offset)

    monkeypatch.setattr(CachedFile, "read", stopping)
    with pytest.raises(StorageError, match="reading was stopped"):
        reader.read(segment, into)
    monkeypatch.undo()
    reader.resume()
    reader.read(segment, into)
    reader.close()
    assert into.tobytes() == data.read_bytes()[:N_BYTES]


def test_the_disk_is_held_to_the_end_of_a_turn_and_given_back_after_an_error():
    disk = threading.Semaphore(1)
    with Turn(disk) as turn:
        turn.take()
        turn.take()  # it has it already
        assert not disk.acquire(blocking=False)
    with suppress(ValueError), Turn(disk) as turn:
        turn.take()
        raise ValueError
    with Turn(disk):
        assert disk.acquire(blocking=False)  # a turn that never needs it leaves it to others


def test_the_disk_has_two_reads_at_a_time_and_the_page_cache_as_many_as_there_are_threads(
    data, monkeypatch
):
    real, lock, now, most = os.preadv, threading.Lock(), {}, {}

    def preadv(fd, buffers, offset, *flags):
        if flags and len(buffers[0]) == 1:
            return real(fd, buffers, offset, *flags)
        with lock:
            now[bool(flags)] = now.get(bool(flags), 0) + 1
            most[bool(flags)] = max(most.get(bool(flags), 0), now[bool(flags)])
        time.sleep(0.01)
        try:
            return real(fd, buffers, offset, *flags)
        finally:
            with lock:
                now[bool(flags)] -= 1

    monkeypatch.setattr(os, "preadv", preadv)
    for prepare in (evict, warm):
        prepare(data)
        reader = Reader([str(data)])
        threads = [threading.Thread(target=read_with, args=(reader, data)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reader.close()
    assert most[False] <= direct.ON_DISK
    assert most[True] > direct.ON_DISK


def read_with(reader, path):
    segment = Segment(str(path), 0, N_BYTES)
    reader.read(segment, aligned_buffer(N_BYTES))


def test_files_are_left_in_the_page_cache_only_where_much_more_memory_is_free():
    assert page_cache_use(True, kept_bytes=100, free_bytes=150) is PageCache.FILL
    assert page_cache_use(True, kept_bytes=100, free_bytes=149) is PageCache.TAKE
    assert page_cache_use(False, kept_bytes=100, free_bytes=10**9) is PageCache.PAST


@pytest.fixture
def folder(tiny, tmp_path, data):
    """A model of its own, on a file system that evicts."""
    return shutil.copytree(tiny, tmp_path / "model")


TIERS = [(Tier.HOST,), (Tier.DEVICE,), (Tier.HOST, Tier.DISK)]


@pytest.mark.parametrize("tiers", slow_but(TIERS, TIERS[2:]))
def test_a_model_in_the_page_cache_says_the_same(folder, cuts, tiers_in_turn, tiers, monkeypatch):
    monkeypatch.setattr(engine, "page_cache_use", lambda *_, **__: PageCache.TAKE)
    cuts(3_000)
    tiers_in_turn(*tiers)
    found = []
    for prepare in (evict, warm):
        for path in folder.iterdir():
            prepare(path)
        options = {"max_new_tokens": 4, "temperature": 0, "device": "cpu"}
        found.append(jlayer.generate(folder, IDS, **options))
    cold, hot = (one.stats for one in found)
    assert found[0].token_ids == found[1].token_ids
    read, from_cache = (
        [one[f"load_{name}"] + one[name] for one in (cold, hot)]
        for name in ("read_bytes", "cached_bytes")
    )
    assert from_cache[0] < read[0] == read[1]
    assert 0.8 * read[1] < from_cache[1] <= read[1]  # a file may end inside its last block
    assert hot["first_token_s"] == pytest.approx(hot["load_s"] + hot["prefill_s"], abs=1e-3)


@pytest.mark.parametrize("free_bytes", [0, 1 << 40])
def test_a_start_leaves_the_model_in_the_page_cache_where_memory_is_free(
    folder, tiers_in_turn, monkeypatch, free_bytes
):
    """Not by the bytes where it is not: of files so small the headers bring in the rest."""
    made, uses = engine.Executor, []

    def executor(*args, **options):
        uses.append(options["page_cache"])
        return made(*args, **options)

    monkeypatch.setattr(engine, "Executor", executor)
    monkeypatch.setattr(engine, "free_beside", lambda peak_bytes: free_bytes)
    tiers_in_turn(Tier.HOST)
    for path in folder.iterdir():
        evict(path)
    for _ in range(2):
        options = {"max_new_tokens": 1, "temperature": 0, "device": "cpu"}
        stats = jlayer.generate(folder, IDS, **options).stats
    assert set(uses) == {PageCache.FILL if free_bytes else PageCache.TAKE}
    if free_bytes:
        assert stats["cached_bytes"] > 0.8 * stats["read_bytes"] > 0


def test_a_model_that_shall_be_read_from_disk_is_read_from_disk(folder):
    for path in folder.iterdir():
        warm(path)
    with AutoModel.from_pretrained(folder, device="cpu", keeps_layers=False) as model:
        model.logits(IDS)
        assert model.engine.totals.read_bytes > model.engine.totals.cached_bytes == 0


def test_readers_are_four_to_eight(monkeypatch):
    for cores, expected in ((1, 4), (2, 4), (6, 6), (16, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert n_readers() == expected
