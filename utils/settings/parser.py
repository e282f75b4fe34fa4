"""The argument parser of the scripts, and the types that check the values of flags."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence

from utils.core.errors import print_error, unknown_name


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts `-` and `_` alike in flag names and reports errors in one line.

    `often`: the flags that `--help` shows; if it is empty, all. `--help-all` shows all.

    Args:
        example: lines that `--help` begins with.
    """

    def __init__(self, example: str = "", **kwargs):
        self.often: set[str] = set()
        self.example = example
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)
        hidden = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        self.add_argument("--help_all", action=_HelpAll, **hidden)
        self.add_argument("--is_parallel", nargs="?", action=_Refused, **hidden)

    def format_help(self) -> str:
        """The flags that most people set, or all where none is marked so."""
        return self._help(self.often)

    def format_help_all(self) -> str:
        """All flags, in groups."""
        return self._help(set())

    def _help(self, often: set[str]) -> str:
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        if self.example:
            formatter.add_text(self.example)
        groups = [(group.title, group._group_actions) for group in self._action_groups]
        if often:
            shown = [action for _, actions in groups for action in actions if action.dest in often]
            groups = [("what most people set (--help-all shows all flags)", shown)]
        for title, actions in groups:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def parse_known_args(self, words: Sequence[str] | None = None, namespace=None):
        """Like argparse, with `_` for `-` in flag names."""
        return super().parse_known_args(self.underscored(sys.argv[1:] if words is None else words), namespace)

    def underscored(self, arguments: Sequence[str]) -> list[str]:
        """The words with `_` for `-` in the names of flags."""
        return [_underscored(argument) for argument in arguments]

    def error(self, message: str) -> None:
        """Print one line on stderr and exit with status 2."""
        sys.exit(print_error(self.prog, f"{message} (see --help)"))


class _Help(argparse.HelpFormatter):
    """Shows defaults, but for None and False, which say nothing; keeps the lines of an example."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=118)

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default in (None, False, argparse.SUPPRESS) or not action.option_strings or "%(default)" in action.help:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else "%(default)s"
        return f"{action.help} (default: {shown})" if shown != "" else action.help

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "\n".join(indent + line for line in text.splitlines())
        return super()._fill_text(text, width, indent)


class _HelpAll(argparse.Action):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help_all(), end="")
        parser.exit()


class _Refused(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.error("--is_parallel was removed; start several processes or GPUs with torchrun")


def _underscored(argument: str) -> str:
    """Turn `--dsa-strategy=x-y` into `--dsa_strategy=x-y`; return anything but a long flag unchanged."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def one_of(what: str, accepted: Iterable[str]) -> Callable[[str], str]:
    """An argparse type for names in `accepted` (read at each call); its error lists them and suggests the nearest."""

    def check(text: str) -> str:
        """`text`, if it is accepted."""
        if text not in accepted:
            raise argparse.ArgumentTypeError(unknown_name(what, text, accepted))
        return text

    return check


def count(least: int) -> Callable[[str], int]:
    """An argparse type for whole numbers of at least `least`."""

    def check(text: str) -> int:
        """`text` as a number, if it is accepted."""
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        if value >= 2**63:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is too large; numbers must be below 2**63")
        return value

    return check


def number(least: float, exclusive: bool = False) -> Callable[[str], float]:
    """An argparse type for finite numbers of at least `least` (above it if `exclusive`)."""

    def check(text: str) -> float:
        """`text` as a number, if it is accepted."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (exclusive and value == least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {'above' if exclusive else 'from'} {least:g}")
        return value

    return check
