"""How a command line is read: argparse, without its guesses.

An option is written whole. What follows an option that takes a value is that value, also where it
begins with a dash. Positional words may stand before, between and after the options.
"""

from __future__ import annotations

import argparse
import difflib
import reprlib

from jlayer.errors import UsageError

# Stands for a value that is "--", which argparse drops. No argument of a process has a NUL.
_DASHES = "\0--"
# What an option that takes a number expects, in words.
_NUMBERS = {int: "a whole number", float: "a number"}
# Our option -> its names in llama.cpp, vLLM, mlx-lm, ollama, transformers and the like, where they
# are spelt too differently to be guessed.
MEANT = {
    "--device-memory": "--gpu-memory --gpu-mem --vram --max-gpu-memory --max-vram -ngl --ngl "
    "--gpu-layers --n-gpu-layers --gpu-memory-utilization",
    "--host-memory": "--ram --max-ram --cpu-memory --cpu-mem --max-cpu-memory --system-memory "
    "--cpu-offload-gb",
    "--max-new-tokens": "--n-predict --num-predict --predict --max-length --max-output-tokens "
    "--max-completion-tokens --num-tokens",
    "--context": "-c --ctx-size --ctx --n-ctx --num-ctx --max-model-len --max-seq-len "
    "--max-seq-length --max-context --max-kv-size",
    "--prompt-file": "-f --file",
    "--system": "-sys --sys --system-message",
    "--repetition-penalty": "--repeat-penalty",
    "--stop": "-r --reverse-prompt --stop-strings --stop-sequences",
    "--num-return-sequences": "--num-samples --n-samples --best-of",
    "--chat": "-cnv --conversation --apply-chat-template",
    "--template-var": "--chat-template-kwargs --chat-template-args --chat-template-config",
    "--quantize": "-q --q-bits --bits --load-in-8bit --load-in-4bit",
    "--draft": "-md --model-draft --draft-model --assistant-model --speculative-model",
    "--draft-tokens": "--draft-max --draft-n --num-draft-tokens --num-speculative-tokens "
    "--num-assistant-tokens",
    "--speculate": "--speculative --spec-type --speculative-config",
    "--dtype": "--precision --torch-dtype --outtype",
    "--device": "--backend --device-map",
    "--offline": "--local-files-only",
    "--overwrite": "--force",
    "--seed": "--random-seed",
    "--text": "--input --corpus",
    "--quiet": "--silent",
}
_MEANT_BY = {name: ours for ours, names in MEANT.items() for name in names.split()}


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=100)


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, so that a usage error is one line and exit code 2."""

    def __init__(self, **options):
        self.known = {}  # option as it is written -> its action
        self._has_commands = False
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False, **options})

    def error(self, message):
        raise UsageError(f"{message}; see {self.prog} --help")

    def add_argument(self, *names, **options):
        return self._noted(super().add_argument(*names, **options))

    def add_argument_group(self, *words, **options):
        return self._noting(super().add_argument_group(*words, **options))

    def add_mutually_exclusive_group(self, **options):
        return self._noting(super().add_mutually_exclusive_group(**options))

    def add_subparsers(self, **options):
        self._has_commands = True
        return super().add_subparsers(**options)

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        for name, value in vars(found).items():
            setattr(found, name, _with_dashes(value))
        return found

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(self._ordered(args), namespace)

    def _noted(self, action):
        self.known |= dict.fromkeys(action.option_strings, action)
        if action.type in _NUMBERS:
            action.type = _number(action.type, "/".join(action.option_strings) or action.metavar)
        return action

    def _noting(self, group):
        add = group.add_argument
        group.add_argument = lambda *names, **options: self._noted(add(*names, **options))
        return group

    def _ordered(self, words):
        """The words as argparse reads them without a guess: each option joined with its value,
        then the positional ones. Those of a parser with commands belong to the command."""
        if self._has_commands:
            return words
        options, positional, words = [], [], iter(words)
        for word in words:
            if word == "--":
                positional += [word, *words]
            elif word in self.known:
                options += self._with_value(word, words)
            elif word.startswith("-") and word != "-":
                word = self._one_dash_checked(word)
                is_others = word.split("=")[0] in _MEANT_BY  # -ngl is no -n
                if is_others or not self._is_option(word):  # what follows it is no positional word
                    self.error(self._unknown([word]))
                options.append(word)
            else:
                positional.append(word)
        return options + positional

    def _with_value(self, word, words):
        action = self.known[word]
        if action.nargs == 0:  # --json and its like
            return [word]
        name, value = action.option_strings[-1], next(words, None)
        if value is None:
            self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        if value.split("=")[0] in self.known:
            raise UsageError(
                f"{word}: found the option {value}, expected a value; "
                f"write {name}={value} if that is the value"
            )
        return [f"{name}={_DASHES if value == '--' else value}"]

    def _is_option(self, word):
        """Whether it is a known option, alone or with its value: --n=5, -n5."""
        return word.split("=")[0] in self.known or (word[1] != "-" and word[:2] in self.known)

    def _one_dash_checked(self, word):
        """`-prompt` would be read as -p with the value "rompt"."""
        if f"-{word}".split("=")[0] in self.known:
            raise UsageError(f"{word}: an option of this name has two dashes: -{word}")
        return word

    def _unknown(self, words):
        name = words[0].split("=")[0]
        others = [known for known in self.known if known != name]
        begun = [known for known in others if name.startswith("--") and known.startswith(name)]
        meant = [_MEANT_BY[name]] if _MEANT_BY.get(name) in self.known else []
        close = meant or begun or difflib.get_close_matches(name, others, n=1)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        return f"unrecognized arguments: {' '.join(words)}{hint}"


def _number(kind, name):
    """Reads a number; what is none is refused in our words."""

    def read(text):
        try:
            return kind(text)
        except ValueError:
            found = f"{name}: found {reprlib.repr(text)}, expected {_NUMBERS[kind]}"
        raise UsageError(found)

    return read


def _with_dashes(value):
    if isinstance(value, list):
        return [_with_dashes(one) for one in value]
    return "--" if value == _DASHES else value
