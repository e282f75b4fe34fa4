"""The argument parser of the scripts, and the types that check the values of flags."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

from utils.core.errors import print_error_once, unknown_name


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts `-` and `_` alike in flag names and reports errors in one line.

    `preparations`: called before parsing with the parser and the words of the command line.
    `completions`: called after parsing with the parser, the namespace and the given flags (values by name); each
    returns the namespace and the given flags for the next.
    """

    def __init__(self, **kwargs):
        self.preparations: list[Callable[[Parser, list[str]], None]] = []
        self.completions: list[Callable] = []
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)
        self.add_argument("--is_parallel", nargs="?", action=_Refused, help=argparse.SUPPRESS)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """Like argparse, with `_` for `-` in flag names, and with `preparations` and `completions`."""
        args = sys.argv[1:] if args is None else args
        words = [_underscored(a) for a in args]
        for prepare in self.preparations:
            prepare(self, words)
        namespace, rest = super().parse_known_args(words, namespace)
        del namespace.is_parallel
        if self.completions and not rest:
            lists = {action.dest for action in self._actions if isinstance(action, argparse._AppendAction)}
            missing = argparse.Namespace(**{name: None if name in lists else _NOT_GIVEN for name in vars(namespace)})
            seen = vars(super().parse_known_args(words, missing)[0])
            absent = (None, _NOT_GIVEN)
            given = {n: v for n, v in seen.items() if n in namespace and v is not absent[n not in lists]}
            for complete in self.completions:
                namespace, given = complete(self, namespace, given)
            vars(namespace).pop("is_parallel", None)
        return namespace, rest

    def error(self, message: str) -> None:
        """Print one line on stderr and exit with status 2."""
        sys.exit(print_error_once(self.prog, f"{message} (see --help)"))


_NOT_GIVEN = object()


class _Refused(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.error("--is_parallel was removed; start several processes or GPUs with torchrun")


def _underscored(argument: str) -> str:
    """Turn `--dsa-strategy=x-y` into `--dsa_strategy=x-y`; return anything but a long flag unchanged."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def flag_words(name: str, value: object) -> list[str]:
    """A flag and its value as words of a command line that parse to the same value; none for None and False."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    if isinstance(value, (list, tuple)):
        return [f"--{name}", *map(_word, value)]
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


def _word(value: object) -> str:
    """A value as a word; argparse takes negative numbers for flags if they have an exponent."""
    return f"{Decimal(str(value)):f}" if isinstance(value, float) and "e" in str(value) else str(value)


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
