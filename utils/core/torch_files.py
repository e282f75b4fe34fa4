"""Reading `.pt` files without unpickling them, and fingerprints of tensors."""

import hashlib
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from utils.core.errors import UserError, blame, one_line, require
from utils.core.files import check_file

PLAIN_TENSORS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# published files hold accuracies as numpy scalars; numpy 2 has renamed the function that restores them
_restore = np.float64().__reduce__()[0]
_NUMPY_SCALARS = [
    (_restore, "numpy._core.multiarray.scalar"),
    (_restore, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "b1")),
]


def read_pt(path: Path, what: str = "", check_crc: bool = False, mmap: bool = False) -> object:
    """Load a `torch.save` file on the CPU, executing no code: dense tensors, plain values and numpy scalars only.

    A `UserError`, which `what` begins, tells of a file that is missing, damaged, or holds anything else.
    `check_crc` compares the checksums, which torch does not; `mmap` leaves values on the disk until they are used.
    """
    with blame(what):
        path = check_file(path)
        mmap = mmap and str(path).isprintable()  # torch maps by name, and knows UTF-8 alone
        try:
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if check_crc:
                    require(zipfile.ZipFile(file).testzip() is None, "its checksums are wrong")
                    file.seek(0)
                with torch.serialization.safe_globals(_NUMPY_SCALARS):
                    value = torch.load(str(path) if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
            _check_tensors(value)
            return value
        except Exception as error:  # a damaged file can raise any error in the reader
            foreign = "it holds objects other than tensors and plain values, or is damaged; it was not executed"
            reason = foreign if "Weights only load failed" in str(error) else one_line(error)
            raise UserError(f"cannot read {path}: {reason}. Write it again with the stage that makes it") from None


def _check_tensors(value: object) -> None:
    """Refuse tensors, at any nesting, that are not dense, not on the CPU, or larger than what is stored of them."""
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            is_plain = item.layout is torch.strided and item.device.type == "cpu"
            require(is_plain, f"it holds a {item.layout} tensor on {item.device}; only dense ones are read")
            claimed, stored = item.numel() * item.element_size(), item.untyped_storage().nbytes()
            require(claimed <= stored, f"a tensor claims the shape {one_line(list(item.shape))}; it is damaged")
        elif isinstance(item, (list, tuple, dict)) and id(item) not in seen:  # it may contain itself
            seen.add(id(item))
            todo += [*item, *item.values()] if isinstance(item, dict) else item


def fingerprint(tensors: Iterable[torch.Tensor | None]) -> str:
    """SHA-256 of the dtypes, shapes and values of tensors (None counts as a value), in hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous()
        # numpy has no bfloat16: its bits are hashed as int16
        digest.update((plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy())
    return digest.hexdigest()
