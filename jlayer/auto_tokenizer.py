"""The tokenizer of transformers, under its name there."""

from __future__ import annotations

import os

from jlayer.checkpoint.hub import Weights, local_folder
from jlayer.engine.loading import NAMES, translated
from jlayer.errors import UsageError
from jlayer.interrupts import deferred
from jlayer.small_files import as_folder


class AutoTokenizer:
    """Named as in transformers."""

    @staticmethod
    def from_pretrained(ref: str | os.PathLike | None = None, *inputs, offline=False, **options):
        """The tokenizer as transformers gives it, of a folder, a GGUF file or a hub id. Code in a
        checkpoint is not run. Raises UsageError, and what `local_folder` and transformers raise."""
        ref = given_ref(ref, options)
        known = {name: options.pop(name) for name in NAMES & options.keys() - {"subfolder"}}
        ref, known = translated(ref, known)
        folder = local_folder(ref, weights=Weights.NONE, offline=known.get("offline", offline))
        with deferred(), as_folder(folder) as home:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(home, *inputs, **options)


def given_ref(ref, options: dict):
    """The model that is meant, also under transformers' name of the argument."""
    ref = options.pop("pretrained_model_name_or_path", ref)
    if ref is None:
        raise UsageError("ref: none given, expected a folder or a hub id")
    return ref
