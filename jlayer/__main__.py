"""python -m jlayer."""

import sys

from jlayer.app.cli import main

sys.exit(main())
