"""The argument parser of the scripts, and the types that check the values of flags."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

from utils.core.errors import UserError, blame, one_line, print_error, unknown_name
from utils.core.files import check_file, read_json

NOT_STORED = ("resume", "config", "help", "help_all", "is_parallel")  # flags that no file of flags may hold


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts `-` and `_` alike in flag names and reports errors in one line.

    `preparations`: called before parsing with the parser and the words of the command line.
    `completions`: called after parsing with the parser, the namespace and the given flags (values by name); each
    returns the namespace and the given flags for the next.
    `needs`: by flag, what must hold of the namespace where it is given, and the message if it does not.
    `often`: the flags that `--help` shows; if it is empty, all. `--help-all` shows all.

    Args:
        example: lines that `--help` begins with.
    """

    def __init__(self, example: str = "", **kwargs):
        self.preparations: list[Callable[[Parser, list[str]], None]] = []
        self.completions: list[Callable] = [_check_needs]
        self.needs: dict[str, tuple[Callable[[argparse.Namespace], bool], str]] = {}
        self.often: set[str] = set()
        self.example = example
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)
        self.add_argument("--help_all", action=_HelpAll, help=argparse.SUPPRESS)
        self.add_argument("--is_parallel", nargs="?", action=_Refused, help=argparse.SUPPRESS)

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

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """Like argparse, with `_` for `-` in flag names, and with `preparations` and `completions`."""
        args = sys.argv[1:] if args is None else args
        words = [_underscored(a) for a in args]
        for prepare in self.preparations:
            prepare(self, words)
        namespace, rest = super().parse_known_args(words, namespace)
        del namespace.is_parallel, namespace.help_all
        if self.completions and not rest:
            lists = {action.dest for action in self._actions if isinstance(action, argparse._AppendAction)}
            missing = argparse.Namespace(**{name: None if name in lists else _NOT_GIVEN for name in vars(namespace)})
            seen = vars(super().parse_known_args(words, missing)[0])
            absent = (None, _NOT_GIVEN)
            given = {n: v for n, v in seen.items() if n in namespace and v is not absent[n not in lists]}
            for complete in self.completions:
                namespace, given = complete(self, namespace, given)
            for name in ("is_parallel", "help_all"):
                vars(namespace).pop(name, None)
        return namespace, rest

    def error(self, message: str) -> None:
        """Print one line on stderr and exit with status 2."""
        sys.exit(print_error(self.prog, f"{message} (see --help)"))


_NOT_GIVEN = object()


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


def _check_needs(parser: Parser, args: argparse.Namespace, given: dict) -> tuple[argparse.Namespace, dict]:
    """Refuse flags that were given and have no effect; those of a resumed run were checked at its start."""
    for name in () if getattr(args, "resume", None) else given:
        if name in parser.needs:
            holds, why = parser.needs[name]
            if not holds(args):
                parser.error(f"--{name}: {why.format_map(vars(args))}")
    return args, given


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


def flags_as_words(parser: Parser, flags: Mapping[str, object], flag: str, path: Path) -> list[str]:
    """Flags that a file holds, as words of a command line, so that the parser checks them.

    Args:
        flag, path: the flag that named the file, and the file, for messages.
    Raises:
        UserError: for a flag that the parser does not know, or a value that would be parsed as a flag.
    """
    known = {action.dest: action.nargs for action in parser._actions if action.dest not in NOT_STORED}
    words = []
    for name, value in flags.items():
        if name in ("resume", "config") or value is None or value is False:
            continue
        values = flag_words(name, value)[1:] if isinstance(value, list) else []
        fits = name in known and (isinstance(value, list) == (known[name] == "+"))
        if not fits or any(v.startswith("-") and not v[1:2].isdigit() for v in values):
            found = one_line(f"--{name}={value}")
            raise UserError(f"{flag}: {path} has a flag that {parser.prog} does not know: {found}")
        words += flag_words(name, value) if isinstance(value, (bool, list)) else [f"--{name}={value}"]
    return words


def add_config(parser: Parser) -> None:
    """Add `--config`, a file of flags; those of the command line overrule it."""
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="a file of flags: JSON or YAML, `name: value`, or the args.json of a run; the command line overrules it",
    )
    parser.preparations.append(_read_config)


def _read_config(parser: Parser, words: list[str]) -> None:
    """Put the flags of `--config` before the words of the command line.

    Those that it has itself are left out, and those that are at their defaults, which may need others to be given.
    """
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    if "config" not in given or "resume" in given:
        return
    place = next(i for i, word in enumerate(words) if word.partition("=")[0] == "--config")
    name = words[place].partition("=")[2] or "".join(words[place + 1 : place + 2])
    with blame("--config"):
        path = check_file(Path(name))
    flags = _content(path)
    flags = flags.get("flags", flags) if isinstance(flags, dict) else None
    if not isinstance(flags, dict) or not all(isinstance(key, str) for key in flags):
        raise UserError(f"--config: {path} holds no flags; write `name: value` in each line, or give an args.json")
    flags = {key.replace("-", "_"): value for key, value in flags.items()}
    changed = {k: v for k, v in flags.items() if k not in given and v != parser.get_default(k)}
    words[:0] = flags_as_words(parser, changed, "--config", path)


def _content(path: Path) -> object:
    """What a JSON or YAML file holds."""
    if path.suffix not in (".yaml", ".yml"):
        return read_json(path, "--config")
    try:
        import yaml
    except ImportError:
        raise UserError(f"--config: {path} is read by the package PyYAML: pip install pyyaml") from None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config: cannot read {path}: {one_line(error)}. Mend it") from None


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
