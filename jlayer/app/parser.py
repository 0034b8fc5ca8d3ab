"""How a command line is read: argparse, without its guesses.

An option is written whole. What follows an option that takes a value is that value, also where it
begins with a dash. Positional words may stand before, between and after the options.
"""

from __future__ import annotations

import argparse
import difflib

from jlayer.errors import UsageError

# Stands for a value that is "--", which argparse drops. No argument of a process has a NUL.
_DASHES = "\0--"


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=100)


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, so that a usage error is one line and exit code 2."""

    def __init__(self, **options):
        self._known = {}  # option as it is written -> its action
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
        self._known |= dict.fromkeys(action.option_strings, action)
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
            elif word in self._known:
                options += self._with_value(word, words)
            elif word.startswith("-") and word != "-":
                word = self._one_dash_checked(word)
                if not self._is_option(word):  # what follows it is no positional word
                    self.error(self._unknown([word]))
                options.append(word)
            else:
                positional.append(word)
        return options + positional

    def _with_value(self, word, words):
        action = self._known[word]
        if action.nargs == 0:  # --json and its like
            return [word]
        name, value = action.option_strings[-1], next(words, None)
        if value is None:
            self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        if value.split("=")[0] in self._known:
            raise UsageError(
                f"{word}: found the option {value}, expected a value; "
                f"write {name}={value} if that is the value"
            )
        return [f"{name}={_DASHES if value == '--' else value}"]

    def _is_option(self, word):
        """Whether it is a known option, alone or with its value: --n=5, -n5."""
        return word.split("=")[0] in self._known or (word[1] != "-" and word[:2] in self._known)

    def _one_dash_checked(self, word):
        """`-prompt` would be read as -p with the value "rompt"."""
        if f"-{word}".split("=")[0] in self._known:
            raise UsageError(f"{word}: an option of this name has two dashes: -{word}")
        return word

    def _unknown(self, words):
        name = words[0].split("=")[0]
        others = [known for known in self._known if known != name]
        begun = [known for known in others if name.startswith("--") and known.startswith(name)]
        close = begun or difflib.get_close_matches(name, others, n=1)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        return f"unrecognized arguments: {' '.join(words)}{hint}"


def _with_dashes(value):
    if isinstance(value, list):
        return [_with_dashes(one) for one in value]
    return "--" if value == _DASHES else value
