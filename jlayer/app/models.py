"""What a folder has of a model: form, sizes, and whether it runs as it is.

Nothing that is wrong with a folder stops anything: it is what there is to say of it. Weights are
not read, but every header is, as a run reads them.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from enum import Enum

from jlayer.app.forms import GGUF, META, Form, form_of
from jlayer.checkpoint.agree import listed
from jlayer.checkpoint.encoded import is_repacked
from jlayer.checkpoint.foreign import kinds_of
from jlayer.checkpoint.layout import CONFIG
from jlayer.checkpoint.quantization import published_quantization
from jlayer.checkpoint.source import (
    names_in,
    quantization_said,
    quantizer_in,
    refuse_quantizer_files,
)
from jlayer.checkpoint.store import Store
from jlayer.config import model_config, planned_dtype, quantization_named
from jlayer.errors import JlayerError, UnsupportedModelError
from jlayer.families.registry import published_tensors
from jlayer.gguf.config import config_of
from jlayer.gguf.parts import is_gguf, model_at, open_head, parts_of
from jlayer.plan.tiles import Weights, unseen_weights
from jlayer.spec import ITEM_BYTES
from jlayer.strict import is_there, read_json_object

_LONGEST = 60  # characters of a word from a config that are shown
# "a GGUF model" -> GGUF
_OF_A_KIND = re.compile(r"an? (.*?)( model| weights)?")


class State(Enum):
    """Whether a run takes a folder. The values are those of `jlayer list --json`."""

    RUNS = "runs"
    CONVERT = "convert"  # it runs once it is converted
    INCOMPLETE = "incomplete"  # files are missing
    UNSUPPORTED = "unsupported"
    BROKEN = "broken"


@dataclass
class Model:
    """What a folder has, as far as it could be found out.

    `reason`: why it does not run as it is; `advice`: the command that helps. `quantization`: what
    made the weights smaller. `weights`: as a plan needs them, where the config says what they are;
    `files`: those of the weights that are there.
    """

    folder: str
    state: State = State.RUNS
    reason: str | None = None
    advice: str | None = None
    form: str | None = None
    quantization: str | None = None
    family: str | None = None
    weights: Weights | None = None
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> str | None:
        """What it is computed in: the dtype of what is not quantized."""
        return self.weights and self.weights.dtype

    @property
    def n_parameters(self) -> int | None:
        if self.weights is None:
            return None
        return sum(map(math.prod, published_tensors(self.weights.cfg).values()))


def look_at(folder: str, *, follow_links: bool = False) -> Model:
    """The model in a folder. `follow_links`: as for a run."""
    model = Model(folder)
    try:
        _look(model, follow_links)
    except UnsupportedModelError as error:
        model.state, model.reason = State.UNSUPPORTED, error.command_line
    except JlayerError as error:
        model.state, model.reason = State.BROKEN, error.command_line
    except OSError as error:  # it changed while it was looked at
        model.state = State.BROKEN
        model.reason = f"{folder}: cannot be read ({error.strerror})"
    return model


def bytes_in(folder: str) -> dict[tuple[int, int], int]:
    """(device, inode) -> bytes of each file of a folder, of what links lead to as well; folders
    behind links are left out. Of a GGUF file those of all its parts. What cannot be read counts
    nothing."""
    found = {}
    listing = os.walk(folder)
    if is_gguf(folder):
        listing = [(os.path.dirname(folder), (), map(os.path.basename, parts_of(folder)))]
    for where, _, names in listing:
        for name in names:
            try:
                status = os.stat(os.path.join(where, name))
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode):
                found[status.st_dev, status.st_ino] = status.st_size
    return found


def _look(model, follow_links):
    """Fills in the model. Raises what is wrong with it."""
    path = model_at(model.folder)
    if is_gguf(path):
        _look_at_gguf(model, path, follow_links)
        return
    folder, names = model.folder, names_in(model.folder)
    model.quantization = quantizer_in(names)
    kinds = kinds_of(names)
    if kinds:
        model.form = _OF_A_KIND.fullmatch(kinds[0])[1]
    form, wrong = None, None
    try:
        form = form_of(folder, names)
    except JlayerError as error:
        wrong = error  # to be raised once what the config says is known
    home = form.config if form else folder
    raw = None
    try:
        raw = _read_config(model, home)
    except JlayerError:
        if wrong is None:
            raise
    finally:
        if form is not None:
            model.form, model.files = form.name, form.files
    if wrong is not None:
        raise wrong
    refuse_quantizer_files(folder, names, said=quantization_said(folder))
    runs = form is not None and form.runs
    if raw is not None:
        cfg = model_config(raw, where=os.path.join(home, CONFIG))
        dtype = planned_dtype(cfg, None)
        quantization = published_quantization(cfg)
        model.weights = unseen_weights(cfg, quantization, stored=dtype, dtype=dtype)
        runs = runs and not is_repacked(cfg)
    missing = _missing(form, raw, home)
    if missing:
        model.state, model.reason = State.INCOMPLETE, f"{folder}: {missing}"
    elif runs:
        store = Store(folder, follow_links=follow_links)
        model.weights = Weights(store.cfg, store.form_of, store.float_dtype)
        model.notes = store.notes
    else:
        model.state = State.CONVERT


def _look_at_gguf(model, path, follow_links):
    """Fills in the model of a GGUF file."""
    model.form = GGUF
    head = open_head(path)
    model.files = head.parts
    kinds = Counter(tensor.type for tensor in head.tensors.values() if len(tensor.shape) > 1)
    encoded = (kind for kind, _ in kinds.most_common() if kind not in ITEM_BYTES)
    model.quantization = next(encoded, None)
    config = config_of(head)
    model.family = config["model_type"]
    store = Store(path, follow_links=follow_links)
    model.weights = Weights(store.cfg, store.form_of, store.float_dtype)
    model.notes = store.notes


def _read_config(model, home):
    """The config.json in `home`, None where there is none; notes what it says of the model."""
    path = os.path.join(home, CONFIG)
    if not is_there(path):
        return None
    raw = read_json_object(path)
    family, method = raw.get("model_type"), quantization_named(raw)
    model.family = _word(family) if isinstance(family, str) else None
    model.quantization = _word(method) if method else model.quantization
    return raw


def _missing(form: Form | None, raw: dict | None, home: str) -> str | None:
    """What a run or a conversion lacks, in words; None where nothing is missing."""
    if form is None:
        return "no weights" if raw is not None else f"no weights and no {CONFIG}"
    if form.missing:
        several = "s" * (len(form.missing) > 1)
        return f"{len(form.missing)} weight file{several} missing: {listed(form.missing)}"
    if raw is None and form.name != META:  # which has params.json
        return f"{CONFIG} is missing"
    return None


def _word(text):
    """A word from outside, for one cell of a table."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
