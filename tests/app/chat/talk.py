"""What tests of a chat share: a template, somebody who types, and a chat with what it shows."""

import io
from contextlib import contextmanager
from types import SimpleNamespace

from jlayer.app.chat.page import Page
from jlayer.app.chat.reading import Cleared
from jlayer.app.chat.session import Session
from jlayer.app.chat.turns import Speaker

# Refuses messages that say so, as some templates refuse a system message.
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no such word') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PLAIN = {"temperature": 0, "max_new_tokens": 8, "speculate": "off"}
CTRL_C, CLEARED = KeyboardInterrupt(), Cleared()


class Typist:
    """Gives lines one after another, and notes what stood at each prompt. An exception among them
    is raised; a function is called, with nothing typed."""

    def __init__(self, *lines, is_terminal=True):
        self.is_terminal = is_terminal
        self._lines = iter(lines)
        self.prompts, self.before, self.history, self.n_silent = [], [], [], 0

    def line(self, prompt, *, before=""):
        self.prompts.append(prompt)
        self.before.append(before)
        said = next(self._lines, EOFError())
        while callable(said):
            said()
            said = next(self._lines, EOFError())
        if isinstance(said, BaseException):
            raise said
        return said

    def remember(self, entry):
        self.history.append(entry)

    def forget(self):
        pass

    @contextmanager
    def silent(self):
        self.n_silent += 1
        yield


class Terminal(io.StringIO):
    def isatty(self):
        return True


def chat(model, *lines, stream=None, is_terminal=True, template=TEMPLATE, options=None, **more):
    """A chat that somebody is about to have: `run` it."""
    typist = Typist(*lines, is_terminal=is_terminal)
    stream = stream or (Terminal() if is_terminal else io.StringIO())
    speaker = Speaker(
        model, options={**PLAIN, **(options or {})}, template={"chat_template": template}
    )
    model.engine.kept.clear()
    session = Session(model, speaker, typist, Page(stream), **more)
    return SimpleNamespace(
        session=session, run=session.run, typist=typist, shown=stream.getvalue, speaker=speaker
    )


@contextmanager
def failing(model, number, error):
    """A forward pass of this number from here raises, once."""
    scheduler = model.engine.scheduler
    first, raised = scheduler.n_passes, []

    def on_step(step, tile):
        if not raised and scheduler.n_passes == first + number:
            raised.append(number)
            raise error

    with model.engine.watch.also(on_step):
        yield raised


def n_alike(one, other):
    """How many first tokens are equal."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
