"""Whether a conversion fits on its disk: the peak of its bytes, in whole blocks."""

import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlayer.convert import convert_checkpoint
from jlayer.convert.target.space import peak_of
from jlayer.errors import DoesNotFitError
from tests.convert.checkpoints import random_checkpoint


def test_sizes_are_rounded_up_to_blocks():
    assert peak_of([("a", 1), ("b", 4096), ("c", 4097), ("d", 0)], freed={}, block=4096) == 4 * 4096


def test_what_is_freed_in_between_is_there_for_what_follows():
    sizes = [("a", 40), ("b", 40), ("c", 40)]
    assert peak_of(sizes, freed={}, block=1) == 120
    assert peak_of(sizes, freed={"a": 40}, block=1) == 80
    assert peak_of(sizes, freed={"a": 100}, block=1) == 40
    assert peak_of(sizes, freed={"c": 100}, block=1) == 120  # too late for all of them


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=8), st.integers(1, 9))
def test_the_peak_is_what_a_disk_of_that_size_just_holds(files, block):
    """Written file by file on a disk of as much room: it fits, and with one block less it does
    not."""
    sizes = [(str(n), size) for n, (size, _) in enumerate(files)]
    freed = {str(n): space for n, (_, space) in enumerate(files)}
    peak = peak_of(sizes, freed=freed, block=block)

    def fits(room):
        for name, size in sizes:
            room -= -(-size // block) * block
            if room < 0:
                return False
            room += freed[name]
        return True

    assert fits(peak)
    assert peak == 0 or not fits(peak - 1)


@pytest.fixture
def disk(monkeypatch):
    """How much room there is, as the system says."""
    real = os.statvfs

    def set_room(n_bytes):
        def statvfs(path):
            found = real(path)
            blocks = n_bytes // found.f_frsize
            return os.statvfs_result((*found[:3], blocks, blocks, *found[5:]))

        monkeypatch.setattr(os, "statvfs", statvfs)

    return set_room


def needed(source, target, **options):
    with pytest.raises(DoesNotFitError) as refusal:
        convert_checkpoint(source, target, **options)
    return int(str(refusal.value).split("need ")[1].split(" bytes")[0].replace(",", ""))


def test_removing_the_source_on_the_way_needs_less(tmp_path, disk):
    source = random_checkpoint(tmp_path / "source", n_shards=6, num_hidden_layers=6)
    disk(0)
    whole = needed(source, tmp_path / "target")
    less = needed(source, tmp_path / "target", delete_source=True)
    assert less < 2 * whole / 3
    disk(less - 4096)
    assert needed(source, tmp_path / "target", delete_source=True) == less
    disk(less)
    needed(source, tmp_path / "target")
    convert_checkpoint(source, tmp_path / "target", delete_source=True)
    assert not list(source.glob("*.safetensors"))


def test_a_source_with_other_names_elsewhere_frees_nothing(tmp_path, disk):
    source = random_checkpoint(tmp_path / "source", n_shards=6, num_hidden_layers=6)
    shutil.copytree(source, tmp_path / "linked", copy_function=os.link)
    disk(0)
    whole = needed(source, tmp_path / "target")
    assert needed(source, tmp_path / "target", delete_source=True) >= whole


def test_what_is_replaced_counts_as_room(tmp_path, disk):
    source = random_checkpoint(tmp_path / "source")
    other = random_checkpoint(tmp_path / "other", seed=1)
    convert_checkpoint(other, tmp_path / "target")
    had = sum(path.stat().st_blocks * 512 for path in (tmp_path / "target").iterdir())
    disk(0)
    need = needed(source, tmp_path / "fresh")
    disk(need - had - 4096)
    assert needed(source, tmp_path / "target", overwrite=True) == need
    disk(need - had)
    convert_checkpoint(source, tmp_path / "target", overwrite=True)
