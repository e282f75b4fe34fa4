"""The values of config files of tables, layer upon layer: a later one goes before an earlier one."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from scripts.kinds import kind_named
from utils.core.errors import UserError, one_line, unknown_name


def words_of(value: str | list[str]) -> list[str]:
    """A value as words; quotes keep a path with a space together."""
    return value if isinstance(value, list) else shlex.split(value)


def merged(files: Sequence[Path], given: dict) -> dict:
    """The values of all files and then those `given`; each has, after its own, those for the method that counts."""
    layers = [*map(read_config, files), given]
    method = next(layer["method"] for layer in reversed(layers) if layer.get("method"))
    settings = layers[0]
    for layer in layers:
        if unknown := [name for name in layer if name not in layers[0]]:
            raise UserError(
                f"{unknown_name('value', unknown[0], layers[0])}; scripts/tables/defaults.yaml explains them"
            )
        settings = merge(settings, layer)
        for names, own in layer.get("methods", {}).items():
            settings = merge(settings, own) if method in names.split() else settings
    for kind in words_of(settings["kinds"]):
        kind_named(kind)
    return settings


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


def read_config(path: Path) -> dict:
    """The values of a YAML file, as texts.

    Raises:
        UserError: when it is not there or holds something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"CONFIG: cannot read {path}: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"CONFIG: {path} holds no names and values; see scripts/tables/digits.yaml")
    return values
