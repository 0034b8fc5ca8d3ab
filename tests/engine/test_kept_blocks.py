"""Files of kept blocks: what is written is read, and what is not what was written is refused."""

import json
import os
import random
import resource
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash

from jlayer.checkpoint.safetensors import encode_tensors, read_header
from jlayer.engine import kept_blocks
from jlayer.engine.entries import NONE
from jlayer.engine.kept_blocks import (
    NewBlock,
    Wanted,
    bytes_of_layer,
    opened,
    place_blocks,
    together,
    write_blocks,
)
from jlayer.errors import CheckpointError, JlayerError, StorageError
from tests.campaigns import slow_but
from tests.engine.pools import Pools, ending, everything, growing, read

FACTS = {"of": "prompt", "tokens": [3, 1, 2]}


@pytest.fixture
def block(tmp_path):
    path = str(tmp_path / "kept.safetensors")
    write_blocks([NewBlock(path, FACTS, everything, Pools(seed=1))])
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_blocks_of_each_kind_of_layer_are_read_as_they_were_written(tmp_path, dtype):
    before, after = Pools(dtype, seed=1), Pools(dtype)
    places = {"one": growing(0, 1, 2, 3), "two": growing(9, 4, 5, 8), "end": ending(6, 7, 2)}
    blocks = [
        NewBlock(str(tmp_path / name), {"tokens": [n]}, where, before)
        for n, (name, where) in enumerate(places.items())
    ]
    write_blocks(blocks)
    for one in blocks:
        assert os.path.getsize(one.path) == one.n_bytes
    assert not [name for name in os.listdir(tmp_path) if name not in places]
    with opened([one.path for one in blocks]) as found:
        assert [one.facts for one in found] == [{"tokens": [0]}, {"tokens": [1]}, {"tokens": [2]}]
        place_blocks(
            after,
            [
                # Two want the first one, of which one of them has two entries.
                Wanted(found[0], [(growing(4, 5, 6, 7), 0), (growing(1, 2), 2)]),
                Wanted(found[1], [(growing(0, 3, 9, 8), 0)]),
                Wanted(found[2], [(ending(1, 3, 5), 0), (ending(2, 8, 9), 0)]),
            ],
        )

    def same(layer, to, of):
        for name, leaf in after.layers[layer].items():
            assert leaf[to].tobytes() == before.layers[layer][name][of].tobytes()

    same(0, [4, 5, 6, 7, 1, 2, 0, 3, 9, 8], [0, 1, 2, 3, 2, 3, 9, 4, 5, 8])
    same(1, [3, 5, 8, 9], [7, 2, 7, 2])
    same(2, [1, 2], [6, 6])


def test_no_blocks_are_nothing(tmp_path):
    write_blocks([])
    with opened([]) as blocks:
        place_blocks(Pools(), blocks)
    assert list(together([], [])) == []


def test_a_block_without_arrays(tmp_path):
    """Of a model whose layers all have a window."""
    path = str(tmp_path / "kept.safetensors")
    write_blocks([NewBlock(path, FACTS, lambda spec: NONE, Pools(seed=1))])
    assert read(path, where=lambda spec: NONE) == ([FACTS], Pools().bits())


def test_groups_are_bounded_by_bytes_files_and_descriptors(monkeypatch):
    monkeypatch.setattr(kept_blocks, "PART_BYTES", 100)
    monkeypatch.setattr(kept_blocks, "MOST_TOGETHER", 3)
    assert list(together("abcdefg", [10] * 7)) == ["abc", "def", "g"]
    assert list(together("abcdefg", [60, 40, 1, 500, 1, 99, 1])) == ["ab", "c", "d", "ef", "g"]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 5, most[1]))
    try:
        assert list(together("abcde", [10] * 5)) == ["ab", "cd", "e"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)


def test_the_bytes_of_a_layer_are_those_that_a_block_has():
    pools = Pools("float32")
    assert bytes_of_layer(pools, growing(0, 1, 2)) == 3 * 48
    assert bytes_of_layer(pools, growing(0, 1, 2), 1) == 4 * 48
    assert bytes_of_layer(pools, ending(0, 1, 2)) == 2 * 48
    assert bytes_of_layer(pools, ending(0)) == 8 + 24
    assert bytes_of_layer(pools, lambda spec: NONE) == 0


