"""What is refused is so however a folder is opened."""

import pytest

from jlayer.checkpoint.store import Store
from jlayer.convert import convert_checkpoint
from jlayer.errors import CheckpointError


def assert_refused(folder, tmp_path, words):
    """In place and converted alike, in one line."""
    for attempt in (
        lambda: Store(folder),
        lambda: convert_checkpoint(folder, tmp_path / "target"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            attempt()
        assert "\n" not in str(caught.value)
