"""What one run of a conversion leaves for the next: which source it is of, and what is finished.

A small file in the target while a conversion is under way, replaced as a whole and synced at every
step, and removed at the end. That a file is finished is not believed of it: the journal says what
SHA-256 it must have.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field

from convert.sources.files import FileSource, Place, TensorInfo
from convert.sources.open import CheckedSource
from convert.target.disk import remove, replace_file, sync_folder
from jlayer.checkpoint.layout import CONFIG, SIDE_FILES, check_seal, seal
from jlayer.checkpoint.quantization import Quantization
from jlayer.checkpoint.source import SourceFile, regular_file
from jlayer.config import model_config
from jlayer.errors import CheckpointError, UsageError
from jlayer.strict import is_there, parse_json_object, read_small_file, resolve

JOURNAL = ".jlayer-journal"
_VERSION = 1


@dataclass(frozen=True)
class Finished:
    """A weight file that is written: its SHA-256, the one that it would have in its source's dtype,
    its tensors' digests, and how many numbers in it are not finite, by tensor."""

    sha256: str
    source_sha256: str
    digests: dict[str, str]
    nonfinite: dict[str, int] = field(default_factory=dict)


@dataclass
class Journal:
    """`source` is what `describe` says; `removed` names the source's files that are to go or are
    gone, since all that needs them is finished."""

    source: dict
    finished: dict[str, Finished] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)

    def encode(self) -> bytes:
        finished = {name: asdict(entry) for name, entry in self.finished.items()}
        body = {"version": _VERSION, "source": self.source, "finished": finished}
        return seal({**body, "removed": self.removed})

    def write(self, folder: str) -> None:
        """Makes it durable. Raises DoesNotFitError or StorageError."""
        replace_file(os.path.join(folder, JOURNAL), self.encode())


def read_journal(folder: str) -> Journal:
    """The journal in a target. Raises CheckpointError where it is damaged, or StorageError."""
    path = os.path.join(folder, JOURNAL)
    raw = read_small_file(path)
    try:
        body = parse_json_object(raw, what=path)
        check_seal(raw, body, what=path)
        if body["version"] != _VERSION:
            raise CheckpointError(f"{path}: of version {body['version']!a}, expected {_VERSION}")
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(
            f"{path}: what an earlier run has noted cannot be used ({error}); "
            "start anew with --overwrite"
        ) from None
    finished = {name: Finished(**entry) for name, entry in body["finished"].items()}
    return Journal(body["source"], finished, body["removed"])


def remove_journal(folder: str) -> None:
    """The conversion is done."""
    remove(os.path.join(folder, JOURNAL))
    sync_folder(folder)


def describe(
    checked: CheckedSource, *, dtype: str | None, quantization: Quantization | None, whole: bool
) -> dict:
    """A source, and what it is to become, in plain words and numbers, by which it is known again.

    `whole`: all that is needed to go on where some of its files have been removed.
    """
    tensors = checked.tensors
    places = {name: tensors.places_of(name) for name in tensors.tensors}
    held = {}
    for name, info in tensors.tensors.items():
        for place in places[name]:
            line = f"{place.name} {info.dtype} {info.shape} {place.offset}"
            held.setdefault(place.file, []).append(line)
    sides = {name: file for name, file in checked.side_files.items() if name != CONFIG}
    found = {
        "folder": resolve(checked.folder),
        "dtype": dtype,
        "config": _digest(checked.config_bytes),
        "weights": {file.name: _file(file, lines) for file, lines in held.items()},
        "sides": {
            name: _digest(file) if isinstance(file, bytes) else _file(file)
            for name, file in sides.items()
        },
    }
    if quantization is not None:
        found["quantization"] = quantization.as_dict()
    if whole:
        found["whole"] = {
            "config": checked.config_bytes.decode(),
            "sides": {name: at.decode() for name, at in sides.items() if isinstance(at, bytes)},
            "tensors": {
                name: {
                    "dtype": info.dtype,
                    "shape": info.shape,
                    "places": [
                        (place.name, place.file.name, place.offset) for place in places[name]
                    ],
                }
                for name, info in tensors.tensors.items()
            },
        }
    return found