def refused(path, *, said=""):
    """It is, in one line that names the file and ends with what to do."""
    pools = Pools()
    with pytest.raises(CheckpointError) as caught:
        read(path, pools)
    line = str(caught.value)
    assert line.startswith(f"{path}: a damaged block of a kept prompt (")
    assert line.endswith("); remove it")
    assert line.isprintable()
    assert said in line[:600]
    return line


@pytest.mark.parametrize("count", slow_but((400, 10_000), (400,)))
def test_a_block_with_other_bytes_is_refused_or_the_same(block, count):
    whole, expected = Path(block).read_bytes(), read(block)
    draw = random.Random(count)
    length = 8 + int.from_bytes(whole[:8], "little")
    n_refused = 0
    for _ in range(count):
        damaged = bytearray(whole)
        end = draw.choice((8, length, length, length, len(whole)))
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            at = draw.randrange(end)
            match draw.randrange(6):
                case 0 | 1 | 2:
                    damaged[at] ^= 1 << draw.randrange(8)
                case 3:
                    damaged[at] = draw.choice(b'"{}[],:0123456789 \\\x00\xff')
                case 4:
                    del damaged[at : at + draw.randrange(1, 40)]
                case 5:
                    damaged[at:at] = damaged[draw.randrange(end) :][: draw.randrange(1, 40)]
            end = min(end, len(damaged))
        with open(block, "wb") as file:
            file.write(damaged)
        try:
            assert read(block) == expected
        except CheckpointError as error:
            line = str(error)
            assert line.startswith(f"{block}: a damaged block"), line
            assert line.endswith("); remove it"), line
            assert line.isprintable(), line
            n_refused += 1
    assert n_refused > count * 0.9


def test_a_block_that_is_cut_off_is_refused(block):
    whole = Path(block).read_bytes()
    for length in (*range(0, len(whole), 37), len(whole) - 1):
        with open(block, "wb") as file:
            file.write(whole[:length])
        refused(block)


def test_a_block_that_is_cut_off_while_it_is_open_is_refused(block):
    with opened([block]) as blocks:
        os.truncate(block, os.path.getsize(block) - 1)
        with pytest.raises(CheckpointError, match=r"damaged block .*it ends in layer.*remove it$"):
            place_blocks(Pools(), [Wanted(blocks[0], [(everything, 0)])])


def digest(data):
    return xxhash.xxh3_128(data).hexdigest()


def forge(block, said, *, structs=None, n_bytes=None, metadata=None):
    """A block whose facts are this text, with a right digest of it."""
    tensors = read_header(block).tensors
    structs = structs or {name: (one.dtype, one.shape) for name, one in tensors.items()}
    own = {"jlayer-block": said, "jlayer-digest": digest(said.encode(errors="replace"))}
    header, _ = encode_tensors(structs, own if metadata is None else metadata)
    numbers = Path(block).read_bytes()[read_header(block).data_start :]
    path = f"{block}.forged"
    with open(path, "wb") as file:
        file.write(header + numbers)
        if n_bytes is not None:
            file.truncate(len(header) + n_bytes)
    return path


def said_by(block):
    return json.loads(read_header(block).metadata["jlayer-block"])


def test_a_forged_block_that_is_right_is_read(block):
    assert read(forge(block, json.dumps(said_by(block)))) == read(block)


