"""A tiny model opened twice, here and in transformers, under the same published options."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

import jlayer
from tests.tiny import tiny_llama


class Both:
    """`ours` and `theirs`, the same weights in float32; `text` continues without an end."""

    def __init__(self, folder: Path):
        transformers = pytest.importorskip("transformers")
        self.folder, self.transformers = folder, transformers
        self.theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        self.ours = jlayer.AutoModel.from_pretrained(folder, device="cpu")
        self._before = self.ours.generation_config, self.theirs.generation_config

    @contextmanager
    def published(self, **options):
        """Both with these options as their makers' own, and no others."""
        self.ours.generation_config = json.loads(json.dumps(options))
        self.theirs.generation_config = self.transformers.GenerationConfig(**options)
        try:
            yield self
        finally:
            self.ours.generation_config, self.theirs.generation_config = self._before

    def same(self, inputs, **options):
        """What both give, which is the same: ids [B, T] as lists."""
        theirs = self.theirs.generate(inputs, **options)
        ours = self.ours.generate(inputs, **options)
        assert type(ours) is type(theirs)
        assert ours.tolist() == theirs.tolist()
        return ours.tolist()


def opened(folder) -> Both:
    return Both(tiny_llama(folder, eos_token_id=None, bos_token_id=None))
