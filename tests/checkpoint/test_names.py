"""Names from outside: one rule for files, one for tensors, whatever format they come in."""

import pytest

from jlayer.strict import MAX_NAME, is_relative_path, is_tensor_name

# name, may be a file below a folder, may be a tensor
NAMES = [
    ("model.safetensors", True, True),
    ("a/b.bin", True, True),
    ("a" * 255, True, True),
    ("a" * 256, False, True),
    ("é" * 128, False, True),  # 256 bytes
    ("a/" * 499 + "aa", True, True),
    ("a" * (MAX_NAME + 1), False, False),
    ("", False, False),
    ("/a", False, False),
    ("a//b", False, True),
    ("a/", False, True),
    ("./a", False, True),
    ("../a", False, False),
    ("a/../b", False, False),
    ("a..b", True, False),
    ("a\\b", False, False),
    ("C:a", False, True),
    ("a\0b", False, False),
    ("a\nb", False, False),
    ("a\ud800", False, False),
    ("a\u202eb", False, False),  # what turns the direction of text around
]


@pytest.mark.parametrize(
    ("name", "is_file", "is_tensor"), NAMES, ids=lambda found: ascii(found)[:9]
)
def test_a_name_is_a_path_below_a_folder_or_a_tensors_or_neither(name, is_file, is_tensor):
    assert is_relative_path(name) is is_file
    assert is_tensor_name(name) is is_tensor


@pytest.mark.parametrize("name", [None, 3, ["a"], b"a"])
def test_what_is_no_text_is_no_path(name):
    assert not is_relative_path(name)
