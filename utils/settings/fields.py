"""Settings that are declared once: a field of a frozen dataclass is a flag, with its default, check, help and needs.

A group is such a dataclass. The settings of a script are a dataclass that has groups as its bases; `SettingsParser` of
`utils/settings/reading.py` reads them from a command line, and `as_words` writes them back.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from decimal import Decimal
from typing import Any, ClassVar, Self

from utils.settings.parser import one_of

FEW = 8  # names that the help shows in braces; more are in the text


@dataclass(frozen=True)
class Need:
    """What must hold of the settings, so that a flag has an effect; given without it, the flag is refused."""

    holds: Callable[[Any], bool]
    why: str  # the message behind the flag's name, with values of settings in braces
    of_script: bool = False  # the script decides it, so where it does not hold, the help leaves the flag out


def flag(default: Any, help: str, check: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """A field that is also the flag `--<its name>`.

    Args:
        default: False for a flag without a value; a tuple for one with several.
        help: what it does, and when to change it.
        check: turns the word of the command line into the value; raises `argparse.ArgumentTypeError`.
        more: `names`: the values that are accepted, if they are few, and `what` they are, from which the check follows;
            `often`: shown by `--help`, and not only by
            `--help-all`; `needs`: several `Need`s; `always`: written into every command line, since it names the run;
            `may_change`: whether a resumed run may be given another value; `many`: takes several values;
            `positional`: it has no name on the command line; `required`; `short`: a further name, as `-v`;
            and `nargs`, `const`, `action` and `metavar` of argparse.
    """
    if "what" in more:
        check = one_of(more.pop("what"), more["names"])
    return field(default=default, metadata={"help": help, "check": check, **more})


def with_default(group: type, name: str, default: Any, **more: Any) -> Any:
    """The field `name` of a group, with another default, and `more` in the place of what `flag` was given."""
    return field(default=default, metadata={**group.__dataclass_fields__[name].metadata, **more})


@dataclass(frozen=True)
class Settings:
    """The base class of groups and of the settings of scripts."""

    NEEDS: ClassVar[Mapping[type | str, Sequence[Need]]] = {}  # in this script, by group or name of a flag

    def defaults(self) -> dict[str, Any]:
        """By name, the values that these settings have where no flag but `--method` and the like is given."""
        return {f.name: f.default for f in fields(self)}

    def completed(self, given: Mapping[str, Any]) -> Self:
        """The settings with what follows from others; `given`: the flags that were given.

        Raises:
            UserError: for settings that contradict each other.
        """
        return self

    @classmethod
    def restored(cls, parser: argparse.ArgumentParser, given: dict[str, Any]) -> dict[str, Any] | None:
        """All values of the run that is to be resumed, by name; None where there is none."""
        return None


def groups_of(settings: type) -> dict[type, list[Field]]:
    """The flags of a settings class, by the group that declares them, in the order of the bases."""
    found: dict[type, list[Field]] = {}

    def visit(cls: type) -> None:
        """Add the flags of a class after those of its bases."""
        for base in cls.__bases__:
            visit(base)
        if cls in found or not is_dataclass(cls):
            return
        known = {f.name for of_group in found.values() for f in of_group}
        own = [
            settings.__dataclass_fields__[name] for name in vars(cls).get("__annotations__", ()) if name not in known
        ]
        found[cls] = [f for f in own if isinstance(f, Field) and "help" in f.metadata]

    visit(settings)
    return {group: own for group, own in found.items() if own}


def flags_of(settings: type) -> Iterator[Field]:
    """The fields of a settings class that are flags."""
    return (f for of_group in groups_of(settings).values() for f in of_group)


def needs_of(settings: type) -> dict[str, list[Need]]:
    """What each flag of a settings class needs, by name: first what the script says of it, then its own."""
    needs: dict[str, list[Need]] = {}
    said = [cls.NEEDS for cls in settings.__mro__ if "NEEDS" in vars(cls)]
    for group, own in groups_of(settings).items():
        for f in own:
            stated = [need for of_class in said for key in (f.name, group) for need in of_class.get(key, ())]
            needs[f.name] = [*stated, *f.metadata.get("needs", ())]
    return needs


def add_group(target: argparse._ActionsContainer, own: list[Field], **more: Any) -> list[argparse.Action]:
    """Add fields as flags to a parser or a group of one; `more`: arguments of argparse for all of them."""
    return [_add(target, f, more) for f in own]


def _add(target: argparse._ActionsContainer, f: Field, more: dict[str, Any]) -> argparse.Action:
    meta = dict(f.metadata)
    words = [*([meta["short"]] if "short" in meta else []), f.name if "positional" in meta else f"--{f.name}"]
    if f.default is False and "action" not in meta:
        return target.add_argument(*words, **{"action": "store_true", "help": meta["help"]} | more)
    kind = {key: meta[key] for key in ("nargs", "const", "action", "required") if key in meta}
    if meta.get("many"):
        kind["nargs"] = "+"
    names = meta.get("names", ())
    shown = f"{{{','.join(names)}}}" if 0 < len(names) <= FEW else None
    kind["metavar"] = meta.get("metavar") or shown or _unit(f.type) or None
    help = meta["help"] if meta.get("required") else with_shown_default(meta["help"], f.default)
    return target.add_argument(*words, **{"type": meta["check"], "default": f.default, "help": help} | kind | more)


def with_shown_default(text: str, default: object) -> str:
    """A help text with the default; None, False and an empty text say nothing."""
    if default in (None, False, "", ()):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text} (default: {shown})".replace("%", "%%")


def _unit(kind: object) -> str:
    """How the help shows the value of a field of this type: N for whole numbers, X for others; empty for words."""
    kinds = (kind, *getattr(kind, "__args__", ()))
    return "N" if int in kinds else "X" if float in kinds else ""


def as_dict(settings: Settings) -> dict[str, Any]:
    """The flags of a script with their values, as `args.json` keeps them."""
    return {f.name: getattr(settings, f.name) for f in flags_of(type(settings))}


def as_words(settings: Settings) -> list[str]:
    """The words of a command line that parse to these settings.

    They begin with what names the run. A flag that is at its default or has no effect here is left out.
    """
    usual, needs = settings.defaults(), needs_of(type(settings))
    found = []
    for f in sorted(flags_of(type(settings)), key=lambda f: not f.metadata.get("always")):
        value, name = getattr(settings, f.name), f.name
        differs = value != usual[name] and all(need.holds(settings) for need in needs[name])
        if "positional" not in f.metadata and (f.metadata.get("always") or differs):
            found += flag_words(name, value)
    return found


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