@pytest.mark.parametrize(
    "said",
    [
        "null",
        "[]",
        '"facts"',
        "3",
        "",
        "{}",
        '{"facts": {}}',
        '{"digests": {}}',
        '{"facts": {}, "digests": {}}',
        '{"facts": {}, "digests": []}',
        '{"facts": {}, "digests": null}',
        '{"facts": {}, "digests": {"layer-00000.k": 3}}',
        '{"facts": {}, "digests": {"layer-00000.k": [[]]}}',
        '{"facts": "tokens", "digests": {}}',
        '{"facts": ["tokens"], "digests": {}}',
        '{"facts": null, "digests": {}}',
        '{"facts": {"tokens": NaN}, "digests": {}}',
        '{"facts": {"tokens": -Infinity}, "digests": {}}',
        '{"facts": {}, "facts": {"tokens": []}, "digests": {}}',
        '{"facts": {"tokens": ' + "9" * 5000 + '}, "digests": {}}',
        '{"facts": ' + '{"a": ' * 2000 + "1" + "}" * 2000 + ', "digests": {}}',
        "[" * 100_000 + "]" * 100_000,
        '{"facts": {}, "digests": {}} {}',
        "\ud800",
    ],
    ids=lambda said: said[:40] or "empty",
)
def test_facts_of_another_form_are_refused(block, said):
    refused(forge(block, said))


def test_metadata_of_another_form_is_refused(block):
    said = json.dumps(said_by(block))
    refused(forge(block, said, metadata={}), said="it has no jlayer-block")
    refused(forge(block, said, metadata={"jlayer-block": said}), said="it has no jlayer-digest")
    for value in (None, 3, [said], {"a": "b"}):
        refused(forge(block, said, metadata={"jlayer-block": value, "jlayer-digest": value}))


def test_arrays_of_other_layers_or_shapes_are_refused_before_memory_is_taken(block):
    said = json.dumps(said_by(block))
    tensors = read_header(block).tensors
    own = {name: (one.dtype, one.shape) for name, one in tensors.items()}
    n_bytes = sum(one.n_bytes for one in tensors.values())

    def forged(structs, n_bytes=n_bytes):
        return forge(block, said, structs=structs, n_bytes=n_bytes)

    for name in ("layer-00003.k", "layer-0.k", "layer-00000", "draft-00000.k", "layer-00000.w"):
        other = {name if one == "layer-00000.k" else one: how for one, how in own.items()}
        refused(forged(other), said="are not those of this model")
    k = own["layer-00000.k"]
    for dtype, shape in (("bfloat16", k[1]), (k[0], (2, *k[1][1:], 2)), (k[0], k[1][::-1])):
        refused(forged(own | {"layer-00000.k": (dtype, shape)}), said="of this model")
    # A file with a hole has as many bytes as it likes.
    huge = 1 << 34
    path = forged({"layer-00000.k": (k[0], (huge, *k[1][1:]))}, n_bytes=huge * 12)
    tracemalloc.start()
    refused(path, said="are not those of this model")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    os.unlink(path)
    with open(block, "r+b") as file:
        file.write((1 << 60).to_bytes(8, "little"))
    refused(block, said="header of 1152921504606846976 bytes")


def test_arrays_that_have_changed_places_are_refused(block):
    said = said_by(block)
    names = list(read_header(block).tensors)
    own = {name: (one.dtype, one.shape) for name, one in read_header(block).tensors.items()}
    one, other = names.index("layer-00000.k"), names.index("layer-00000.v")
    names[one], names[other] = names[other], names[one]
    path = forge(block, json.dumps(said), structs={name: own[name] for name in names})
    refused(path, said="is not that of its digest")


def test_what_is_no_file_is_refused_in_a_block_s_place(block, tmp_path):
    expected = read(block)
    moved = tmp_path / "moved"
    os.rename(block, moved)
    refused(block, said="missing")
    os.symlink(moved, block)
    assert read(block) == expected, "a link to it is as good"
    for make in (
        os.mkdir,
        os.mkfifo,
        lambda path: os.symlink(path, path),
        lambda path: os.symlink("nowhere", path),
        lambda path: os.symlink("/dev/zero", path),
    ):
        os.rmdir(block) if os.path.isdir(block) else os.unlink(block)
        make(block)
        refused(block)


