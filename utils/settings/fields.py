"""Settings that are declared once: a field of a frozen dataclass is a flag, with its default, check, help and needs.

A group is such a dataclass. The settings of a script are a dataclass that has groups as its bases; `SettingsParser` of
`utils/settings/reading.py` reads them from a command line, and `as_words` writes them back.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from decimal import Decimal
from functools import cache, partial
from typing import Any, ClassVar, Self

from utils.settings.parser import count, number, one_of, with_shown_default

OF_RUN = ("method", "dataset", "model", "ipc")  # they name the run, so they stand in every command line
NUMBERS = {int: ("N", count(1)), float: ("X", number(0))}  # what the help shows for the value, and the usual check
NUMBERS |= {kind | None: usual for kind, usual in NUMBERS.items()}


@dataclass(frozen=True)
class Need:
    """What must hold of the settings, so that a flag has an effect; given without it, the flag is refused."""

    holds: Callable[[Any], bool]
    why: str  # the message behind the flag's name, with values of settings in braces
    of_script: bool = False  # the script decides it, so where it does not hold, the help leaves the flag out


Needs = Need | Sequence[Need]


def only(name: str, *values: str) -> Need:
    """The need of a flag that has an effect only with these values of the flag `name`; without values: only with it."""
    if not values:
        return Need(lambda s: getattr(s, name), f"it has no effect without --{name}; give both or none")
    users = f"{', '.join(values)} {'does' if len(values) == 1 else 'do'}"
    return Need(lambda s: getattr(s, name) in values, f"--{name} {{{name}}} does not use it; {users}. Leave it out")


def flag(default: Any, help: str, check: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """A field that is also the flag `--<its name>`.

    A field of the type `tuple` takes several values.

    Args:
        default: False for a flag without a value.
        help: what it does, and when to change it.
        check: turns the word of the command line into the value, or raises `argparse.ArgumentTypeError`; left out: a
            whole number is at least 1, another number at least 0, and a text is taken as it is.
        more: `names`: the values that are accepted; `often`: shown by `--help`, and not only by
            `--help-all`; `needs`: one or several `Need`s; `may_change`: whether a resumed run may be given another
            value; `positional`: it has no name on the command line; `short`: a further name, as `-v`; and `nargs`,
            `const`, `action` and `metavar` of argparse.
    """
    return field(default=default, metadata={"help": help, "check": check, **more})


main_flag = partial(flag, often=True)


def with_default(group: type, name: str, default: Any, **more: Any) -> Any:
    """The field `name` of a group, with another default, and `more` in the place of what `flag` was given."""
    return field(default=default, metadata={**group.__dataclass_fields__[name].metadata, **more})


@dataclass(frozen=True)
class Settings:
    """The base class of groups and of the settings of scripts."""

    NEEDS: ClassVar[Mapping[type | str, Needs]] = {}  # in this script, by group or name of a flag

    @classmethod
    def needs(cls) -> dict[str, list[Need]]:
        """What each flag needs, by name: first what the script says of it, then its own."""
        needs: dict[str, list[Need]] = {}
        said = [base.NEEDS for base in cls.__mro__ if "NEEDS" in vars(base)]
        for group, own in groups_of(cls).items():
            for f in own:
                needs[f.name] = []
                of_script = [one.get(key, ()) for one in said for key in (group, f.name)]
                for stated in (*of_script, f.metadata.get("needs", ())):
                    needs[f.name] += [stated] if isinstance(stated, Need) else stated
        return needs

    @classmethod
    def help_of(cls, f: Field) -> str:
        """What the help says of a flag."""
        return with_shown_default(f.metadata["help"], f.default)

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


@cache
def groups_of(settings: type[Settings]) -> dict[type[Settings], list[Field]]:
    """The flags of a settings class, by the group that declares them, in the order of the bases."""
    groups: dict[type[Settings], list[Field]] = {}
    for base in settings.__bases__:
        groups |= groups_of(base) if issubclass(base, Settings) else {}
    known = {f.name for own in groups.values() for f in own}
    groups[settings] = [f for f in fields(settings) if f.name not in known]
    here = settings.__dataclass_fields__  # a class may change the default of a flag, or make it a plain field
    flags = {group: [here[f.name] for f in own if "help" in here[f.name].metadata] for group, own in groups.items()}
    return {group: own for group, own in flags.items() if own}


def flags_of(settings: type[Settings]) -> Iterator[Field]:
    """The fields of a settings class that are flags."""
    return (f for of_group in groups_of(settings).values() for f in of_group)


def takes_several(f: Field) -> bool:
    """Whether a flag takes several values."""
    return "tuple" in str(f.type)


def add_group(target: argparse._ActionsContainer, own: Iterable[Field]) -> None:
    """Add fields as flags to a parser or a group of one."""
    for f in own:
        add_flag(target, f)


def add_flag(target: argparse._ActionsContainer, f: Field, **more: Any) -> argparse.Action:
    """Add a field as a flag to a parser or a group of one; `more` takes the place of its arguments of argparse."""
    meta, names = f.metadata, f.metadata.get("names", ())
    words = [*([meta["short"]] if "short" in meta else []), f.name if "positional" in meta else f"--{f.name}"]
    how = {"default": f.default, "help": meta["help"]}
    if f.default is False:
        how["action"] = "store_true"
    else:
        unit, usual_check = NUMBERS.get(f.type, (None, None))
        how |= {"type": meta["check"] or usual_check, "metavar": unit}
        how |= {"type": one_of(f.name, names), "metavar": f"{{{','.join(names)}}}"} if names else {}
        how |= {"nargs": "+"} if takes_several(f) else {}
        how |= {key: meta[key] for key in ("nargs", "const", "action", "metavar") if key in meta}
    return target.add_argument(*words, **how | more)


def as_dict(settings: Settings) -> dict[str, Any]:
    """The flags of a script that have an effect, with their values, as `args.json` keeps them."""
    needs = settings.needs()
    names = [f.name for f in flags_of(type(settings))]
    return {name: getattr(settings, name) for name in names if all(need.holds(settings) for need in needs[name])}


def as_words(settings: Settings) -> list[str]:
    """The words of a command line that parse to these settings.

    They begin with what names the run. A flag that is at its default or has no effect here is left out.
    """
    usual, needs = settings.defaults(), settings.needs()
    found = []
    for f in sorted(flags_of(type(settings)), key=lambda f: f.name not in OF_RUN):
        value = getattr(settings, f.name)
        differs = value != usual[f.name] and all(need.holds(settings) for need in needs[f.name])
        if differs or f.name in OF_RUN:
            found += flag_words(f.name, value)
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
