"""Chat templates: messages → the text a model was trained on, and which of its tokens are real.

A template is a program by whoever published the checkpoint, and Jinja's sandbox bounds neither time
nor memory. So it runs in a process of its own, without files, under hard limits; what comes back is
text. Settings and extras are those of transformers. Ids are left to `tokens`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jlayer
from jlayer.config import unknown_name
from jlayer.errors import CheckpointError, StorageError, UsageError
from jlayer.strict import read_json_object, read_small_file

MAX_TEMPLATE_BYTES = 1 << 20  # the longest published ones have some 20,000 characters
MAX_TEXT_CHARS = 4 << 20  # plus ten times what the messages hold
MEMORY_BYTES = 256 << 20  # address space of the process; Python and Jinja take some 40 MB of it
CPU_S = 1  # beyond start and imports; a long conversation takes milliseconds
WALL_S = 30  # only for a machine that is stuck: what computes meets CPU_S first
# What Jinja imports only when a template needs it, and could not once files are closed to it.
_LATE_IMPORTS = (
    "encodings.unicode_escape",
    "html",
    "jinja2.constants",
    "jinja2.debug",
    "pprint",
    "textwrap",
)
# Older Jinja has known ways out of its sandbox.
MIN_JINJA = (3, 1, 6)

_ROLE = re.compile(r"[\w .:@/-]{1,64}")
# Names under which a message's reasoning is passed; templates read the first (transformers).
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Rendered:
    """A chat as one text, and the same text in parts.

    A part is (a token of `control` that the template itself wrote, True), or (text, whoever wrote
    it, False), in which no token of `control` may be recognised.
    """

    text: str
    parts: tuple[tuple[str, bool], ...]
    control: frozenset[str]


def read_templates(folder: str | os.PathLike, tokenizer_config: Mapping) -> dict[str, str]:
    """Name → source of every chat template in `folder`, the usual one under "default".

    chat_template.jinja (with additional_chat_templates/*.jinja) goes before tokenizer_config.json
    and this before chat_template.json, as in transformers.
    Raises CheckpointError where one is not text.
    """
    folder = Path(folder)
    found = {}
    if (folder / "chat_template.jinja").exists():
        found["default"] = _read_text(folder / "chat_template.jinja")
    more = folder / "additional_chat_templates"
    for path in sorted(more.glob("*.jinja")) if more.is_dir() else ():
        found[path.stem] = _read_text(path)
    raw, where = tokenizer_config.get("chat_template"), "tokenizer_config.json"
    if not found and raw is None and (folder / "chat_template.json").exists():
        where = "chat_template.json"
        raw = read_json_object(folder / where).get("chat_template")
    return found or _named_templates(raw, f"{folder / where}: chat_template")


def select_template(templates: Mapping[str, str], wanted: str | None, *, has_tools: bool) -> str:
    """The source of the template `wanted` (a name, or a source itself), or of the usual one.

    Raises UsageError where there is none of that name, or none at all.
    """
    if wanted is not None:
        if wanted in templates or "{" in wanted:
            return templates.get(wanted, wanted)
        raise UsageError(unknown_name("chat template", wanted, templates))
    if has_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if templates:
        raise UsageError(f"this model has several chat templates, {', '.join(templates)}; name one")
    raise UsageError("this model has no chat template; use a plain prompt, or give a template")


def render_chat(
    template: str,
    messages: Sequence[Mapping],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping] | None = None,
    documents: Sequence[Mapping] | None = None,
    tokens: Mapping[str, str] | None = None,
    special: Iterable[str] = (),
    added: Iterable[str] = (),
    options: Mapping | None = None,
) -> Rendered:
    """`messages` through `template`, with what the template wrote told from what the user wrote.

    `tokens`: the tokenizer's named tokens (bos_token and so on). Control tokens are the `special`
    ones, and of the `added` ones those that stand in the template. `options`: further variables.
    How: the template runs a second time with the user's strings marked by characters that occur
    nowhere else. Where the text without marks is the same, the marks show who wrote what. Where the
    template looks into the content (a marked string starts otherwise), ever weaker marks are tried.
    Raises UsageError (messages that are none, or that the template refuses), CheckpointError (a
    template that is damaged, forbidden things, or without end).
    """
    plain = _plain_inputs(messages, tools=tools, documents=documents)
    options = _plain(dict(options or {}), "template options")
    special = frozenset(special)
    control = special | {token for token in added if token in template and not token.isspace()}
    _refuse_control_tokens([*_strings(options, keys=True), *_keys(plain)], special)
    marks = _unused_characters((template, plain, options))
    markings = (
        (_mark_whole, control),
        (_mark_control_tokens, control),
        (_mark_control_tokens, special),
    )
    rest = {"add_generation_prompt": add_generation_prompt, **(tokens or {}), **options}
    variants = [plain | rest]
    for mark, known in markings:
        how = mark(_Tokens(known), marks)
        variants.append(_mapped(plain, how) | rest)
    text, marked, which = _run(template, variants, marks)
    if marked is not None:
        known = markings[which][1]
        return Rendered(text, _parts(_who_wrote(marked, marks), known), known)
    tokens_within = _Tokens(special)
    for string in _strings(plain):
        if tokens_within.found_in(string):
            raise UsageError(
                f"message text {string[:60]!r} holds (part of) a special token, and this template "
                "changes text so that it cannot be kept apart; take it out"
            )
    return Rendered(text, _parts([(text, False)], control), control)


# Inputs: plain JSON values, since a template could call the methods of anything else.


def _plain_inputs(messages, *, tools, documents):
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UsageError("messages: expected a non-empty list of {'role': ..., 'content': ...}")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise UsageError(f"{where}: found a {type(message).__name__}, expected a mapping")
        # None is dropped, as transformers does: APIs send it, and templates print it as "None".
        message = {key: value for key, value in message.items() if value is not None}
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise UsageError(f"{where}: role is {role!r}, expected a plain word such as 'user'")
        checked.append(_with_reasoning(_plain(message, where)))
    return {
        "messages": checked,
        "tools": _plain(tools, "tools"),
        "documents": _plain(documents, "documents"),
    }


def _with_reasoning(message):
    found = next((message[name] for name in _REASONING if name in message), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def _plain(value, where):
    """`value` as JSON holds it; raises UsageError where it cannot."""
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))
        for string in _strings(plain, keys=True):
            string.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: not valid Unicode ({error.reason})") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {error}; expected text, numbers, lists and mappings") from None
    return plain


def _strings(value, *, keys=False):
    """Every string in a JSON value. Recursion ends: json.dumps has been through it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, keys=keys)
    elif isinstance(value, dict):
        for key, item in value.items():
            if keys:
                yield key
            yield from _strings(item, keys=keys)


def _refuse_control_tokens(names, special):
    """In keys and in options, which are not marked, they could not be told from the template's."""
    pattern = _Tokens(special).pattern
    for name in names:
        if pattern.search(name):
            raise UsageError(f"{name[:60]!r} holds a special token; only message text may")


def _keys(value):
    if isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


# Marks


class _Tokens:
    """A set of tokens to look for in text: whole, or as the beginning or end of one at a seam."""

    def __init__(self, tokens):
        longest_first = sorted(tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._heads = {token[:n] for token in tokens for n in range(1, len(token))}
        self._tails = {token[n:] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def starts_inside(self, text):
        return any(text[:n] in self._tails for n in range(1, min(self._longest, len(text) + 1)))

    def ends_inside(self, text):
        return any(text[-n:] in self._heads for n in range(1, min(self._longest, len(text) + 1)))

    def found_in(self, text):
        return bool(self.pattern.search(text) or self.starts_inside(text) or self.ends_inside(text))


def _mark_whole(tokens, marks):
    """Marks around each string, inside its outer white space, which templates strip."""
    del tokens

    def mark(text):
        core = text.strip()
        before = text[: text.index(core)]
        after = text[len(before) + len(core) :]
        return f"{before}{marks[0]}{core}{marks[1]}{after}" if core else text

    return mark


def _mark_control_tokens(tokens, marks):
    """Marks around each control token in a string, and where a string could be one's half."""

    def mark(text):
        marked = tokens.pattern.sub(lambda match: marks[0] + match.group() + marks[1], text)
        seam = marks[0] + marks[1]
        before = seam if tokens.starts_inside(text) else ""
        return before + marked + (seam if tokens.ends_inside(text) else "")

    return mark


def _mapped(value, mark):
    """`value` with its strings marked; roles and types are words that templates compare."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, list):
        return [_mapped(item, mark) for item in value]
    if isinstance(value, dict):
        return {
            key: item if key in ("role", "type") else _mapped(item, mark)
            for key, item in value.items()
        }
    return value


def _unused_characters(value):
    """Two private-use characters that no input holds, so that nobody can write a mark himself."""
    used = set().union(*_strings(value, keys=True))
    candidates = (chr(code) for code in range(0xF0000, 0xFFFFE))
    unused = (character for character in candidates if character not in used)
    return next(unused) + next(unused)


def _who_wrote(marked, marks):
    """[(text, whether it stood inside marks)]."""
    found = []
    for index, piece in enumerate(re.split(f"{marks[0]}([^{marks}]*){marks[1]}", marked)):
        found.append((piece, index % 2 == 1))
    return found


def _parts(pieces, control):
    """The parts of `Rendered`: control tokens outside marks are the template's own."""
    pattern = _Tokens(control).pattern
    parts, text = [], []
    for piece, is_users in pieces:
        end = 0
        for match in () if is_users else pattern.finditer(piece):
            text.append(piece[end : match.start()])
            parts += [("".join(text), False), (match.group(), True)]
            text, end = [], match.end()
        text.append(piece[end:])
    parts.append(("".join(text), False))
    return tuple(part for part in parts if part[0])


# The process


def _run(template, variants, marks):
    """(text, marked text or None, which marking) from a process that renders `variants`.

    `sys.path` is handed over because the interpreter starts bare (-I -S: neither the environment
    nor site-packages' start-up code has a say, and it starts in half the time).
    """
    payload = json.dumps(
        {
            "template": template,
            "variants": variants,
            "marks": marks,
            # One clock reading for all variants, or they could differ by a second.
            "now": datetime.now().isoformat(),
            "cpu_s": CPU_S,
            "memory_bytes": MEMORY_BYTES,
        }
    ).encode()
    if len(template) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(
            f"chat template: {len(template)} characters, over the limit of {MAX_TEMPLATE_BYTES}"
        )
    boot = "import sys; sys.path[:] = sys.argv[1:]; import jlayer.text.sandbox as t; t._child()"
    root = str(Path(jlayer.__file__).parent.parent)
    path = [root, *(os.path.abspath(entry) for entry in sys.path)]
    kept = {name: os.environ[name] for name in ("TZ", "LD_LIBRARY_PATH") if name in os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", boot, *path],
            input=payload,
            capture_output=True,
            timeout=WALL_S,
            env=kept,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"chat template: gave no text within {WALL_S} s") from None
    except OSError as error:
        raise StorageError(
            f"chat template: no process could be started for it ({error.strerror})"
        ) from None
    if done.returncode:
        raise CheckpointError(_how_it_ended(done))
    return _result(json.loads(done.stdout))


def _result(found):
    """(text, marked text or None, which marking) of what `render_variants` gave."""
    if "error" in found:
        kind = UsageError if found["error"] in ("refused", "missing") else CheckpointError
        raise kind(f"chat template: {found['message']}")
    return found["text"], found["marked"], found["which"]


def _how_it_ended(done):
    if done.returncode < 0:
        return (
            f"chat template: stopped by signal {-done.returncode}; it takes more than {CPU_S} s of "
            f"computing or {MEMORY_BYTES >> 20} MB of memory"
        )
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return f"chat template: its process failed ({_one_line(last)})"


def _child():
    """What the process does: limits first, then one line of JSON on standard output."""
    payload_bytes = sys.stdin.buffer.read()
    payload = json.loads(payload_bytes)
    try:
        _jinja()
    except ImportError as error:
        found = {"error": "missing", "message": f"{error}; install jinja2>=3.1.6"}
    else:
        # Room for what grows with the messages: ten copies, each four bytes a character at worst.
        memory_bytes = payload["memory_bytes"] + 40 * len(payload_bytes)
        _limit(cpu_s=payload["cpu_s"] + len(payload_bytes) / 8e6, memory_bytes=memory_bytes)
        found = render_variants(payload, limit=MAX_TEXT_CHARS + 10 * len(payload_bytes))
    sys.stdout.write(json.dumps(found))


def _limit(*, cpu_s, memory_bytes):
    """No files, processes or core dumps from here on, and hard ends for memory and computing."""
    import resource
    import signal
    import time

    time.tzset()  # reads the time zone's file, for strftime_now
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    # Ends the process to the tick; the limit counts whole seconds, but no code can lift it.
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    used = resource.getrusage(resource.RUSAGE_SELF)
    for name, most in (
        ("RLIMIT_CPU", int(used.ru_utime + used.ru_stime + cpu_s) + 1),
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_NOFILE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (most, most))


def render_variants(payload: Mapping, *, limit: int) -> dict:
    """The text of the first variant, and of the first other one that equals it but for the marks.

    {"text", "marked", "which"} or {"error", "message"}. Runs the template in this very process, so
    it is for `_child` and for templates one knows (tests).
    """
    jinja2 = _jinja()
    now = datetime.fromisoformat(payload["now"])
    first, *marked = payload["variants"]
    unmark = str.maketrans("", "", payload["marks"])
    try:
        template = _environment(now).from_string(payload["template"])
        text = _render(template, first, limit)
    except _Refused as error:
        return {"error": "refused", "message": _one_line(str(error))}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {_one_line(str(error))}"}
    except jinja2.exceptions.SecurityError as error:
        return {"error": "unsafe", "message": f"forbidden: {_one_line(str(error))}"}
    except (MemoryError, RecursionError, OverflowError, _TooLong) as error:
        words = f"beyond the limits on work and memory ({type(error).__name__.strip('_')})"
        return {"error": "limit", "message": words}
    except Exception as error:
        return {"error": "failed", "message": _one_line(f"{type(error).__name__}: {error}")}
    for which, variables in enumerate(marked):
        try:
            again = _render(template, variables, limit)
        except Exception:  # a template that checks content may refuse marks; the next are weaker
            continue
        if again.translate(unmark) == text and _are_balanced(again, payload["marks"]):
            return {"text": text, "marked": again, "which": which}
    return {"text": text, "marked": None, "which": None}


def _render(template, variables, limit):
    chunks, length = [], 0
    for chunk in template.generate(**variables):
        length += len(chunk)
        if length > limit:
            raise _TooLong
        chunks.append(chunk)
    return "".join(chunks)


def _are_balanced(text, marks):
    """Opening and closing marks take turns, or part of a string was cut away with its mark."""
    order = [character for character in text if character in marks]
    return order == list(marks) * (len(order) // 2)


class _Refused(Exception):
    """The template called raise_exception."""


class _TooLong(Exception):
    pass


def _jinja():
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    found = tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3])
    if found < MIN_JINJA:
        raise ImportError(f"jinja2 {jinja2.__version__} has known ways out of its sandbox")
    return jinja2


def _environment(now):
    """The environment of transformers' `_compile_jinja_template`, piece by piece."""
    jinja2 = _jinja()

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks assistant text for training; here its body is plain text."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller):
            return caller()

    class Dict:
        """`dict` without its attributes."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args, **kwargs):  # as Jinja's own, so that a name may be `self`
            self, *args = args
            names = dict(*args, **kwargs)
            for name in names:
                _refuse_private(name)
            jinja2.utils.Namespace.__init__(self, names)

        def __setitem__(self, name, value):
            _refuse_private(name)
            super().__setitem__(name, value)

    def _refuse_private(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r}")

    def raise_exception(message):
        raise _Refused(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj, attribute):
            """Jinja gives an undefined value that prints as nothing; no honest template asks."""
            raise jinja2.exceptions.SecurityError(f"{attribute!r} of a {type(obj).__name__}")

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": now.strftime,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment


def _one_line(text):
    """White space runs as one space, what does not print escaped, 200 characters at most."""
    text = " ".join(text.split())[:200]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _read_text(path):
    raw = read_small_file(path, limit=MAX_TEMPLATE_BYTES)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 (byte {error.start})") from None


def _named_templates(raw, where):
    """One template, or a list of {"name", "template"}."""
    if raw is None:
        return {}
    if isinstance(raw, str):
        return {"default": raw}
    try:
        found = {row["name"]: row["template"] for row in raw}
        "".join([*found, *found.values()])
    except (TypeError, KeyError):
        raise CheckpointError(
            f"{where}: found a {type(raw).__name__}, expected text or a list of name and template"
        ) from None
    return found
