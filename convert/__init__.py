"""A published checkpoint into one file a layer. Needs no JAX.

Public names are imported on first use: so the command line stands, and an interrupt is taken well,
before numpy is there.
"""

RESUME = "to resume, run the same command again"

_HOMES = {
    "Summary": "convert.job",
    "convert_checkpoint": "convert.job",
    "Verdict": "convert.verify",
    "verify_folder": "convert.verify",
}
__all__ = ["RESUME", *sorted(_HOMES)]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'convert' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
