"""The command line as a process of its own, for the tests that stop it."""

import signal
import subprocess
import sys


def start(*words, code=None, **options):
    """`jlayer WORDS`, or `python -c CODE WORDS`."""
    program = ["-m", "jlayer"] if code is None else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The parent of the tests may have had SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **{"stdin": subprocess.DEVNULL, **options},
    )


def finish(process, given=None):
    """(exit code, stdout, stderr)"""
    out, err = process.communicate(given, timeout=120)
    return process.returncode, out, err
