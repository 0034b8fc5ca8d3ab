"""What a process other than process 0 does: each step that it is told, on its own devices.

It has its rows of the weights and its part of the caches, and nothing else: no prompt, no lane, no
text.
"""

from __future__ import annotations

from jlayer.engine.alone import lanes_of_hosts, layer_seconds, stream
from jlayer.engine.deciding import END, follows, told
from jlayer.engine.engine import Engine
from jlayer.engine.messages import unpacked_parts, unpacked_shape
from jlayer.engine.pace import predicted_seconds
from jlayer.errors import UsageError


def follow(engine: Engine) -> None:
    """Does what process 0 tells until it closes the model. Raises what a step raises: then all
    processes end. UsageError in process 0."""
    if not follows():
        raise UsageError("follow: this is process 0, or the only one; it takes the prompts")
    while True:
        what, *given = told()
        if what == END:
            return
        _do(engine, what, *given)


def _do(engine, what, *given):
    match what, *given:
        case ["admit", shape, held, is_streaming, digest]:
            held = tuple(map(unpacked_shape, held))
            engine.admit_as_told(unpacked_shape(shape), held, is_streaming, digest)
        case ["drop"]:
            engine.drop_entries()
        case ["time", most_rows]:
            with engine.turn():
                predicted_seconds(engine.plan, engine.programs, most_rows=most_rows)
        case ["compile", parts]:
            with engine.turn() as executor:
                executor.read_early()
                engine.sweeper.compile(executor, unpacked_parts(parts))
        case ["fill", parts]:
            with engine.turn() as executor:
                engine.sweeper.fill(executor, unpacked_parts(parts))
        case ["stream"]:
            with engine.turn() as executor:
                stream(executor)
        case ["layer", parts]:
            with engine.turn() as executor:
                layer_seconds(engine, executor, unpacked_parts(parts))
        case ["lanes"]:
            lanes_of_hosts(engine, engine.store.files)
        case ["run", parts]:
            with engine.turn() as executor:
                engine.sweeper.run(executor, unpacked_parts(parts), lambda *_: None)
                engine.note_peaks()
        case _:
            raise AssertionError(f"process 0 tells of {what!r}")
