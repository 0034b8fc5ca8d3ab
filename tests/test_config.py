"""Options as users write them: sizes, and what is refused."""

import json

import pytest

from jlayer.config import model_config, read_config
from jlayer.errors import CheckpointError, UnsupportedModelError, UsageError
from jlayer.run_config import RunConfig
from jlayer.sizes import counted, human, parse_bytes
from tests.conftest import BUNDLED

SIZES = {
    1: 1,
    "1": 1,
    "0b1000": None,
    "512MiB": 512 << 20,
    "4GiB": 4 << 30,
    " 3.5 GB ": 3_500_000_000,
    "2k": 2000,
    "2ki": 2048,
    "1t": 10**12,
    "7b": 7,
    "0.5": None,  # less than a byte
    "0": None,
    0: None,
    -1: None,
    "-1": None,
    "": None,
    "4 GiB free": None,
    "1e9": None,
    "nan": None,
    "inf": None,
    "9" * 18: 10**18,
    "9" * 400: None,  # beyond float64
    "9" * 5000: None,  # beyond the digits that Python reads as an int
    "8388608TiB": None,  # 2**63
    1 << 63: None,
}


@pytest.mark.parametrize("given", SIZES, ids=lambda given: repr(given)[:20])
def test_a_size_is_a_number_of_bytes_or_refused_by_option(given):
    if SIZES[given] is None:
        with pytest.raises(
            UsageError, match=r"^host_memory: found .*, expected a size such as 4GiB"
        ):
            parse_bytes(given, option="host_memory")
    else:
        assert parse_bytes(given, option="host_memory") == SIZES[given]


def test_true_is_no_size():
    with pytest.raises(UsageError, match="device_memory: found True"):
        RunConfig.from_options(device_memory=True)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (5 << 20, "5.00 MiB"),
        (3 << 29, "1.50 GiB"),
        (7 << 40, "7168.00 GiB"),
    ],
)
def test_bytes_are_shown_in_binary_units(n_bytes, text):
    assert human(n_bytes) == text


def test_a_draft_model_is_a_folder_or_a_hub_id(tmp_path):
    assert RunConfig.from_options(draft=None).draft is None
    assert RunConfig.from_options(draft=tmp_path).draft == str(tmp_path)
    for given in ("", 3, object()):
        with pytest.raises(UsageError, match=r"draft: found .*, expected a folder or a hub id"):
            RunConfig.from_options(draft=given)


def test_an_unknown_option_names_the_closest_one():
    with pytest.raises(UsageError, match="option 'host_memry' is not known: did you mean 'host_m"):
        RunConfig.from_options(host_memry="4GiB")


def test_a_config_that_names_other_files_by_version_is_refused():
    """transformers reads config.4.0.0.json there, and jlayer would run another model."""
    raw = json.loads((BUNDLED / "config.json").read_text())
    assert model_config({**raw, "configuration_files": []}, where="config.json")
    with pytest.raises(UnsupportedModelError, match="configuration_files is"):
        model_config({**raw, "configuration_files": ["config.4.0.0.json"]}, where="config.json")


def test_a_config_that_a_clone_left_at_git_lfs_is_named(tmp_path):
    """As in jujunchen/OpenXLab_Model_Rep@73614ba1ef00 and Regulus1024/Text2SQL@d7c18057079b."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'e' * 64}\nsize 772\n"
    (tmp_path / "config.json").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"config\.json: a Git LFS pointer.* git lfs pull"):
        read_config(tmp_path)


def test_one_thing_is_said_as_one():
    assert [counted(n, "text") for n in (0, 1, 2, 1204)] == [
        *("0 texts", "1 text", "2 texts", "1,204 texts"),
    ]
    assert counted(1, "forward pass", "forward passes") == "1 forward pass"
    assert counted(3, "forward pass", "forward passes") == "3 forward passes"
