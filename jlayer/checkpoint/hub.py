"""Hub ids → local folders: fetches only the files that are needed, into huggingface_hub's cache.

Fetched files stay: the same command resumes an interrupted download. huggingface_hub is imported on
first use. It takes its endpoint, cache, token and offline mode from the environment (HF_ENDPOINT,
HF_HOME, HF_TOKEN, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Collection
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from jlayer.catalogue import names
from jlayer.checkpoint.download import Download
from jlayer.checkpoint.hub_errors import AbsentError, UnreachableError, translated
from jlayer.checkpoint.layout import CONFIG, INDEX, is_document, is_side_file
from jlayer.checkpoint.sides import with_templates
from jlayer.checkpoint.source import (
    SINGLE,
    listed,
    quantization_said,
    read_weight_map,
    refuse_quantizer_files,
    regular_file,
    repacked_first,
)
from jlayer.encodings.published import FORMS
from jlayer.errors import CheckpointError, DoesNotFitError, NetworkError, UsageError
from jlayer.gguf.parts import holds_gguf_alone, model_at, models_in, one_model, parts_of
from jlayer.sizes import counted, human

_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?::(?P<file>\w[^@:\s]*))?(?:@(?P<revision>[^@\s]+))?", re.ASCII
)
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Weights(Enum):
    """Which weights to fetch: those that run without converting, those that can be converted, or
    none."""

    RUN = ((SINGLE, INDEX),)
    CONVERT = ((SINGLE, INDEX), _PICKLED)
    NONE = ()


@dataclass(frozen=True)
class Pulled:
    """A model that is whole in the cache: its folder, or its GGUF file, the commit, and what a run
    reads of it."""

    folder: str
    revision: str
    n_files: int
    n_bytes: int


def is_id(ref: str) -> bool:
    """Whether `ref` has the form of a hub id, with or without a GGUF file and a revision."""
    return _ID.fullmatch(ref) is not None


def is_hub_id(ref: str) -> bool:
    """Whether `ref` means a model on the hub. An existing path never does."""
    return is_id(ref) and not os.path.lexists(ref)


def local_folder(
    ref: str | os.PathLike,
    *,
    weights: Weights = Weights.RUN,
    offline: bool = False,
    note: Callable[[str], None] | None = None,
    option: str | None = None,
) -> str:
    """The local folder or GGUF file of `ref`: a path as it is, of a folder that holds nothing else
    its GGUF file; for `owner/name[@revision]` the folder in the cache, after fetching what is
    missing, or the GGUF file where the repository holds one and no other weights; for
    `owner/name:Q4_K_M` the GGUF file whose name ends so, or is this. `option`: what names it,
    for the message that there is no such folder.

    Raises NetworkError (access denied, not found, rate limit, server error, offline and not in the
    cache), DoesNotFitError before the first byte, CheckpointError, UsageError or StorageError.
    """
    ref = os.fspath(ref)
    if is_hub_id(ref):
        return _Repo(ref, offline=offline, note=note or _tell).fetch(weights)
    if not os.path.lexists(ref):
        where = "" if option is None else f"{option}: "
        found = (
            f"{where}{ref}: no such file or folder, and no hub id (owner/name or "
            "owner/name@revision)"
        )
        if ref in names("models"):
            found += "; jlayer knows the config of this name, for a plan, and has no weights of it"
        raise CheckpointError(found)
    return model_at(ref)


def pull(ref: str, *, note: Callable[[str], None] | None = None, progress=None) -> Pulled:
    """Fetches what a run of `owner/name[@revision]` needs, also where a path of this name exists.

    `progress`: what `Download` reports to. Raises what `local_folder` does, and UsageError for what
    is no hub id.
    """
    if not is_id(ref):
        raise UsageError(f"{ref!a}: no hub id; expected owner/name or owner/name@revision")
    repo = _Repo(ref, offline=False, note=note or _tell)
    repo.require_network()
    found = repo.fetch(Weights.RUN, progress)
    sizes = [os.path.getsize(os.path.join(repo.commit_folder, name)) for name in repo.wanted]
    return Pulled(found, os.path.basename(repo.commit_folder), len(sizes), sum(sizes))


def cached_folder(ref: str) -> str | None:
    """The cache folder with all or some files of a hub id; None if there are none."""
    try:
        return _Repo(ref, offline=True, note=_tell).folder()
    except NetworkError:
        return None


def hub_config(ref: str, *, offline: bool = False) -> str:
    """The path of a hub id's config.json, the only file fetched; notes the size of the rest."""
    repo = _Repo(ref, offline=offline, note=_tell)
    if repo.file is not None:
        raise UsageError(
            f"{ref}: the config of a GGUF model is in its file, which a plan does not fetch; run: "
            f"jlayer pull {ref}, and name the file that it prints"
        )
    folder = repo.folder()
    repo.weigh()
    return os.path.join(folder, CONFIG)


def _tell(line):
    print(f"jlayer: {line}", file=sys.stderr)


