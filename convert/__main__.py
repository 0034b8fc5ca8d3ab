"""`python -m convert SOURCE TARGET` is `jlayer convert SOURCE TARGET`."""

import sys

from jlayer.__main__ import run

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    sys.exit(run())
