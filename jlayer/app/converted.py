"""A conversion under a verb: its progress, a signal that ends it, and its summary in a line."""

from __future__ import annotations

from jlayer.app.ending import Interrupted, code_of, word_of
from jlayer.app.refusals import refused_in_source
from jlayer.app.streams import conversion_progress, tell
from jlayer.checkpoint.layout import is_layered
from jlayer.interrupts import STOPS, released
from jlayer.sizes import counted


def converted(source: str, target: str, **options):
    """Converts with these options of `convert_checkpoint`, and returns its summary.

    A conversion may be stopped anywhere, so a signal does not wait. Raises Interrupted, which says
    what is left, and the errors of jlayer.errors.
    """
    from jlayer.convert import RESUME, convert_checkpoint, is_begun

    progress = conversion_progress()
    try:
        with released():
            done = convert_checkpoint(
                source, target, advise=refused_in_source, progress=progress, **options
            )
    except STOPS as stop:
        progress.close()
        left = "nothing was finished"
        if is_begun(target):
            left = f"what is finished stays; {RESUME}"
        elif is_layered(target):
            left = "the finished conversion there stays"
        line = f"{target}: {word_of(stop)}; {left}"
        tell(line)
        found = {"error": line, "exit_code": code_of(stop), "finish_reason": "interrupted"}
        raise Interrupted(stop, found) from None
    finally:
        progress.close()
    rate = done.source_bytes / max(done.elapsed_s, 1e-9) / 1e6
    tell(
        f"read {done.source_bytes:,} bytes of weights in {done.elapsed_s:.2f} s ({rate:,.0f} MB/s)"
    )
    return done


def line_of(done) -> str:
    """A summary of a conversion in one line."""
    dtypes = ", ".join(f"{counted(n, 'tensor')} in {dtype}" for dtype, n in done.dtypes.items())
    n_at_int8 = len(done.quantization["at_int8"]) if done.quantization else 0
    verb = "already holds all of" if done.status == "unchanged" else "holds"
    of = f"the rows of host {done.rows['host']} of {done.rows['hosts']} of " if done.rows else ""
    return (
        f"{done.target}: {verb} {of}{done.source}, {counted(done.n_layers, 'layer')} in "
        f"{counted(done.n_files, 'file')}, {done.target_bytes:,} bytes, {dtypes}"
        + (
            f"; layers quantized to {done.quantization['scheme']}, "
            f"{done.block_bits:.2f} bits a weight"
            if done.block_bits
            else ""
        )
        + (f", {n_at_int8} of their matrices at int8" if n_at_int8 else "")
        + (f"; removed there: {', '.join(done.removed)}" if done.removed else "")
    )