class _Repo:
    """One model on the hub, at the current commit of its revision."""

    def __init__(self, ref: str, *, offline: bool, note: Callable[[str], None]):
        from huggingface_hub import constants

        match = _ID.fullmatch(ref)
        self._ref, self._repo, self.file = ref, match["repo"], match["file"]
        self._revision = match["revision"] or "main"
        self._endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self._cache, self._note = constants.HF_HUB_CACHE, note
        self._offline = offline or constants.HF_HUB_OFFLINE
        self.wanted: list[str] = []  # what was fetched, or was there
        self.commit_folder = ""  # in which it is

    def require_network(self) -> None:
        if self._offline:
            raise NetworkError(f"{self._ref}: HF_HUB_OFFLINE is set; unset it to fetch a model")

    def folder(self) -> str:
        """The commit's folder in the cache, after fetching config.json."""
        return os.path.dirname(self._get(CONFIG, revision=self._revision))

    def fetch(self, weights: Weights, progress=None) -> str:
        """The commit's folder, with the files that are wanted in it; or a GGUF file in it."""
        if self.file is not None:
            return self._fetch_gguf(progress)
        try:
            folder = self.commit_folder = self.folder()
        except (AbsentError, UnreachableError):  # a GGUF model needs no config
            if not models_in(self._names()):
                raise
            return self._fetch_gguf(progress)
        sizes = self._sizes(os.path.basename(folder))
        if sizes is None:
            names = with_templates(folder, os.listdir(folder))
            self.wanted = self._wanted(folder, names, weights)
            self._require(folder, self.wanted)
            return folder
        if holds_gguf_alone(sizes):
            return self._fetch_gguf(progress)
        said = quantization_said(folder)
        refuse_quantizer_files(self._ref, sizes, said=said)
        if weights is Weights.RUN and said in FORMS and FORMS[said].is_repacked:
            raise CheckpointError(repacked_first(self._ref, said))
        self.wanted = self._wanted(folder, sizes, weights)
        self._bring(folder, sizes, progress)
        return folder

    def _fetch_gguf(self, progress) -> str:
        """The path of a GGUF file in the cache, of its first part where it is split."""
        sizes = self._sizes(self._revision)
        if sizes is None:
            self.commit_folder = self._cached_folder()
        names = _files_in(self.commit_folder) if sizes is None else sizes
        if sizes is None and not models_in(names):
            raise NetworkError(
                f"{self._ref}: {self._unreachable()}, and no GGUF model of it is in the cache; "
                "fetch it with the network on"
            )
        name = one_model(self.file, names, ref=self._ref)
        self.wanted = parts_of(name)
        if sizes is None:
            self._require(self.commit_folder, self.wanted)
        else:
            os.makedirs(self.commit_folder, exist_ok=True)
            # By the name of the revision, which is then known without the network, too.
            self._bring(self.commit_folder, sizes, progress, revision=self._revision)
        return os.path.join(self.commit_folder, name)

    def _names(self):
        """The files of the revision, or those in the cache where the hub cannot be asked."""
        try:
            sizes = self._sizes(self._revision)
        except AbsentError:
            return ()
        return _files_in(self._cached_folder()) if sizes is None else sizes

    def _cached_folder(self):
        """The folder of the revision's commit, by what the cache knows of it."""
        place = self._place()
        try:
            with open(os.path.join(place, "refs", self._revision)) as file:
                commit = file.read().strip()
        except OSError:
            commit = self._revision
        return os.path.join(place, "snapshots", commit)

    def _place(self):
        from huggingface_hub.file_download import repo_folder_name

        return os.path.join(self._cache, repo_folder_name(repo_id=self._repo, repo_type="model"))

    def _bring(self, folder, sizes, progress, *, revision=None):
        """Fetches what is wanted and missing in the commit's folder."""
        missing = [name for name in self.wanted if not _is_in(folder, name)]
        absent = [name for name in missing if name not in sizes]
        if absent:
            raise CheckpointError(
                f"{self._ref}: its index names {counted(len(absent), 'weight file')} that the hub "
                f"does not have: {listed(absent)}"
            )
        self._check_space(folder, missing, sum(sizes[name] for name in missing))
        of_missing = {name: sizes[name] for name in missing}
        with self._watched(folder, of_missing, progress) as download:
            for name in missing:
                if download:
                    download.file(name)
                self._get(name, revision=revision or os.path.basename(folder))
                if download:
                    download.done(name)
        if not all(_is_in(folder, name) for name in self.wanted):
            raise NetworkError(
                f"{self._ref}: its revision {self._revision} changed while it was fetched; run the "
                "same command again"
            )

    def weigh(self) -> None:
        """Notes the size of what a run would fetch, without fetching it."""
        folder = self.folder()
        sizes = self._sizes(os.path.basename(folder)) or {}
        weights = [name for name in sizes if name.endswith(".safetensors")]
        if weights:
            n_bytes = sum(sizes[name] for name in weights if not _is_in(folder, name))
            free = shutil.disk_usage(folder).free
            self._note(f"{self._ref}: {human(n_bytes)} to fetch; {human(free)} are free")

    def _wanted(self, folder, names: Collection[str], weights):
        side = [
            name
            for name in sorted(names)
            if is_side_file(name) and (weights is Weights.CONVERT or not is_document(name))
        ]
        for single, index in weights.value:
            if single in names:
                return [*side, single]
            if index in names:
                self._get(index, revision=os.path.basename(folder))
                weight_map = read_weight_map(regular_file(folder, index))
                return [*side, index, *sorted(set(weight_map.values()))]
        if weights is Weights.NONE:
            return side
        if weights is Weights.RUN and not set(_PICKLED).isdisjoint(names):
            raise CheckpointError(
                f"{self._ref}: its weights are pickles, and only safetensors run in place; "
                f"run: jlayer convert {self._ref} {os.path.basename(self._repo)}-jlayer"
            )
        if self._offline:
            raise NetworkError(f"{self._ref}: offline, and its weights are not in the cache")
        raise CheckpointError(
            f"{self._ref}: no {SINGLE} and no {INDEX} on the hub; name a repository with weights"
        )

    @contextmanager
    def _watched(self, folder, sizes, progress):
        """Yields the Download that reports to `progress`, in the place of the library's own bars;
        None without one."""
        if progress is None or not sizes:
            yield None
            return
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        silent = are_progress_bars_disabled()
        disable_progress_bars()
        try:
            with Download(os.path.dirname(os.path.dirname(folder)), sizes, progress) as download:
                yield download
        finally:
            if not silent:
                enable_progress_bars()

    def _require(self, folder, wanted):
        missing = [name for name in wanted if not _is_in(folder, name)]
        if missing:
            raise NetworkError(
                f"{self._ref}: {self._unreachable()}, and not in the cache are "
                f"{listed(missing)}; fetch them with the network on"
            )
        if not self._offline:
            self._note(f"{self._ref}: {self._unreachable()}; taken as it is in the cache")

    def _unreachable(self):
        return "offline" if self._offline else f"{self._endpoint} cannot be reached"

    def _check_space(self, folder, missing, n_bytes):
        if not missing:
            return
        free = shutil.disk_usage(folder).free
        self._note(
            f"{self._ref}: {len(missing)} files to fetch, {human(n_bytes)}; {human(free)} are free "
            f"in {self._cache}"
        )
        if n_bytes > free:
            raise DoesNotFitError(
                f"{self._ref}: need {n_bytes:,} bytes, have {free:,} free in "
                f"{self._cache}; make room, or set HF_HOME to a folder elsewhere"
            )

    def _sizes(self, revision) -> dict[str, int] | None:
        """Bytes to fetch of each file of the commit (0 if in the cache); None if the hub cannot be
        asked."""
        if self._offline:
            return None
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint)
        try:
            with self._translated():
                info = api.model_info(
                    self._repo, revision=revision, files_metadata=True, timeout=10
                )
        except UnreachableError:
            return None
        blobs = os.path.join(self._place(), "blobs")
        self.commit_folder = os.path.join(self._place(), "snapshots", info.sha)
        sizes = {}
        for file in info.siblings:
            blob = file.lfs.sha256 if file.lfs else file.blob_id
            is_there = blob and os.path.exists(os.path.join(blobs, blob))
            sizes[file.rfilename] = 0 if is_there else file.size or 0
        return sizes

    def _get(self, name, *, revision):
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        if self._offline:
            # Other functions of the library contact the hub, even with local_files_only.
            place = {"cache_dir": self._cache, "revision": revision}
            path = try_to_load_from_cache(self._repo, name, **place)
            if not isinstance(path, str):
                raise AbsentError(
                    f"{self._ref}: offline, and {name} is not in the cache; fetch it with the "
                    "network on"
                )
            return path
        with self._translated(name):
            return hf_hub_download(
                self._repo,
                name,
                revision=revision,
                endpoint=self._endpoint,
                cache_dir=self._cache,
            )

    @contextmanager
    def _translated(self, name="its list of files"):
        """Translates the library's errors into ours, and silences its own log lines."""
        from huggingface_hub.errors import HFValidationError, HTTPError
        from huggingface_hub.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        except HFValidationError:
            raise UsageError(f"{self._ref}: no such file or folder, and no hub id either") from None
        except (OSError, HTTPError) as error:
            at = {"repo": self._repo, "revision": self._revision, "endpoint": self._endpoint}
            raise translated(error, name, ref=self._ref, **at) from error
        finally:
            logging.set_verbosity(verbosity)


def _files_in(folder):
    """The paths of all files in a folder, from there."""
    return [
        os.path.relpath(os.path.join(base, name), folder)
        for base, _, names in os.walk(folder)
        for name in names
    ]


def _is_in(folder, name):
    return os.path.exists(os.path.join(folder, name))
