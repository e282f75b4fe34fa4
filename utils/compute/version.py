"""Versions of this program and of the libraries that its numbers depend on."""

import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

from utils.core.errors import UserError

VERSION = 1  # stored in the files that the stages write
LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow")  # those that read or compute something
OLDEST_PYTORCH_OOD = "0.4"  # older ones compute other numbers under the same names


def versions() -> dict[str, str | int | None]:
    """Version of this program, of Python, and of the libraries; `cuda` is None in builds without it.

    pytorch-ood, which is optional, is among them if this process has loaded it: for a detector, or to fetch a set.
    """
    names = (*LIBRARIES, *(["pytorch-ood"] if sys.modules.get("pytorch_ood") else []))
    libraries = {name: installed(name) for name in names}
    return {"trustdd": VERSION, "python": platform.python_version(), **libraries, "cuda": torch.version.cuda}


def versions_line(found: dict[str, str | int | None]) -> str:
    """What `versions` returns as one line."""
    return ", ".join(f"{name} {version}" for name, version in found.items())


def installed(name: str) -> str | None:
    """The version of an installed package; None if it is not installed, or not under this name."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def require_pytorch_ood(what: str) -> None:
    """Raise a `UserError` that begins with `what`, if pytorch-ood is not installed or too old."""
    found = installed("pytorch-ood")
    if found and TorchVersion(found) < f"{OLDEST_PYTORCH_OOD}.dev0":
        needed = f"{OLDEST_PYTORCH_OOD} or newer is needed: pip install --upgrade pytorch-ood"
        raise UserError(f"{what}: pytorch-ood {found} is installed; {needed}")
    try:
        import pytorch_ood  # noqa: F401
    except ImportError:
        raise UserError(f"{what}: needs the package pytorch-ood: pip install pytorch-ood") from None


@cache
def git_commit() -> str | None:
    """The git commit of this code, with `+changes` if tracked files differ from it; None if it is unknown."""
    here, answer = Path(__file__), ""
    is_tracked = ["ls-files", "--error-unmatch", here.name]  # it fails for a copy within another repository
    describe = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    for words in (is_tracked, describe):
        command = ["git", "-C", str(here.parent), *words]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
    return answer or None
