"""The argument parser of the scripts, and the types that check the values of flags."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from utils.core.errors import print_error, unknown_name


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts `-` and `_` alike in flag names and reports errors in one line.

    `often`: the flags that `--help` shows; if it is empty, all. `--help-all` shows all.
    """

    def __init__(self, **kwargs):
        self.often: set[str] = set()
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)
        hidden = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        self.add_argument("--help_all", action=_HelpAll, nargs=0, **hidden)
        self.add_argument("--is_parallel", action=_Refused, nargs="?", **hidden)

    def format_help(self, every: bool = False) -> str:
        """The flags that most people set; all, in groups, with `every` or where none is marked so."""
        groups = [(group.title, group._group_actions) for group in self._action_groups]
        if self.often and not every:
            shown = [action for _, actions in groups for action in actions if action.dest in self.often]
            groups = [("what most people set (--help-all shows all flags)", shown)]
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        for title, actions in groups:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def parse_known_args(self, words: Sequence[str] | None = None, namespace=None):
        """Like argparse, with `_` for `-` in flag names."""
        return super().parse_known_args(underscored(sys.argv[1:] if words is None else words), namespace)

    def error(self, message: str) -> None:
        """Print one line on stderr and exit with status 2."""
        sys.exit(print_error(self.prog, f"{message} (see --help)"))


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows defaults; keeps the lines of a description."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=118)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = with_shown_default(action.help, action.default) if action.option_strings else action.help
        return text.replace("%", "%%")  # argparse formats it


class _HelpAll(argparse.Action):
    def __call__(self, parser, *_):
        print(parser.format_help(every=True), end="")
        parser.exit()


class _Refused(argparse.Action):
    def __call__(self, parser, *_):
        parser.error("--is_parallel was removed; start several processes or GPUs with torchrun")


def underscored(words: Sequence[str]) -> list[str]:
    """The words of a command line with `_` for `-` in the names of flags: `--dsa_strategy=x-y`."""
    return [re.sub("(?<=^--)[^=]+", lambda name: name[0].replace("-", "_"), word) for word in words]


def value_in(words: Sequence[str], name: str) -> str | None:
    """The value of a flag in the words of a command line, before they are parsed; None where it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", nargs="?")
    return getattr(parser.parse_known_args(words)[0], name)


def with_shown_default(text: str, default: object) -> str:
    """A help text with the default; None, False and what is empty say nothing."""
    if default is None or default is False or default in ("", (), [], argparse.SUPPRESS):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
    return f"{text} (default: {shown})"


def one_of(what: str, accepted: Iterable[str]) -> Callable[[str], str]:
    """An argparse type for names in `accepted` (read at each call); its error lists them and suggests the nearest."""

    def check(text: str) -> str:
        """The name, if it is accepted."""
        if text not in accepted:
            raise argparse.ArgumentTypeError(unknown_name(what, text, accepted))
        return text

    return check


def count(least: int) -> Callable[[str], int]:
    """An argparse type for whole numbers of at least `least`, and below 2**63."""
    return _within(int, least, 2**63, False, f"a whole number of at least {least}")


def number(least: float, exclusive: bool = False) -> Callable[[str], float]:
    """An argparse type for finite numbers of at least `least` (above it if `exclusive`)."""
    return _within(float, least, math.inf, exclusive, f"a number {'above' if exclusive else 'from'} {least:g}")


def _within(kind: type, least: float, below: float, exclusive: bool, what: str) -> Callable[[str], Any]:
    """An argparse type for numbers from `least` (above it if `exclusive`) to less than `below`; `what`: these."""

    def check(text: str) -> Any:
        """The number that the text is."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value >= below:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is too large")
        if not value >= least or (exclusive and value == least):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return check
