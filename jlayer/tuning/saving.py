"""Checkpoints of a run: the adapter, the optimiser's two moments, and the facts of the run, as
steps of an `orbax.checkpoint.CheckpointManager`.

A step appears whole or not at all: Orbax writes it beside, under a name that says so, and renames
it; here it is synced, and a file in it says so. One without that file may be anything after a power
cut: if its numbers are those of its digest it is taken, else it is removed.

The trees are written as one vector, and the facts say what lies where in it: Orbax takes about a
millisecond an array, of which a large model has thousands, and where one of several cannot be
written, those that are still under way print tracebacks of their own.
Orbax does not check the numbers that it reads; a digest of them is among the facts.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass

from jlayer.checkpoint.orbax_errors import first_line, quiet_orbax, system_code
from jlayer.durable import FULL, sync_folder, sync_tree
from jlayer.errors import CheckpointError, StorageError
from jlayer.interrupts import imported
from jlayer.strict import close
from jlayer.tuning.adapter import State
from jlayer.tuning.disk import UNSAVED

_TREES = ("params", "mu", "nu")
_STATE, _FACTS = "state", "facts"  # the items of a step
SYNCED = "synced"  # a file in a step that is on the disk
# What else Orbax makes in a step, besides its items.
_OF_ORBAX = ("_CHECKPOINT_METADATA", "commit_success.txt")
_FORMAT = "jlayer tune 1"
_VECTOR = "numbers"
_CHUNK_BYTES = 64 << 20  # written at once
_SPARE_BYTES = 1 << 20  # of a disk, for what Orbax writes beside the numbers


@dataclass(frozen=True, eq=False)
class Saved:
    """A run after `step` steps. `params`, `mu`, `nu`: the adapter and its moments, of the same
    names and shapes, float32. `facts`: what JSON can hold: what must be the same for the run to go
    on, and what is reported."""

    step: int
    params: State
    mu: State
    nu: State
    facts: dict


class Checkpoints:
    """The checkpoints of one run, in a folder of their own; the newest `keep` stay: with two, one
    is on the disk at any moment. The caller sees to it that no other process uses the folder. A
    context manager.

    Orbax starts JAX's backends: what must be set before that is set before the first call. Saving
    takes twice the state's bytes of host memory for the time being.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        self._folder, self._keep = os.path.abspath(folder), keep
        self._opened = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def latest(self) -> Saved | None:
        """The newest complete one, byte for byte as it was saved; None where there is none. What a
        killed run or a power cut has left unfinished is removed.

        Raises CheckpointError for one that is damaged, or StorageError.
        """
        for step in reversed(self._steps()):
            found = self._read_whole(step)
            if found is not None:
                return found
        return None

    def _read_whole(self, step):
        """A step; None where it was unfinished, and is removed."""
        path = self._path(step)
        try:
            found = self._read(step)
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            code = system_code(error)
            if code not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                raise StorageError(f"{path}: cannot be read ({os.strerror(code)})") from None
            if not _is_unfinished(path):
                raise CheckpointError(self._damage(step, first_line(error))) from None
            self._remove(step)
            return None
        if not _is_synced(path):
            try:
                self._sync(step)
            except OSError as error:
                raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
        return found

    def save(self, saved: Saved) -> None:
        """Writes one; it is whole and on the disk when this returns. Its step is above all others.

        Raises StorageError; then those before it are as they were.
        """
        if os.path.lexists(self._path(saved.step)) and not _is_synced(self._path(saved.step)):
            self._remove(saved.step)  # an error, or a signal, has come before it was on the disk
        steps = self._steps()
        assert not steps or saved.step > steps[-1], (saved.step, steps)
        vector, facts = _packed(saved)
        try:
            os.makedirs(self._folder, exist_ok=True)
            self._check_room(vector.nbytes)
            self._write(saved.step, vector, facts)
            self._sync(saved.step)
        except (ValueError, OSError) as error:
            code = system_code(error)
            why = first_line(error) if code is None else os.strerror(code)
            _remove_unfinished(self._folder)
            raise StorageError(
                f"{self._path(saved.step)}: cannot be saved ({why}); {_advice(code, steps)}"
            ) from None

    def close(self) -> None:
        if self._opened is not None:
            opened, self._opened = self._opened, None
            with quiet_orbax():
                opened.close()

    def _steps(self):
        """The numbers of the complete ones, sorted."""
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self._folder}: cannot be read ({error.strerror})") from None
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def _path(self, step):
        return os.path.join(self._folder, str(step))

    def _sync(self, step):
        """Makes a step durable, and says so in it."""
        path = self._path(step)
        sync_tree(path)
        close(os.open(os.path.join(path, SYNCED), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
        sync_folder(path)
        sync_folder(self._folder)

    def _remove(self, step):
        """Removes a step, of which Orbax's manager may know. Raises StorageError."""
        self.close()
        try:
            shutil.rmtree(self._path(step))
        except OSError as error:
            raise StorageError(
                f"{self._path(step)}: cannot be removed ({error.strerror}); remove it yourself"
            ) from None

    def _manager(self):
        """Orbax's, of the steps that are there when it is made."""
        if self._opened is None:
            _remove_unfinished(self._folder)
            ocp = imported("orbax.checkpoint")
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, enable_async_checkpointing=False
            )
            # Compressed, numbers like these lose a tenth, for twice the time and the memory.
            handlers = {
                _STATE: ocp.PyTreeCheckpointHandler(use_compression=False),
                _FACTS: ocp.JsonCheckpointHandler(),
            }
            with quiet_orbax():
                self._opened = ocp.CheckpointManager(
                    self._folder, options=options, item_handlers=handlers
                )
        return self._opened

    def _check_room(self, n_bytes):
        """A disk that fills up meanwhile is told of by tensorstore, and not in one line."""
        found = os.statvfs(self._folder)
        if found.f_bavail * found.f_frsize < n_bytes + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write(self, step, vector, facts):
        ocp, manager = imported("orbax.checkpoint"), self._manager()
        how = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
        items = {
            _STATE: ocp.args.PyTreeSave({_VECTOR: vector}, save_args={_VECTOR: how}),
            _FACTS: ocp.args.JsonSave(facts),
        }
        with quiet_orbax():
            assert manager.save(step, args=ocp.args.Composite(**items)), step
            manager.wait_until_finished()

    def _read(self, step):
        ocp, np, manager = imported("orbax.checkpoint"), imported("numpy"), self._manager()
        how = {_VECTOR: ocp.RestoreArgs(restore_type=np.ndarray)}
        items = {_STATE: ocp.args.PyTreeRestore(restore_args=how), _FACTS: ocp.args.JsonRestore()}
        with quiet_orbax():
            found = manager.restore(step, args=ocp.args.Composite(**items))
        vector, facts = found[_STATE][_VECTOR], found[_FACTS]
        if facts["format"] != _FORMAT:
            raise ValueError(f"format is {facts['format']!a:.40}, expected {_FORMAT!r}")
        if facts["step"] != step or facts["digest"] != _digest(vector, facts):
            raise ValueError("its numbers are not those of its digest")
        return Saved(step=step, facts=facts[_FACTS], **_unpacked(vector, facts["arrays"]))

    def _damage(self, step, why):
        before = self._steps()[:-1]
        then = f"goes on from step {before[-1]}" if before else "begins anew"
        return (
            f"{self._path(step)}: a damaged checkpoint ({why}); remove it, and the same command "
            f"{then}"
        )


def _is_synced(path):
    return os.path.lexists(os.path.join(path, SYNCED))


def _is_unfinished(path):
    """Whether a power cut may have left this of a step: a part of what is made in one."""
    if os.path.islink(path) or not os.path.isdir(path):
        return False
    own = (_STATE, _FACTS, *_OF_ORBAX)
    return all(name in own or UNSAVED in name for name in os.listdir(path))


def _packed(saved):
    """All numbers as one vector, and the facts beside it."""
    np = imported("numpy")

    arrays = [[name, *parts["a"].shape, len(parts["b"])] for name, parts in saved.params.items()]
    found = []
    for tree in (getattr(saved, name) for name in _TREES):
        assert tree.keys() == saved.params.keys()
        found += [np.ravel(tree[name][part]) for name, *_ in arrays for part in "ab"]
    assert all(one.dtype == np.float32 for one in found)
    vector = np.concatenate(found)
    facts = json.loads(json.dumps(saved.facts))  # as it comes back
    facts = {"format": _FORMAT, "step": saved.step, "arrays": arrays, _FACTS: facts}
    return vector, facts | {"digest": _digest(vector, facts)}


def _unpacked(vector, arrays):
    """The three trees by their names: arrays of their own, in the order that they were saved in."""
    trees, at = {}, 0
    for tree in _TREES:
        trees[tree] = {}
        for name, rank, width, out in arrays:
            parts = trees[tree][name] = {}
            for part, shape in (("a", (rank, width)), ("b", (out, rank))):
                size = shape[0] * shape[1]
                parts[part] = vector[at : at + size].reshape(shape).copy()
                at += size
    return trees


def _digest(vector, facts):
    xxhash = imported("xxhash")

    words = {key: value for key, value in facts.items() if key != "digest"}
    digest = xxhash.xxh3_128(json.dumps(words, sort_keys=True).encode())
    digest.update(memoryview(vector).cast("B"))
    return digest.hexdigest()


def _remove_unfinished(folder):
    """Removes what a run that was killed, or had no room, has not finished."""
    try:
        names = [name for name in os.listdir(folder) if UNSAVED in name]
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read ({error.strerror})") from None
    for name in names:
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def _advice(code, steps):
    then = f"goes on from step {steps[-1]}" if steps else "begins anew: nothing is saved yet"
    room = "free some space, then " if code in FULL else ""
    return f"{room}give the same command again, and it {then}"
