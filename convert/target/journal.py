"""The journal of a conversion: its source, and the files that are finished. A run resumes from it.

It is a small file in the target while a conversion runs. Each change replaces it whole and syncs
it; the end of the conversion removes it. A file that it lists as finished is not trusted but read
again: the journal has the SHA-256 that it must have.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace

from jlayer.checkpoint.layout import CONFIG, MERGED, seal
from jlayer.checkpoint.quantization import Quantization
from jlayer.checkpoint.rows import Host
from jlayer.checkpoint.sides import side_names
from jlayer.checkpoint.source import SourceFile, names_in, regular_file
from jlayer.config import model_config
from jlayer.convert.sources.files import FileSource, Place, TensorInfo
from jlayer.convert.sources.open import CheckedSource
from jlayer.convert.target.disk import remove, replace_file, sync_folder
from jlayer.convert.target.sealed import read_sealed
from jlayer.convert.transform.pruned import Pruning
from jlayer.errors import CheckpointError, UsageError
from jlayer.families.base import HEAD
from jlayer.strict import is_there, read_small_file, resolve

JOURNAL = ".jlayer-journal"
_VERSION = 1


@dataclass(frozen=True)
class FinishedFile:
    """A weight file that is written.

    `source_sha256`: the SHA-256 that it would have in its source's dtypes. `digests`: by tensor.
    `nonfinite`: by tensor, how many of its numbers are NaN or infinite.
    """

    sha256: str
    source_sha256: str
    digests: dict[str, str]
    nonfinite: dict[str, int] = field(default_factory=dict)


@dataclass
class Journal:
    """`source`: what `describe_source` says. `removed`: the source files that were removed or are
    about to be."""

    source: dict
    finished: dict[str, FinishedFile] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)

    def encode(self) -> bytes:
        finished = {name: asdict(entry) for name, entry in self.finished.items()}
        body = {"version": _VERSION, "source": self.source, "finished": finished}
        return seal({**body, "removed": self.removed})

    def write(self, folder: str) -> None:
        """Writes it into the target and syncs it. Raises DoesNotFitError or StorageError."""
        replace_file(os.path.join(folder, JOURNAL), self.encode())


def read_journal(folder: str) -> Journal:
    """The journal in a target. Raises CheckpointError where it is damaged, or StorageError."""
    path = os.path.join(folder, JOURNAL)
    body = read_sealed(path, version=_VERSION, what="the journal of the interrupted run")
    finished = {name: FinishedFile(**entry) for name, entry in body["finished"].items()}
    return Journal(body["source"], finished, body["removed"])


def remove_journal(folder: str) -> None:
    """Removes the journal; the conversion is finished."""
    remove(os.path.join(folder, JOURNAL))
    sync_folder(folder)


def describe_source(
    checked: CheckedSource,
    *,
    dtype: str | None,
    quantization: Quantization | None,
    restorable: bool,
    host: Host | None = None,
    pruning: Pruning | None = None,
) -> dict:
    """A source and its conversion as plain JSON, by which a later run knows both again.

    `restorable`: with everything that `restore_source` needs once source files are removed.
    """
    sides = {name: file for name, file in checked.side_files.items() if name != CONFIG}
    description = {
        "folder": resolve(checked.folder),
        "dtype": dtype,
        "config": _digest(checked.config_bytes),
        "weights": {
            file.name: _file(file, lines) for file, lines in _lines_by_file(checked).items()
        },
        "sides": {
            name: _digest(file) if isinstance(file, bytes) else _file(file)
            for name, file in sides.items()
        },
    }
    if quantization is not None:
        description["quantization"] = quantization.as_dict()
    if host is not None:
        description["rows"] = host.as_dict()
    if pruning is not None:
        description["pruned"] = pruning.as_dict()
    if restorable:
        description["whole"] = {
            "config": checked.config_bytes.decode(),
            "sides": {name: at.decode() for name, at in sides.items() if isinstance(at, bytes)},
            "tensors": {name: _tensor(checked.tensors, name) for name in checked.tensors.tensors},
        }
    return description


def _lines_by_file(checked):
    """Each weight file with a line a tensor that lies in it."""
    lines = {}
    for name, info in checked.tensors.tensors.items():
        for place in checked.tensors.places_of(name):
            line = f"{place.name} {info.dtype} {info.shape} {place.offset}"
            lines.setdefault(place.file, []).append(line)
    return lines


def _tensor(source, name):
    info = source.tensors[name]
    places = [(place.name, place.file.name, place.offset) for place in source.places_of(name)]
    return {"dtype": info.dtype, "shape": info.shape, "places": places}


def check_same_conversion(then: dict, now: dict, *, target: str, removed: list[str]) -> None:
    """Raises unless a conversion of the source `then` can be resumed with the source `now`.

    UsageError for another source or other options, CheckpointError for the same source changed.
    `removed`: source files that are gone, so that no new start can be advised.
    """
    anew = "or start again with --overwrite"
    if removed:
        anew = f"since it cannot start again: {', '.join(removed)} are removed already"
    for option, before, after, absent in (
        ("dtype", then["dtype"], now["dtype"], "as published"),
        ("quantize", _scheme_of(then), _scheme_of(now), "as published"),
        ("rows", _host_of(then), _host_of(now), "of all hosts"),
        ("layers left out", _dropped(then), _dropped(now), "none"),
        ("merge", then["sides"].get(MERGED), now["sides"].get(MERGED), "of no adapter"),
    ):
        if before != after:
            raise UsageError(
                f"{target}: its conversion began with {option} {before or absent}, not "
                f"{after or absent}; run that command again to resume, {anew}"
            )
    name = _first_change(then, now)
    if name is None:
        return
    if then["folder"] != now["folder"]:
        raise UsageError(
            f"{target}: holds an unfinished conversion of {then['folder']}, and {now['folder']} "
            f"differs from it ({name}); resume that one, {anew}"
        )
    mendable = name != CONFIG and name in {**then["sides"], **now["sides"]}
    later = " (jlayer seal takes the new one into the finished folder)" if mendable else ""
    raise CheckpointError(
        f"{os.path.join(now['folder'], name)}: changed since the conversion to {target} began; "
        f"restore what was there and run the same command again to resume{later}, {anew}"
    )


def quantization_to_resume(
    journal: Journal | None, checked: CheckedSource, scheme: str
) -> Quantization | None:
    """The quantization that an interrupted run chose for this source and scheme; None for none.

    A new choice would need all files of the source, and some may be removed.
    """
    if journal is None or _scheme_of(journal.source) != scheme:
        return None
    now = describe_source(checked, dtype=None, quantization=None, restorable=False)
    if _first_change(journal.source, now):
        return None
    return Quantization.from_dict(journal.source["quantization"])


def _host_of(source):
    return Host.from_dict(source["rows"]) if "rows" in source else None


def _dropped(source):
    """The layers that are left out, in words."""
    return ", ".join(map(str, source["pruned"]["dropped"])) if "pruned" in source else None


def _scheme_of(source):
    return source["quantization"]["scheme"] if "quantization" in source else None


def restore_source(folder: str, journal: Journal) -> CheckedSource:
    """The checked source in `folder` as it was before some of its files were removed.

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
    cfg = replace(cfg, tie_word_embeddings=HEAD.published not in infos)
    if is_there(path, follow=False):
        config_bytes = read_small_file(regular_file(folder, CONFIG).real)
    sides = {name: text.encode() for name, text in whole["sides"].items()}
    sides |= {name: regular_file(folder, name) for name in side_names(folder, names_in(folder))}
    chosen = Quantization.from_dict(then["quantization"]) if "quantization" in then else None
    published = chosen and chosen.as_published
    tensors = FileSource(infos, places)
    return CheckedSource(folder, cfg, config_bytes, tensors, sides, (), published)


def _restored_file(folder, name, entry, *, removed):
    path = os.path.join(folder, name)
    if removed and not is_there(path):
        identity = (0, 0, entry["bytes"], entry["changed_ns"])
        return SourceFile(name, path, resolve(path, strict=False), entry["bytes"], identity)
    return regular_file(folder, name)


def _file(file, lines=()):
    *_, n_bytes, changed_ns = file.identity
    entry = {"bytes": n_bytes, "changed_ns": changed_ns}
    return {**entry, "tensors": _digest("\n".join(sorted(lines)).encode())} if lines else entry


def _digest(content):
    return hashlib.sha256(content).hexdigest()


def _first_change(then, now):
    """The name of the first source file that has changed; None where none has."""
    if then["config"] != now["config"]:
        return CONFIG
    for kind in ("weights", "sides"):
        for name in sorted({**then[kind], **now[kind]}):
            if then[kind].get(name) != now[kind].get(name):
                return name
    return None
