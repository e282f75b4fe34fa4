"""Versions of this program and of the libraries that its numbers depend on."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

VERSION = 1  # stored in the files that the stages write


def versions() -> dict[str, str | int | None]:
    """Version of this program, of Python, and of the libraries; `cuda` is None in builds without it."""
    libraries = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {"trustdd": VERSION, "python": platform.python_version(), **libraries, "cuda": torch.version.cuda}


def git_commit() -> str | None:
    """The git commit of this code, with `+changes` if tracked files differ from it; None if it is unknown."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # a copy within another repository
        return None
    return _git("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes")


def _git(*words: str) -> str | None:
    """What git says about the folder of this file; None if it fails or says nothing."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
