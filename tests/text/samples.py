"""Tokenizers and texts that the tests of this room share."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest

from jlayer.text.tokenizer import Tokenizer
from tests.conftest import BUNDLED, NO_SHARED_DATA, SHARED_DATA

LARGE = ("llama2", "llama3", "mistral-v1")
SMALL = ("fable-1m", "fable-3m", "stories260K", "aidreams260K")
FILES = ("tokenizer.json", "tokenizer.model")
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
TEXTS = [
    "Hello, world!",
    "  two leading spaces, two trailing  ",
    "日本語のテキストと中文文本。",
    "😀👩‍👩‍👧‍👦 flags 🇫🇷 and ✨",
    "e\u0301 combining, n\u0303, Z\u0351\u0357a\u030a\u0325lgo",
    "Привет, как дела? שלום مرحبا",
    "ᚠᛇᚻ and \u200d zero \u00a0 width \u0000\u0001",
    "def f(x):\n\treturn x**2  # square\n\n",
    "",
    " ",
    "▁literal ▁ piece",
    "\U0001d518\U0001d52b\U0001d526 𐍈 ꙮ",
]
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}"
    "{% endfor %}"
)


@functools.cache
def load(name, only=None):
    """The tokenizer of a folder of the shared data, through one of its two files if so asked."""
    folder = folder_of(name)
    if only is None:
        return Tokenizer.from_folder(folder)
    with tempfile.TemporaryDirectory() as copy:
        for file in (*COMPANIONS, only):
            if (folder / file).exists():
                Path(copy, file).symlink_to(folder / file)
        return Tokenizer.from_folder(copy)


def folder_of(name):
    """A folder of the shared data; skips the test where they are not beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(NO_SHARED_DATA)
    return SHARED_DATA / ("tokenizers" if name in LARGE else "checkpoints") / name


@functools.cache
def bundled():
    return Tokenizer.from_folder(BUNDLED)


def edited(tmp_path, source, **changes):
    """A copy of a small tokenizer's folder with {file name without .json: what to change}."""
    for name in ("tokenizer.json", *COMPANIONS):
        if (source / name).exists():
            shutil.copyfile(source / name, tmp_path / name)
    for stem, change in changes.items():
        path = tmp_path / f"{stem}.json"
        raw = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(raw | change))
    return tmp_path


def user(content):
    return [{"role": "user", "content": content}]


def written(rendered):
    """(control tokens the template wrote, text of all else)."""
    return [text for text, real in rendered.parts if real], [
        text for text, real in rendered.parts if not real
    ]