def test_what_stands_in_the_way_of_a_new_block_is_replaced_or_named(tmp_path):
    path, pools = str(tmp_path / "kept.safetensors"), Pools(seed=1)
    new = NewBlock(path, FACTS, everything, pools)
    other = tmp_path / "other"
    other.write_text("of somebody else")
    for at in (path, path + ".jlayer-tmp"):
        for make in (
            os.mkfifo,
            lambda at: os.symlink(other, at),
            lambda at: os.symlink("nowhere", at),
            lambda at: os.link(other, at),
        ):
            make(at)
            write_blocks([new])
            assert set(os.listdir(tmp_path)) == {"other", "kept.safetensors"}
            assert read(path)[0] == [FACTS]
            assert other.read_text() == "of somebody else"
            os.unlink(path)
        os.mkdir(at)
        first = NewBlock(str(tmp_path / "first"), FACTS, everything, pools)
        with pytest.raises(StorageError) as caught:
            write_blocks([first, new])
        assert str(caught.value) == f"{at}: cannot be kept (Is a directory); remove it"
        assert set(os.listdir(tmp_path)) - {"first"} == {"other", os.path.basename(at)}
        os.rmdir(at)
        (tmp_path / "first").unlink(missing_ok=True)


def failing(errno, real, after):
    """A function that fails from its call number `after` on."""
    calls = iter(range(1 << 30))

    def call(*given):
        if next(calls) >= after:
            raise OSError(errno, os.strerror(errno))
        return real(*given)

    return call


@pytest.mark.parametrize("after", [0, 1, 5, 11, 12, 13])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch, after):
    pools = Pools(seed=1)
    blocks = [NewBlock(str(tmp_path / name), FACTS, everything, pools) for name in "ab"]
    n_open = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(28, os.pwrite, after))
        with pytest.raises(StorageError, match=r"^\S+/[ab]: cannot be kept \(No space left.*disk$"):
            write_blocks(blocks)
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == n_open
    write_blocks(blocks)
    assert read(blocks[1].path)[0] == [FACTS]


def test_a_disk_that_takes_a_part_at_a_time_has_it_all(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:7], at))
    path, pools = str(tmp_path / "kept"), Pools(seed=1)
    write_blocks([NewBlock(path, FACTS, lambda spec: np.arange(4), pools)])
    placed = Pools(seed=2)
    read(path, placed, lambda spec: np.arange(4))
    for own, found in zip(pools.layers, placed.layers, strict=True):
        for name, leaf in own.items():
            assert leaf[:4].tobytes() == found[name][:4].tobytes()


@pytest.mark.parametrize("name", ["fsync", "open", "rename", "statvfs"])
def test_an_error_of_the_disk_is_one_line(tmp_path, monkeypatch, name):
    blocks = [NewBlock(str(tmp_path / one), FACTS, everything, Pools(seed=1)) for one in "ab"]
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(5, getattr(os, name), name != "statvfs"))
        with pytest.raises(StorageError, match=r"^\S+: cannot be kept \(Input/output error\)$"):
            write_blocks(blocks)
    assert not [left for left in os.listdir(tmp_path) if "tmp" in left]


def test_the_folder_is_removed_while_blocks_are_written(tmp_path, monkeypatch):
    folder, real = tmp_path / "gone", os.fsync

    def gone(fd):
        for name in os.listdir(folder):
            os.unlink(folder / name)
        folder.rmdir()
        monkeypatch.setattr(os, "fsync", real)

    monkeypatch.setattr(os, "fsync", gone)
    with pytest.raises(StorageError, match=r"cannot be kept \(No such file or directory\)$"):
        write_blocks([NewBlock(str(folder / "a"), FACTS, everything, Pools(seed=1))])


@pytest.mark.parametrize("after", [0, 3])
def test_a_disk_that_cannot_be_read_is_one_line(block, monkeypatch, after):
    monkeypatch.setattr(os, "preadv", failing(5, os.preadv, after))
    with pytest.raises(StorageError) as caught:
        read(block)
    assert str(caught.value) == f"{block}: cannot be read (Input/output error)"


def test_files_are_closed_whatever_happens(block):
    n_open = len(os.listdir("/proc/self/fd"))
    for paths in ([block] * 3, [block, block + "-missing"]):
        try:
            with opened(paths) as blocks:
                assert len(os.listdir("/proc/self/fd")) == n_open + len(blocks)
        except JlayerError:
            pass
        assert len(os.listdir("/proc/self/fd")) == n_open
