"""`jlayer serve` with a model that is slow on purpose: each layer takes so many seconds longer.

    python benchmarks/slow_serve.py 1.5 MODEL [options of jlayer serve]

A stand-in for a large model, whose forward pass takes seconds, on any machine.
"""

from __future__ import annotations

import sys
import time

from jlayer.app.cli import main
from jlayer.serving import desk
from jlayer.streaming.steps import Run


class SlowDesk(desk.Desk):
    """A desk of a model whose layers take longer."""

    seconds = 0.0

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self._last = None

        def slowly(step, tile):
            if isinstance(step, Run) and tile.layer is not None and tile.layer != self._last:
                time.sleep(self.seconds)
            if isinstance(step, Run):
                self._last = tile.layer

        self._slowed = model.engine.watch.also(slowly)
        self._slowed.__enter__()


if __name__ == "__main__":
    SlowDesk.seconds = float(sys.argv[1])
    desk.Desk = SlowDesk  # what the verb imports
    sys.exit(main(["serve", *sys.argv[2:]]))
