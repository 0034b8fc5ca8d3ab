"""Converts a published checkpoint to one file a layer. Needs no JAX.

Installed as `jlayer.convert`, by the link in `jlayer/`: a top-level package would give way to any
convert.py of a user's. Under its short name there is only `python -m convert`, in a checkout.

Public names are imported on first use, so that the command line can handle an interrupt before
numpy is imported.
"""

RESUME = "to resume, run the same command again"

_HOMES = {
    "Summary": "jlayer.convert.job",
    "convert_checkpoint": "jlayer.convert.job",
    "is_begun": "jlayer.convert.target.resume",
    "Sealed": "jlayer.convert.target.seal",
    "seal_folder": "jlayer.convert.target.seal",
    "Verdict": "jlayer.convert.verify",
    "verify_folder": "jlayer.convert.verify",
}
__all__ = ["RESUME", *sorted(_HOMES)]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
