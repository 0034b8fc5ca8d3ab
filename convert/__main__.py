"""`python -m convert SOURCE TARGET` is `jlayer convert SOURCE TARGET`."""

import sys

from jlayer.app.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
