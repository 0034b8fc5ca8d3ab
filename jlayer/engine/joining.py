"""Which lanes of a run wait for each other: the beams of each prompt, or all rows that functions of
the user's look at."""

from __future__ import annotations

from collections.abc import Sequence

from jlayer.engine.beaming import Beams
from jlayer.engine.functions import Functions
from jlayer.engine.lane import Lane
from jlayer.engine.options import SamplingOptions
from jlayer.engine.stops import StopStrings
from jlayer.engine.together import Together
from jlayer.text.tokenizer import Tokenizer


def comes_whole(options: SamplingOptions, functions: Functions | None) -> bool:
    """Whether all prompts of a run go on together, so that none can wait for room."""
    return functions is not None and not options.searches


def join(
    prompts: Sequence[Sequence[Lane]],
    options: SamplingOptions,
    functions: Functions | None,
    *,
    text: Tokenizer | None,
    stop_text: Tokenizer | None,
) -> None:
    """Joins lanes, given by prompt. `text`, `stop_text`: as of `Decoding`."""
    drawing = [(n, lanes) for n, lanes in enumerate(prompts) if lanes[0].draws]
    if drawing and comes_whole(options, functions):
        pairs = [(lane, number) for number, lanes in drawing for lane in lanes]
        lanes, numbers = zip(*pairs, strict=True)
        Together(lanes, functions, numbers)
    for number, lanes in drawing if options.searches else ():
        stops = None
        if options.stop and stop_text is not None:
            stops = StopStrings(options.stop, text=stop_text, prompt=lanes[0].row.given)
        elif options.stop:  # looked for in new text alone
            stops = StopStrings(options.stop, text=text, prompt=[])
        Beams(lanes, stops, functions=functions, number=number)
