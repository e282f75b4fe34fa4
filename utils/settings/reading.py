"""Reading settings: from the command line, from a file of flags, or from the folder of a run."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

from utils.core.errors import UserError, one_line, require
from utils.core.files import read_json, read_yaml
from utils.settings.fields import OF_RUN, Settings, add_flag, as_dict, flag_words, flags_of, groups_of, takes_several
from utils.settings.parser import Parser, underscored, value_in

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # of YAML
NULLS = ("", "~", "null")  # of YAML
NOT_READ = ("resume", "config")  # flags that no file of flags may hold
DROPPED = {  # flags that are gone, with the value that did nothing
    "matching": "separate", "moments_oe": 1, "network_pool": 0, "pool_epochs": 20, "pool_last_epoch": 200,
    "outlier_recipe": "published",
}  # fmt: skip


class SettingsParser(Parser):
    """A parser of the flags of a settings class. `parse_args` returns settings, checked and completed.

    `hidden`: the flags that have no effect in this script, which no help shows.

    Args:
        settings: the class.
        prepare: called before parsing with the parser and the words of the command line; it may `extend` the parser.
    """

    def __init__(
        self,
        settings: type[Settings],
        prepare: Callable[["SettingsParser", list[str]], None] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.settings, self.prepare = settings, prepare
        usual, needs = settings(), settings.needs()
        self.hidden = {name for name in needs if any(n.of_script and not n.holds(usual) for n in needs[name])}
        self._add_flags()
        about = "a file of flags: JSON or YAML, `name: value`, or the args.json of a run; the command line overrules it"
        self.add_argument("--config", default=argparse.SUPPRESS, metavar="FILE", help=about)

    def _add_flags(self) -> None:
        """Add the flags of the settings class that the parser lacks, in groups."""
        known = {action.dest for action in self._actions}
        for group, own in groups_of(self.settings).items():
            target = self.add_argument_group(group.__doc__.split(".")[0].lower())
            for f in own:
                if f.name not in known:
                    help = argparse.SUPPRESS if f.name in self.hidden else self.settings.help_of(f)
                    add_flag(target, f, default=argparse.SUPPRESS, help=help)
                    if f.metadata.get("often") and f.name not in self.hidden:
                        self.often.add(f.name)

    def extend(self, group: type[Settings]) -> None:
        """Add the flags that a group has and the settings lack."""
        self.settings = make_dataclass(self.settings.__name__, [], bases=(self.settings, group), frozen=True)
        self._add_flags()

    def parse_known_args(self, words: Sequence[str] | None = None, namespace=None):
        """Like argparse, but the result is an object of the settings class."""
        words = underscored(sys.argv[1:] if words is None else words)
        if self.prepare:
            self.prepare(self, words)
        given, rest = self.values_of(words)
        given = _values_of_config(self, words, given) | given
        return (given if rest else self._made(given)), rest

    def values_of(self, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """The values that the words of a command line give, by name, and the words that are no flags of this parser."""
        given, rest = super().parse_known_args(words)
        return {n: tuple(v) if isinstance(v, list) else v for n, v in vars(given).items() if n != "config"}, rest

    def _made(self, given: dict[str, Any]) -> Settings:
        """The settings that the given flags make."""
        restored = self.settings.restored(self, given)
        if restored is not None:
            return self.settings(**restored)
        settings, needs = self.settings(**given), self.settings.needs()
        for name in given:
            for need in needs[name]:
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
    known = {f.name: takes_several(f) for f in flags_of(parser.settings)}
    found = []
    for name, value in flags.items():
        gone = name not in known and name in DROPPED and str(value) == str(DROPPED[name])
        if name in NOT_READ or value is None or value is False or gone:
            continue
        several, shown = isinstance(value, list), one_line(f"--{name}={value}")
        told = f"{flag}: {path} has a flag that {parser.prog} does not know: {shown}"
        require(name in known, f"{told}. Leave it out, or use the commit that knew it")
        words = flag_words(name, value)[1:] if several else []
        is_read = several <= known[name] and not any(w.startswith("-") and not w[1:2].isdigit() for w in words)
        require(is_read, f"{flag}: {path} has {shown}; give one value, or several that do not begin with -")
        found += flag_words(name, value) if several or value is True else [f"--{name}={value}"]
    return found


def _values_of_config(parser: SettingsParser, words: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """The values in the file of `--config`, by name; `given`: those of the `words` of the command line.

    Left out are those at their default, since they may need other flags; but what names the run stays. In the args.json
    of a run it is the default of its own method, and what had no effect is left out, too.
    """
    name = value_in(words, "config")
    if name is None:
        return {}
    flags, of_run = _flags_in(path := Path(name), parser)
    code = flags.get("method_file")
    told = f"--config: {path} names --method_file {one_line(code)}, which is code; give that flag on the command line"
    require(code is None or "method_file" in given, told)
    found, _ = parser.values_of([*words, *flags_as_words(parser, flags, "--config", path)])
    values = {name: value for name, value in found.items() if name in flags}
    made = parser.settings(**(values if of_run else values | given))
    usual, used = made.defaults(), as_dict(made) if of_run else values
    usual |= {f.name: f.default for f in flags_of(parser.settings) if f.name in parser.hidden}  # for a sister script
    return {n: v for n, v in values.items() if n in used and (n in OF_RUN or v != usual[n])}


def _flags_in(path: Path, parser: SettingsParser) -> tuple[dict[str, Any], bool]:
    """The flags in a file by name, and whether it is the args.json of a run."""
    content = (read_yaml if path.suffix in (".yaml", ".yml") else read_json)(path, "--config")
    of_run = isinstance(content.get("flags"), dict)
    flags = content["flags"] if of_run else content
    flags = {key.replace("-", "_"): None if value in NULLS else value for key, value in flags.items()}
    for f in flags_of(parser.settings):
        value = flags.get(f.name)
        if f.default is False and isinstance(value, str):
            flags[f.name] = BOOLEANS.get(value.lower(), value)
        elif not isinstance(f.default, bool) and isinstance(value, bool):
            flags[f.name] = "on" if value else "off"  # of --compile, in JSON
    if of_run and content.get("script", parser.prog) != parser.prog:
        flags.pop("save_path", None)  # where that script writes
    return {name: value for name, value in flags.items() if value is not None and value is not False}, of_run
