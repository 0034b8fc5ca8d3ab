"""Published checkpoints to convert: session-wide ones to read, and fresh copies to damage."""

import shutil

import pytest

from tests.tiny import tiny_llama

KINDS = {
    "single": {},
    "sharded": {"sharded": True},
    "tied": {"tied": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """kind -> folder of a published checkpoint; read only."""
    home = tmp_path_factory.mktemp("published")
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tiny_llama(home / kind, **KINDS[kind])
        return made[kind]

    return make


@pytest.fixture
def copy_of(published, tmp_path):
    """kind -> a fresh copy of a published checkpoint, to be damaged."""

    def make(kind):
        return shutil.copytree(published(kind), tmp_path / "source")

    return make
