"""Write docs/flags.md: every flag of the scripts, as `--help-all` shows it, each group once."""

import argparse
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.core.files import save_text
from utils.core.run_script import run_script
from utils.settings.fields import Settings, flags_of, groups_of
from utils.settings.parser import Parser
from utils.settings.reading import SettingsParser

SCRIPTS = {
    "main_poe": "stage 1", "main_oe": "stage 1", "main": "stage 1", "train_experts": "experts",
    "train_model_synthetic_oe": "stage 2", "train_model_synthetic_no_oe": "stage 2", "test_ood_model_syn": "stage 3",
}  # fmt: skip
HEAD = """# All flags

Made by `python scripts/dev/make_flags.py` of what the scripts say with `--help-all`. A group that several scripts
have stands here once; behind it stand scripts that have another default, or lack it. A flag that names methods
(`DM, TGDD: …`) belongs to them alone. `main.py` and `train_model_synthetic_no_oe.py` refuse flags of outliers,
`main_poe.py` those of the pool, and `main_oe.py` those of corruptions.
"""


def page() -> str:
    """The text of docs/flags.md."""
    parts, shown = [HEAD], set()
    parsers = {script: importlib.import_module(script).get_args_parser() for script in SCRIPTS}
    for parser in parsers.values():
        actions = {action.dest: action for action in parser._actions}
        for group, fields in groups_of(parser.settings).items():
            names = [f.name for f in fields if (group, f.name) not in shown and f.name not in parser.hidden]
            shown |= {(group, name) for name in names}
            new = [(actions[name], elsewhere(group, name, parsers, parser)) for name in names]
            if new:
                users = [stage for script, stage in SCRIPTS.items() if issubclass(parsers[script].settings, group)]
                title = f"{group.__doc__.split('.')[0]} ({', '.join(dict.fromkeys(users))})"
                parts.append(
                    f"## {title}\n\n| flag | what it does |\n|---|---|\n" + "\n".join(row(*one) for one in new)
                )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def elsewhere(group: type[Settings], name: str, parsers: Mapping[str, SettingsParser], shown: SettingsParser) -> str:
    """In which scripts of a group a flag has another default than in that which is `shown`, and which lack it."""
    said = []
    for script, parser in parsers.items():
        if issubclass(parser.settings, group) and name not in parser.hidden:
            default, usual = (p.settings.__dataclass_fields__[name].default for p in (parser, shown))
            if name not in {f.name for f in flags_of(parser.settings)}:
                said.append(f"not {script}.py")
            elif default != usual:
                said.append(f"{script}.py: {'none' if default is None else default}")
    return f" ({'; '.join(said)})" if said else ""


def row(action: argparse.Action, more: str) -> str:
    """The line of a flag; `more`: what stands behind its help."""
    values = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    name = action.option_strings[-1] if action.option_strings else action.dest
    return f"| `{name}{values}` | {action.help}{more} |"


def main() -> None:
    """Write the file."""
    Parser(description=__doc__).parse_args()
    save_text(ROOT / "docs" / "flags.md", page())


if __name__ == "__main__":
    run_script(main, "make_flags.py")
