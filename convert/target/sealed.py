"""Small files in a target that say of themselves whether they are as they were written."""

from __future__ import annotations

from jlayer.checkpoint.layout import check_seal
from jlayer.errors import CheckpointError
from jlayer.strict import parse_json_object, read_small_file


def read_sealed(path: str, *, version: int, what: str) -> dict:
    """What `seal` made, of this version. `what`: the file, in words. Raises CheckpointError where
    it is damaged or of another version, or StorageError."""
    raw = read_small_file(path)
    try:
        body = parse_json_object(raw, what=path)
        check_seal(raw, body, what=path)
        if body["version"] != version:
            raise CheckpointError(f"of version {body['version']!a}, expected {version}")
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(
            f"{path}: {what} cannot be used ({error}); start again with --overwrite"
        ) from None
    return body
