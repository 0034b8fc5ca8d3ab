"""Templates that mean harm, and the process that bounds them."""

import os
import subprocess
import sys

import pytest

from jlayer.errors import CheckpointError, StorageError, UsageError
from jlayer.text import jinja, sandbox
from jlayer.text.chat import render_chat
from tests.text.samples import CHATML, SPECIAL, user, written

# Templates that mean harm

HARM = {
    "attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "attr filter": "{{ messages | attr('__class__') }}",
    "map attribute": "{{ [messages] | map(attribute='__class__') | list }}",
    "namespace": "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "mutation": "{{ messages.append(1) }}",
    "tracker": "{{ self._TemplateReference__context }}{{ raise_exception.__globals__ }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "syntax": "{% for %}",
    "no such filter": "{{ 1 | nope }}",
    "type": "{{ 1 + 'a' }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 999 }}{% endfor %}"
    "{% endfor %}",
    "string": "{{ ('a' * 10**10) | length }}",
    "constant": "{% if 'a' * 10**10 %}{% endif %}",
    "list": "{{ ([0] * 10**10) | length }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}{{ n.s | length }}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "width": "{{ '%10000000000d' % 1 }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "clock": "{{ strftime_now('%Y' * 10**9) }}",
}


@pytest.mark.parametrize("name", HARM)
def test_a_forbidden_template_is_refused_in_one_line(here, name):
    with pytest.raises(CheckpointError, match="chat template") as caught:
        render_chat(HARM[name], user("x"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_ends(name, monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_S", 0.3)
    with pytest.raises(CheckpointError, match="chat template") as caught:
        render_chat(ENDLESS[name], user("x"))
    assert "\n" not in str(caught.value)


def test_the_process_can_open_no_file_and_start_no_other():
    """Even code that got out of the sandbox: run in the process after its limits are set."""
    code = (
        "import sys; sys.path[:] = sys.argv[1:]; import jlayer.text.sandbox as t\n"
        "t.limit_process(cpu_s=9, memory_bytes=1 << 28)\n"
        "import os\n"
        "for act in (lambda: open('/etc/hostname'), lambda: os.open('/tmp', os.O_RDONLY)):\n"
        "    try: act()\n"
        "    except OSError as error: print(error.errno)\n"
        "import resource; print(*resource.getrlimit(resource.RLIMIT_AS))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, os.getcwd(), *sys.path], capture_output=True
    )
    assert done.stdout.split() == [b"24", b"24", b"268435456", b"268435456"], done.stderr


def test_an_old_jinja_is_refused(monkeypatch):
    monkeypatch.setattr(jinja, "MIN_VERSION", (99,))
    with pytest.raises(ImportError, match="known ways out"):
        jinja.check_version()


def test_without_jinja_the_message_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "jinja2.py").write_text("raise ImportError('no jinja2')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"no jinja2; install jinja2>=3\.1\.6"):
        render_chat(CHATML, user("x"))


def test_a_process_that_cannot_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StorageError, match="no process could be started"):
        render_chat(CHATML, user("x"))


def test_a_template_too_long_is_not_run():
    with pytest.raises(CheckpointError, match=r"1048577 characters"):
        render_chat("x" * (sandbox.MAX_TEMPLATE_BYTES + 1), user("x"))


def test_long_messages_have_room():
    content = "word " * 100_000
    found = render_chat(CHATML, [*user(content)] * 3, special=SPECIAL)
    assert len(found.text) > 3 * 499_998
    assert len(written(found)[0]) == 6


def test_importing_needs_neither_jinja_nor_jax():
    code = (
        "import sys; import jlayer.text.sandbox, jlayer.text.tokenizer, jlayer.engine.sample\n"
        "heavy = {'jax', 'torch', 'transformers', 'jinja2', 'tokenizers', 'sentencepiece'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_process_needs_little_of_jlayer():
    """It starts in less time, and nothing that other parts import can fail in it."""
    code = (
        "import sys; from jlayer.text import jinja, sandbox\n"
        "print(sorted(name for name in sys.modules if name.startswith('jlayer.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(
        ["jlayer.errors", "jlayer.text", "jlayer.text.jinja", "jlayer.text.sandbox"]
    )