def refuse_another(then: dict, now: dict, *, target: str, gone: list[str]) -> None:
    """Raises unless a conversion that began with the source `then` can go on with `now`.

    UsageError for another source or other options, CheckpointError for the same one changed.
    `gone`: files that were removed, which forbids to advise a new start.
    """
    anew = "or start anew with --overwrite"
    if gone:
        anew = f"since it cannot start anew: {', '.join(gone)} are removed already"
    for option, before, after in (
        ("dtype", then["dtype"], now["dtype"]),
        ("quantize", _scheme_of(then), _scheme_of(now)),
    ):
        if before != after:
            raise UsageError(
                f"{target}: its conversion began with {option} {before or 'as published'}, not "
                f"{after or 'as published'}; run that command again to resume, {anew}"
            )
    name = _changed(then, now)
    if name is None:
        return
    if then["folder"] != now["folder"]:
        raise UsageError(
            f"{target}: holds an unfinished conversion of {then['folder']}, and {now['folder']} "
            f"differs from it ({name}); resume that one, {anew}"
        )
    raise CheckpointError(
        f"{os.path.join(now['folder'], name)}: changed since the conversion to {target} began; put "
        f"back what was there and run the same command again to resume, {anew}"
    )


def chosen_before(
    journal: Journal | None, checked: CheckedSource, scheme: str
) -> Quantization | None:
    """What an earlier run on this source has chosen to keep in which form, where it had the same
    scheme in mind: to choose anew takes a source that is whole."""
    if journal is None or _scheme_of(journal.source) != scheme:
        return None
    if _changed(journal.source, describe(checked, dtype=None, quantization=None, whole=False)):
        return None
    return Quantization.from_dict(journal.source["quantization"])


def _scheme_of(source):
    return source["quantization"]["scheme"] if "quantization" in source else None


def restore_source(folder: str, journal: Journal) -> CheckedSource:
    """The source in `folder` as it was when some of its files were not yet removed.

    Raises CheckpointError where one is missing that was not, or StorageError.
    """
    then = journal.source
    whole = then["whole"]
    files = {
        name: _restored_file(folder, name, entry, removed=name in journal.removed)
        for name, entry in then["weights"].items()
    }
    infos = {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]))
        for name, entry in whole["tensors"].items()
    }
    places = {
        name: tuple(Place(own, files[file], offset) for own, file, offset in entry["places"])
        for name, entry in whole["tensors"].items()
    }
    config_bytes = whole["config"].encode()
    path = os.path.join(folder, CONFIG)
    cfg = model_config(json.loads(config_bytes), where=path)
    if is_there(path, follow=False):
        config_bytes = read_small_file(regular_file(folder, CONFIG).real)
    sides = {name: text.encode() for name, text in whole["sides"].items()}
    for name in SIDE_FILES:
        if is_there(os.path.join(folder, name), follow=False):
            sides[name] = regular_file(folder, name)
    return CheckedSource(folder, cfg, config_bytes, FileSource(infos, places), sides, ())


def _restored_file(folder, name, entry, *, removed):
    path = os.path.join(folder, name)
    if removed and not is_there(path):
        identity = (0, 0, entry["bytes"], entry["changed_ns"])
        return SourceFile(name, path, resolve(path, strict=False), entry["bytes"], identity)
    return regular_file(folder, name)


def _file(file, lines=()):
    *_, n_bytes, changed_ns = file.identity
    found = {"bytes": n_bytes, "changed_ns": changed_ns}
    return {**found, "tensors": _digest("\n".join(sorted(lines)).encode())} if lines else found


def _digest(content):
    return hashlib.sha256(content).hexdigest()


def _changed(then, now):
    """The first file of the source that is not as it was."""
    if then["config"] != now["config"]:
        return CONFIG
    for kind in ("weights", "sides"):
        for name in sorted({**then[kind], **now[kind]}):
            if then[kind].get(name) != now[kind].get(name):
                return name
    return None
