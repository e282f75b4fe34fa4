"""Settings that are declared once: a field of a dataclass is a flag, with its default, check, help and needs.

A group is a frozen dataclass whose fields are made by `flag`. `add_group` adds its flags to a parser.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from utils.settings.parser import Parser

FEW = 8  # names that the help shows in braces; more are in the text


@dataclass(frozen=True)
class Need:
    """What must hold of the other flags, so that a flag has an effect.

    Given without it, the flag is refused. `why`: the message behind the flag's name, with other flags' values in
    braces.
    """

    holds: Callable[[argparse.Namespace], bool]
    why: str


def flag(default: Any, help: str, check: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """A field that is also the flag `--<its name>`.

    Args:
        default: False for a flag without a value.
        help: what it does, and when to change it.
        check: turns the word of the command line into the value; raises `argparse.ArgumentTypeError`.
        more: `names`: the values that are accepted, if they are few; `many`: takes several values; `often`: shown by
            `--help`, and not only by `--help-all`; `need`: a `Need`; and `nargs`, `const`, `action` and `metavar`
            of argparse; `short`: a further name, as `-v`.
    """
    return field(default=default, metadata={"help": help, "check": check, **more})


def add_group(
    parser: Parser, group: type, need: Need | None = None, omit: Sequence[str] = (), **defaults: Any
) -> argparse._ArgumentGroup:
    """Add every field of a group to a parser as a flag, under the first sentence of the group's docstring.

    Args:
        need: what all its flags need that have no need of their own.
        omit: fields that the script does not have; defaults: those that differ in this script, by name.
    """
    target = parser.add_argument_group(group.__doc__.split(".")[0].lower())
    for f in fields(group):
        if f.name not in omit:
            _add(parser, target, f, defaults.get(f.name, f.default))
            if wanted := f.metadata.get("need") or need:
                parser.needs[f.name] = (wanted.holds, wanted.why)
    return target


def _unit(kind: object) -> str:
    """How the help shows the value of a field of this type: N for whole numbers, X for others; empty for words."""
    kinds = (kind, *getattr(kind, "__args__", ()))
    return "N" if int in kinds else "X" if float in kinds else ""


def _add(parser: Parser, target: argparse._ArgumentGroup, f: Any, default: Any) -> None:
    """Add one field to a group of argparse."""
    meta = dict(f.metadata)
    words = [*([meta["short"]] if "short" in meta else []), f"--{f.name}"]
    if meta.get("often"):
        parser.often.add(f.name)
    if default is False and "action" not in meta:
        target.add_argument(*words, action="store_true", help=meta["help"])
        return
    kind = {key: meta[key] for key in ("nargs", "const", "action") if key in meta}
    if meta.get("many"):
        kind["nargs"] = "+"
    names = meta.get("names", ())
    shown = f"{{{','.join(names)}}}" if 0 < len(names) <= FEW else None
    kind["metavar"] = meta.get("metavar") or shown or _unit(f.type) or None
    default = list(default) if isinstance(default, tuple) else default
    target.add_argument(*words, type=meta["check"], default=default, help=meta["help"], **kind)
