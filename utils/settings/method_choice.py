"""The choice of the method of stage 1, also of one in a file of its own, and which flags a method uses."""

import runpy
from dataclasses import dataclass
from pathlib import Path

from utils.core.errors import UserError, blame, one_line, require
from utils.core.files import check_file
from utils.methods import METHODS
from utils.settings.distillation import Distilling
from utils.settings.fields import Settings, flag, flags_of, main_flag
from utils.settings.parser import one_of, value_in
from utils.settings.reading import SettingsParser


@dataclass(frozen=True)
class MethodChoice(Settings):
    """Method."""

    method: str = main_flag(
        "DC", "; ".join(f"{entry.name}: {entry.help}" for entry in METHODS.values()), one_of("method", METHODS)
    )
    method_file: str | None = flag(
        None,
        "a Python file that registers a further method (docs/extend.md); its code is run, so use only your own",
        may_change=True,
    )


def users_of_flags() -> dict[str, list[str]]:
    """By the name of a flag, the methods that use it; those of no method are left out."""
    users: dict[str, list[str]] = {}
    for entry in METHODS.values():
        for f in flags_of(entry.settings):
            if f.name not in entry.unused:
                users.setdefault(f.name, []).append(entry.name)
    return users


def load_method_file(parser: SettingsParser, words: list[str]) -> None:
    """Run the file of `--method_file`, which registers a method, and add that method's flags to the parser.

    Raises:
        UserError: when the file is missing, fails, or registers nothing.
    """
    name = value_in(words, "method_file")
    if name is None:
        return
    with blame("--method_file"):
        path = check_file(Path(name))
    before = dict(METHODS)
    try:
        runpy.run_path(str(path), run_name="method_file")
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"--method_file: {path} fails: {reason}. Repair it") from None
    new = [entry for name, entry in METHODS.items() if before.get(name) is not entry]
    require(new, f"--method_file: {path} registers no method; it must call utils.methods.register")
    for entry in new if issubclass(parser.settings, Distilling) else ():  # only stage 1 has flags of methods
        own = [cls for cls in entry.settings.__mro__ if cls not in parser.settings.__mro__]
        if any(isinstance(f.type, str) for f in flags_of(entry.settings)):
            raise UserError(f"--method_file: {path} hides the types of its flags; remove its import of annotations")
        declared = {name for cls in own for name in vars(cls).get("__annotations__", ())}
        if taken := declared & {f.name for f in flags_of(parser.settings)}:
            raise UserError(
                f"--method_file: {path} defines --{min(taken)}, which is another flag already; give it another name"
            )
        parser.extend(entry.settings)
