"""The model that is part of the package: fable-3m, 6 MB, trained for this project."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jlayer
from jlayer.app.streams import tell

BUNDLED = Path(jlayer.__file__).parent / "data" / "fable-3m"


@contextmanager
def converted_bundled() -> Iterator[Path]:
    """Yields a temporary folder with the bundled model, converted."""
    from jlayer.convert import convert_checkpoint

    with tempfile.TemporaryDirectory(prefix="jlayer-") as folder:
        tell("converting the bundled fable-3m to one file a layer")
        convert_checkpoint(BUNDLED, Path(folder) / "fable-3m")
        yield Path(folder) / "fable-3m"
