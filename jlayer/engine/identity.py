"""Which model a saved run or a kept prompt is of: what its cache entries and tokens depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from jlayer.checkpoint.layout import encode_manifest
from jlayer.checkpoint.store import Store
from jlayer.errors import UsageError

# Of saved cache entries and what stands beside them; another one is refused. Entries of windows
# stood out of order in the first.
FORMAT = 2

# What is compared -> (what it is called, what to do where it differs).
_COMPARED = {
    "format": ("format", "begin the run anew: this jlayer reads another one"),
    "adapter": ("adapter", "open the model with the adapter that it was saved with"),
    "weights": ("model (its weights)", "open the model that it was saved with"),
    "config": ("model (its config)", "open the model that it was saved with"),
    "dtype": ("dtype", "give dtype={saved}"),
}


def identity_of(store: Store, dtype: str) -> dict:
    """What must be equal of two models for one to go on with the cache of the other. `dtype`: the
    compute dtype."""
    if store.manifest is not None:
        weights = hashlib.sha256(encode_manifest(store.manifest)).hexdigest()
    else:
        weights = store.fingerprint
    config = repr(replace(store.cfg, additions=None))
    return {
        "format": FORMAT,
        "adapter": store.adapter_digest,
        "weights": weights,
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "dtype": dtype,
    }


def key_of(identity: Mapping) -> str:
    """An identity in a few letters."""
    return hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:32]


def check_identity(saved: Mapping, own: Mapping, *, where: str) -> None:
    """Raises UsageError, by name, where a saved run is of another model. `where`: its folder."""
    for name, (words, advice) in _COMPARED.items():
        if saved.get(name) == own[name]:
            continue
        found, expected = _shown(name, own[name]), _shown(name, saved.get(name))
        said = (
            f"{where}: saved with another {words}: expected {expected}, found {found}; "
            f"{advice.format(saved=expected)}"
        )
        raise UsageError(said, command_line=said.replace("dtype=", "--dtype "))


def _shown(name, value):
    if value is None:
        return "none"
    return str(value)[:12] if name in ("adapter", "weights", "config") else str(value)
