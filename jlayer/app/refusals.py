"""What `generate` would refuse of the files beside a model's weights, said before hours of work."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from jlayer.checkpoint.layout import CONFIG
from jlayer.checkpoint.source import GENERATION_CONFIG, SourceFile
from jlayer.config import read_config, read_generation_config
from jlayer.engine.options import SamplingOptions
from jlayer.errors import JlayerError
from jlayer.strict import read_json_object
from jlayer.text.tokenizer import Tokenizer


def refused_in_source(checked) -> list[str]:
    """Notes on a source that is about to be converted, a `CheckedSource`."""
    beside = [
        file.path
        for name, file in checked.side_files.items()
        if isinstance(file, SourceFile) and "/" not in name
    ]
    home = os.path.dirname(beside[0]) if beside else checked.folder
    return [*_of_options(*_generation_of(checked), checked.cfg.vocab_size), *_of_text(home)]


def refused_in_folder(folder: str) -> list[str]:
    """Notes on a folder whose config.json was checked."""
    name = GENERATION_CONFIG if os.path.exists(os.path.join(folder, GENERATION_CONFIG)) else CONFIG
    options, where = read_generation_config(folder), os.path.join(folder, name)
    return [*_of_options(options, where, read_config(folder).vocab_size), *_of_text(folder)]


def _generation_of(checked):
    """The file that counts, as JSON, and what to call it."""
    found = checked.side_files.get(GENERATION_CONFIG)
    if isinstance(found, SourceFile):
        return read_json_object(found.real), found.path
    name = CONFIG if found is None else GENERATION_CONFIG
    content = checked.config_bytes if found is None else found
    return json.loads(content), os.path.join(checked.folder, name)


def _of_options(options: Mapping, where: str, vocab_size: int) -> list[str]:
    try:
        SamplingOptions.from_mapping(
            {}, generation_config=options, vocab_size=vocab_size, where=where
        )
    except JlayerError as error:
        return [f"as it stands, jlayer generate will refuse this: {error.command_line}"]
    return []


def _of_text(folder: str) -> list[str]:
    try:
        Tokenizer.from_folder(folder)
    except JlayerError as error:
        return [f"as it stands, jlayer generate will refuse text: {error.command_line}"]
    return []
