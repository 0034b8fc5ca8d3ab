"""jlayer: language models far larger than the GPU, run layer by layer.

Public names are imported on first use, so that `import jlayer` is cheap.
"""

__version__ = "0.1.0"

_HOMES = {
    "AutoModel": "jlayer.api",
    "AutoModelForCausalLM": "jlayer.api",
    "AutoTokenizer": "jlayer.auto_tokenizer",
    "Model": "jlayer.api",
    "Generation": "jlayer.engine.decoding",
    "Step": "jlayer.engine.lane",
    "generate": "jlayer.api",
    "stream": "jlayer.api",
    "JlayerError": "jlayer.errors",
    "UsageError": "jlayer.errors",
    "CheckpointError": "jlayer.errors",
    "UnsupportedModelError": "jlayer.errors",
    "DoesNotFitError": "jlayer.errors",
    "NetworkError": "jlayer.errors",
    "StorageError": "jlayer.errors",
    "LockedError": "jlayer.errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'jlayer' has no attribute {name!r}")
    import importlib

    from jlayer.interrupts import deferred

    with deferred():  # a signal that breaks off the import of JAX crashes the process
        module = importlib.import_module(_HOMES[name])
    return getattr(module, name)


def __dir__():
    return [*globals(), *__all__]
