"""The program `jlayer`, and `python -m jlayer`."""

import os
import sys

from jlayer.interrupts import hold


def run() -> int:
    """Holds signals before anything else is imported, then runs the command line."""
    hold()
    # Warnings of XLA, of tuning that was disturbed say, tell a user nothing; errors are shown.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from jlayer.app.streams import prepare

    prepare()
    from jlayer.app.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
