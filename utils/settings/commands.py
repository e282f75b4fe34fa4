"""The command of the next stage: its settings, carried over from those of this one, and how it is written."""

import shlex
import sys
from pathlib import Path
from typing import Any

from utils.settings import common
from utils.settings.fields import OF_RUN, Settings, as_words, flags_of


def carried(source: Settings, target: type[Settings], *groups: type[Settings], **more: Any) -> Settings:
    """Settings of the next stage: what names the run, and what of the data, the network and `groups` was changed."""
    usual = source.defaults()
    known = {f.name for f in flags_of(target)} - {"download"}
    names = {f.name for group in (common.Data, common.Network, *groups) for f in flags_of(group)} & known | {"compile"}
    kept = {name: getattr(source, name) for name in names if getattr(source, name) != usual[name]}
    named = {name: getattr(source, name) for name in (*OF_RUN, "method_file")}
    return target(**named | kept | more)


def command_of(script: str, settings: Settings) -> str:
    """The shell command of a script, with the interpreter and the folder of this script as they were called."""
    return shlex.join([sys.orig_argv[0], str(Path(sys.argv[0]).with_name(script)), *as_words(settings)])
