"""Takes changed, added and removed side files of a layered folder into its manifest.

The weights stay sealed as they were converted: a config that describes others is refused. The new
manifest replaces the old one in one step, and not before the files that it lists are on disk; so a
run that is stopped leaves the old one or the new one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from jlayer.checkpoint.layout import (
    CONFIG,
    INDEX,
    MANIFEST,
    FileEntry,
    Manifest,
    encode_index,
    encode_manifest,
    is_layered,
    read_manifest,
)
from jlayer.checkpoint.quantization import stored_tensors
from jlayer.checkpoint.sides import SideChanges, entry_of, side_changes
from jlayer.checkpoint.source import GENERATION_CONFIG, names_in
from jlayer.checkpoint.store import locate
from jlayer.config import own_quantization, read_config
from jlayer.convert.progress import Progress
from jlayer.convert.target.disk import failure, replace_file, sync_folder
from jlayer.convert.target.journal import JOURNAL
from jlayer.convert.target.lock import TargetLock
from jlayer.convert.target.write import remove_temporaries
from jlayer.errors import CheckpointError
from jlayer.families.layout import FROM_GGUF
from jlayer.families.registry import published_tensors
from jlayer.spec import ModelConfig
from jlayer.strict import close, is_there, open_regular, read_json_object, read_small_file


@dataclass(frozen=True)
class Sealed:
    """What a sealing did. `status`: "sealed", or "unchanged" where the manifest was right already.

    `restored`: files that are made of the manifest alone, and were made again. `notes`: what the
    user should hear.
    """

    folder: str
    status: str
    changed: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    restored: tuple[str, ...]
    notes: tuple[str, ...]


def seal_folder(
    folder: str | os.PathLike,
    *,
    progress: Progress | None = None,
) -> Sealed:
    """Makes the manifest of a layered folder that of its side files as they are now.

    Raises CheckpointError (no finished folder, or one that would not open any more), LockedError,
    DoesNotFitError or StorageError.
    """
    folder, progress = os.fspath(folder), progress or Progress()
    names_in(folder)
    if not is_layered(folder):
        raise CheckpointError(
            f"{folder}: no {MANIFEST}: not converted, or not to the end; only a converted folder "
            "is sealed"
        )
    with TargetLock(folder, note=progress.note):
        return _seal(folder, progress)


def _seal(folder, progress):
    names = remove_temporaries(folder)
    if JOURNAL in names:
        raise CheckpointError(
            f"{folder}: its conversion has not ended; run that command again, then seal"
        )
    manifest = read_manifest(folder)
    _check_config(folder, manifest)
    changes = side_changes(folder, manifest, names)
    if GENERATION_CONFIG in (changes.changed | changes.added):
        read_json_object(os.path.join(folder, GENERATION_CONFIG))
    restored = _restore_index(folder, manifest)
    _sync(folder, [*changes.changed, *changes.added])
    sealed = replace(manifest, files=_files(folder, manifest, changes))
    if sealed != manifest:
        replace_file(os.path.join(folder, MANIFEST), encode_manifest(sealed))
    foreign = sorted(set(names) - sealed.files.keys() - {MANIFEST})
    notes = [f"{folder}: no part of it, and left as it is: {name!a}" for name in foreign]
    for note in notes:
        progress.note(note)
    return Sealed(
        folder=folder,
        status="sealed" if sealed != manifest or restored else "unchanged",
        changed=tuple(changes.changed),
        added=tuple(changes.added),
        removed=changes.removed,
        restored=restored,
        notes=tuple(notes),
    )


def _check_config(folder, manifest):
    """Raises CheckpointError unless config.json describes the weights that are there."""
    path = os.path.join(folder, CONFIG)
    cfg, said = read_config(folder), own_quantization(read_json_object(path))
    if cfg.model_type != manifest.family:
        raise CheckpointError(
            f"{path}: describes a model of family {cfg.model_type}, but the weights are of family "
            f"{manifest.family}; {_put_back(folder)}"
        )
    scheme = manifest.quantization and manifest.quantization.scheme
    said = None if said == FROM_GGUF else said  # its encodings are in the manifest
    if said != scheme:
        raise CheckpointError(
            f"{path}: quantization_config names the scheme {said!a} of jlayer's, but the weights "
            f"are stored in {scheme!a}; {_put_back(folder)}"
        )
    _check_shapes(path, folder, manifest, cfg)
    locate(folder, cfg, manifest)


def _check_shapes(path: str, folder: str, manifest: Manifest, cfg: ModelConfig):
    """All tensors, and no others: a config of fewer layers would fit those that are left."""
    here = {n: shape for file in manifest.files.values() for n, shape in file.whole_shapes.items()}
    wanted = stored_tensors(published_tensors(cfg), manifest.quantization)
    wrong = sorted(
        name for name in here.keys() | wanted.keys() if here.get(name) != wanted.get(name)
    )
    if wrong:
        first, more = wrong[0], f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{path}: describes other weights than those that are there: {first} has the shape "
            f"{_shape(here.get(first))}, by {CONFIG} {_shape(wanted.get(first))}{more}; "
            f"{_put_back(folder)}"
        )


def _shape(shape):
    return "none" if shape is None else list(shape)


def _put_back(folder):
    return f"put back what it said of that, then run: jlayer seal {folder}"


def _restore_index(folder: str, manifest: Manifest) -> tuple[str, ...]:
    """Writes the index again where it is not as converted; all of it follows from the manifest."""
    path = os.path.join(folder, INDEX)
    content = encode_index({name: e.tensors for name, e in manifest.files.items() if e.tensors})
    if is_there(path, follow=False) and read_small_file(path) == content:
        return ()
    replace_file(path, content)
    return (INDEX,)


def _files(folder: str, manifest: Manifest, changes: SideChanges) -> dict[str, FileEntry]:
    kept = {name: e for name, e in manifest.files.items() if name not in changes.removed}
    index = {INDEX: entry_of(os.path.join(folder, INDEX))}
    return kept | changes.changed | changes.added | index


def _sync(folder, names):
    """Makes side files durable, which some editor may have written a moment ago."""
    for name in names:
        path = os.path.join(folder, name)
        fd = open_regular(path)
        try:
            os.fsync(fd)
        except OSError as error:
            raise failure(path, error, "synced") from None
        finally:
            close(fd)
    below = {os.path.dirname(name) for name in names} - {""}
    for home in [*(os.path.join(folder, name) for name in sorted(below)), folder]:
        sync_folder(home)
