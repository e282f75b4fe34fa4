"""Reading NumPy arrays, `.npy` and `.npz`, without unpickling and without trusting their headers."""

import math
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from utils.core.errors import UserError, one_line, require
from utils.core.files import check_file

MAX_PACKED = 256 << 20  # bytes; up to this unpacked size any compression ratio is accepted
MAX_RATIO = 100  # the highest ratio above that size; images seldom compress by 10
LEAST_SIDE = 5  # pixels; a narrower side may be an axis of channels


def read_npy(path: Path) -> np.ndarray:
    """Memory-map a `.npy` array (copy-on-write). Raises `UserError` for anything but a plain array."""
    path = check_file(path)
    with _as_user_error(path, "a .npy array"):
        return np.lib.format.open_memmap(path, mode="c")


def read_npz(path: Path, keys: Sequence[str]) -> list[np.ndarray]:
    """Read the arrays `keys` of an `.npz` file. Raises `UserError` naming the missing key or the damage."""
    path = check_file(path)
    with _as_user_error(path, "an .npz file"), zipfile.ZipFile(path) as archive:
        names = sorted(archive.namelist())
        has = ", ".join(name.removesuffix(".npy") for name in names[:10]) or "nothing"
        for key in keys:
            told = f"it has no key {key!r}; it needs {', '.join(keys)} and has {has}"
            require(f"{key}.npy" in names, told)
        members = [archive.getinfo(f"{key}.npy") for key in keys]
        _check_sizes(members, path.stat().st_size)
        return [_read_member(archive, member) for member in members]


@contextmanager
def _as_user_error(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a damaged file raises into a `UserError`, and say nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise UserError(f"cannot read {path} as {what}: {one_line(error, 300)}") from None


def _check_sizes(members: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Refuse members that claim more bytes than the file can hold, or than fit into free memory."""
    unpacked, packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
    stored = sum(m.file_size for m in members if m.compress_type == zipfile.ZIP_STORED)
    require(max(packed, stored) <= size, "an array claims more bytes than the file has")
    told = f"its arrays claim {unpacked} bytes, packed into {packed}: images do not compress that well"
    require(unpacked <= max(MAX_PACKED, MAX_RATIO * packed), told)
    told = f"its arrays need {unpacked >> 20} MB of memory and {free_memory() >> 20} MB are free"
    require(unpacked <= free_memory(), told)


def free_memory() -> int:
    """Bytes of memory that are free without swapping; `1 << 62` where this is unknown."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 1 << 62


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Read one array; its header is first checked against its size, so a false header cannot make numpy allocate."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        claimed, has = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
        is_plain = not dtype.hasobject and min(shape, default=0) >= 0
        require(is_plain and claimed == has, f"{info.filename} claims {claimed} bytes of {dtype} and has {has}")
        member.seek(0)
        array = np.lib.format.read_array(member, allow_pickle=False)
        require(not member.read(1), "it is damaged")  # this makes zipfile compare the checksum of what was read
        return array


def images_to_nchw(array: np.ndarray, path: Path) -> torch.Tensor:
    """uint8 `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]` as a view `[N, C, H, W]`.

    A `UserError` tells of other arrays.
    It also tells of shapes that can be read in several ways, as `[32, 32, 3]`: one colour picture, or 32 grey ones.
    """
    accepted = "it must be uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3]"
    found = f"{path} holds {array.dtype} {list(array.shape)}"
    shape_ok = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))
    require(array.dtype == np.uint8 and shape_ok and 0 not in array.shape, f"{found}; {accepted}")
    one = "one picture, or several" if array.ndim == 3 else "[N, H, W, C] or [N, C, H, W]"
    require(
        min(array.shape[1:3]) >= LEAST_SIDE and not (array.ndim == 3 and array.shape[0] in (3, 4)),
        f"{found}, which may be {one}; {accepted}, with sides of {LEAST_SIDE} pixels or more; 3 or 4 grey images as "
        "[N, H, W, 1]",
    )
    images = torch.from_numpy(array)
    return images.unsqueeze(1) if array.ndim == 3 else images.permute(0, 3, 1, 2)
