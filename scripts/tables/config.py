"""The values of config files of tables, layer upon layer: a later one goes before an earlier one."""

import shlex
from collections.abc import Sequence

from scripts.kinds import kind_named
from utils.core.errors import UserError, one_line, unknown_name


def words_of(value: str | list[str]) -> list[str]:
    """A value as words; quotes keep a path with a space together."""
    return value if isinstance(value, list) else shlex.split(value)


def merged(layers: Sequence[dict]) -> dict:
    """The values of all layers; each has, after its own, those for the method that counts. The first knows all names.

    Raises:
        UserError: for an unknown name, also in a recipe or in the values for a method, or an unknown kind.
    """
    method = next(layer["method"] for layer in reversed(layers) if layer.get("method"))
    settings = layers[0]
    for layer in layers:
        _check_names(layer, layers[0])
        settings = merge(settings, layer)
        for names, own in (layer.get("methods") or {}).items():
            settings = merge(settings, own or {}) if method in names.split() else settings
    for kind in words_of(settings["kinds"]):
        kind_named(kind)
    return settings


def _check_names(layer: dict, known: dict, place: str = "") -> None:
    """Raise a `UserError` for a name that is not `known`, also in the parts that have values of their own."""
    if unknown := [name for name in layer if name not in known]:
        what = unknown_name(f"value{place}", unknown[0], known)
        raise UserError(f"{what}; scripts/tables/defaults.yaml explains them")
    for part in ("methods", "recipes"):
        for name, own in _section(layer.get(part), part).items():
            _check_names(_section(own, f"{part}.{name}"), known, f" in {part}.{name}")


def _section(value: object, name: str) -> dict:
    """A section of names and values, which may be left empty; a `UserError` tells that it is something else."""
    if value and not isinstance(value, dict):
        raise UserError(f"{name}: {one_line(value)} is no section; give names and values")
    return value or {}


def merge(old: dict, new: dict, place: str = "") -> dict:
    """`old` with the values of `new`, section by section.

    Raises:
        UserError: for a value in the place of a section, or a section in the place of a value.
    """
    found = dict(old)
    for name, value in new.items():
        before = old.get(name, {} if isinstance(value, dict) else "")
        if isinstance(before, dict):
            value = value or {}  # an empty section
        if isinstance(before, dict) != isinstance(value, dict):
            raise UserError(
                f"{place}{name}: {one_line(value)} is no {'section' if isinstance(before, dict) else 'value'}"
            )
        found[name] = merge(before, value, f"{place}{name}.") if isinstance(value, dict) else value
    return found
