"""The program `jlayer`, and `python -m jlayer`."""

import sys

from jlayer.interrupts import hold


def run() -> int:
    """Holds signals before anything else is imported, then runs the command line."""
    hold()
    from jlayer.app.streams import prepare

    prepare()
    from jlayer.app.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
