"""Converts a published checkpoint to one file a layer. Needs no JAX.

Public names are imported on first use, so that the command line can handle an interrupt before
numpy is imported.
"""

RESUME = "to resume, run the same command again"

_HOMES = {
    "Summary": "convert.job",
    "convert_checkpoint": "convert.job",
    "Sealed": "convert.target.seal",
    "seal_folder": "convert.target.seal",
    "Verdict": "convert.verify",
    "verify_folder": "convert.verify",
}
__all__ = ["RESUME", *sorted(_HOMES)]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'convert' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
