"""Reading settings: from the command line, from a file of flags, or from the folder of a run."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

from utils.core.errors import UserError, blame, one_line
from utils.core.files import check_file, read_json
from utils.settings.fields import Settings, add_group, flag_words, flags_of, groups_of, needs_of
from utils.settings.parser import Parser

NOT_READ = ("resume", "config")  # flags that no file of flags may hold


class SettingsParser(Parser):
    """A parser of the flags of a settings class. `parse_args` returns settings, checked and completed.

    `defaults_of_methods`: the flags whose default depends on `--method`; a file of flags always gives them.

    Args:
        settings: the class.
        prepare: called before parsing with the parser and the words of the command line; it may change both.
    """

    def __init__(
        self,
        settings: type[Settings],
        example: str = "",
        prepare: Callable[["SettingsParser", list[str]], None] | None = None,
        **kwargs: Any,
    ):
        super().__init__(example, **kwargs)
        self.prepare = prepare
        self.defaults_of_methods: set[str] = set()
        self.settings = settings
        usual = settings()
        self.hidden = {
            n for n, needs in needs_of(settings).items() if any(e.of_script and not e.holds(usual) for e in needs)
        }
        self._add_flags(settings, known=set())
        self.add_argument(
            "--config",
            default=argparse.SUPPRESS,
            metavar="FILE",
            help="a file of flags: JSON or YAML, `name: value`, or the args.json of a run; the command line overrules "
            "it",
        )

    def _add_flags(self, settings: type[Settings], known: set[str]) -> None:
        """Add the flags of a settings class in groups, without those that are known."""
        for group, own in groups_of(settings).items():
            if new := [f for f in own if f.name not in known]:
                target = self.add_argument_group(group.__doc__.split(".")[0].lower())
                for f, action in zip(new, add_group(target, new, default=argparse.SUPPRESS), strict=True):
                    if f.name in self.hidden:
                        action.help = argparse.SUPPRESS
                    elif f.metadata.get("often"):
                        self.often.add(f.name)

    def extend(self, group: type[Settings]) -> None:
        """Add the flags that a group has and the settings lack."""
        self._add_flags(group, known={f.name for f in flags_of(self.settings)})
        self.settings = make_dataclass(self.settings.__name__, [], bases=(self.settings, group), frozen=True)

    def parse_known_args(self, words: Sequence[str] | None = None, namespace=None):
        """Like argparse, but the result is an object of the settings class."""
        arguments = self.underscored(sys.argv[1:] if words is None else words)
        if self.prepare is not None:
            self.prepare(self, arguments)
        _read_config(self, arguments)
        given, rest = super().parse_known_args(arguments)
        return (given, rest) if rest else (self._made(self._values(given)), rest)

    def values_of(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The values that some words of a command line give, by name, without further checks."""
        return self._values(super().parse_known_args(list(arguments))[0])

    def _values(self, namespace: argparse.Namespace) -> dict[str, Any]:
        given = {n: tuple(v) if isinstance(v, list) else v for n, v in vars(namespace).items() if n != "config"}
        return {name: value for name, value in given.items() if value is not None}

    def _made(self, given: dict[str, Any]) -> Settings:
        """The settings that the given flags make."""
        restored = self.settings.restored(self, given)
        if restored is not None:
            return self.settings(**restored)
        settings = self.settings(**given)
        needs = needs_of(self.settings)
        for name in given:
            for need in needs.get(name, ()):
                if not need.holds(settings):
                    self.error(f"--{name}: {need.why.format_map(vars(settings))}")
        try:
            return settings.completed(given)
        except UserError as error:
            self.error(str(error))


def flags_as_words(parser: SettingsParser, flags: Mapping[str, object], flag: str, path: Path) -> list[str]:
    """Flags that a file holds, as words of a command line, so that the parser checks them.

    Args:
        flag, path: the flag that named the file, and the file, for messages.
    Raises:
        UserError: for a flag that the parser does not know, or a value that would be parsed as a flag.
    """
    takes_several = {
        f.name: bool(f.metadata.get("many") or f.metadata.get("nargs") == "*") for f in flags_of(parser.settings)
    }
    found = []
    for name, value in flags.items():
        if name in NOT_READ or value is None or value is False:
            continue
        several = flag_words(name, value)[1:] if isinstance(value, list) else []
        fits = takes_several.get(name) == isinstance(value, list)
        if not fits or any(v.startswith("-") and not v[1:2].isdigit() for v in several):
            wrong = one_line(f"--{name}={value}")
            raise UserError(f"{flag}: {path} has a flag that {parser.prog} does not know: {wrong}")
        found += flag_words(name, value) if isinstance(value, (bool, list)) else [f"--{name}={value}"]
    return found


def _read_config(parser: SettingsParser, arguments: list[str]) -> None:
    """Put the flags of `--config` before the words of the command line.

    Those that the command line has itself are left out, and those at a default that is the same for all methods: they
    may need other flags.
    """
    given = {word.partition("=")[0].removeprefix("--") for word in arguments if word.startswith("--")}
    if "config" not in given or "resume" in given:
        return
    place = next(i for i, word in enumerate(arguments) if word.partition("=")[0] == "--config")
    name = arguments[place].partition("=")[2] or "".join(arguments[place + 1 : place + 2])
    with blame("--config"):
        path = check_file(Path(name))
    flags = _content(path)
    flags = flags.get("flags", flags) if isinstance(flags, dict) else None
    if not isinstance(flags, dict) or not all(isinstance(key, str) for key in flags):
        raise UserError(f"--config: {path} holds no flags; write `name: value` in each line, or give an args.json")
    flags = {key.replace("-", "_"): value for key, value in flags.items()}
    varies = parser.defaults_of_methods - parser.hidden
    usual = {f.name: f.default for f in flags_of(parser.settings) if f.name not in varies}
    usual = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    changed = {k: v for k, v in flags.items() if k not in given and (k not in usual or v != usual[k])}
    arguments[:0] = flags_as_words(parser, changed, "--config", path)


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
