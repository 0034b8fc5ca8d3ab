"""A process that keeps prompts, and may be killed in the middle; run as a module by tests.

    python -m tests.engine.keeping MODEL FOLDER MOST_BYTES SEED ROUNDS [CALL NUMBER]

It prints a line of JSON for each prompt: its number and tokens. CALL: the function of `os` in whose
call of this number, counted from the first prompt on, it is killed.
"""

import json
import os
import random
import signal
import sys

import jlayer
from jlayer.engine import prompt_cache
from tests.engine.sessions import PLAIN, opened, tokens_of
from tests.programs import few_shapes

BLOCK, N_PROMPTS = 8, 6


def prompt(number):
    """Of five blocks and a little; some of them begin alike."""
    return [*range(7, 7 + 2 * BLOCK), 20 + number // 2, *range(40, 55), 20 + number, *range(60, 70)]


def tokens(model, number):
    return tokens_of(jlayer.generate(model, prompt(number), **PLAIN))


def killed_in(name, number):
    """Half of a write is done when that happens."""
    real, left = getattr(os, name), number

    def call(*given, **options):
        nonlocal left
        left -= 1
        if left == 0:
            if name == "pwrite":
                fd, data, offset = given
                real(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **options)

    setattr(os, name, call)


def main(folder, cache, most_bytes, seed, rounds, *killed):
    prompt_cache.BLOCK = BLOCK
    draw = random.Random(int(seed))
    with few_shapes(), opened(folder, prompt_cache=cache, prompt_cache_size=int(most_bytes)) as one:
        if killed:
            killed_in(killed[0], int(killed[1]))
        for _ in range(int(rounds)):
            number = draw.randrange(N_PROMPTS)
            print(json.dumps([number, tokens(one, number)]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
