"""Reading `.pt` files without unpickling them, and fingerprints of tensors."""

import hashlib
import io
import os
import pickletools
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from utils.core.arrays import MAX_PACKED
from utils.core.errors import UserError, blame, one_line, require
from utils.core.files import check_file

MAX_PICKLE = 4 << 20  # bytes of the pickle in a `.pt`: it describes the tensors, without their values
PLAIN_TENSORS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class _NumberType:
    """Replaces `numpy.dtype` in published `.pt` files, which hold accuracies as numpy scalars."""

    def __init__(self, code: str, *_: bool):
        require(code in ("f2", "f4", "f8", "i4", "i8", "b1"), f"numpy type {code!r:.40} is not read")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        require(state[1] in ("<", "|"), "numbers of another byte order are not read")


def _number(kind: _NumberType, data: bytes) -> float | int | bool:
    """Replaces `numpy…multiarray.scalar`; returns a plain number."""
    return np.frombuffer(data, "<" + kind.code, count=1)[0].item()


_NUMPY_SCALARS = [
    (_number, "numpy._core.multiarray.scalar"),
    (_number, "numpy.core.multiarray.scalar"),
    (_NumberType, "numpy.dtype"),
]
_KINDS = ("Half", "BFloat16", "Float", "Double", "ComplexFloat", "ComplexDouble")
_KINDS += ("Byte", "Char", "Short", "Int", "Long", "Bool")
_FOREIGN = "it holds objects other than tensors and plain values, or is damaged; it was not executed"
_STORED_GLOBALS = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    "collections OrderedDict",
    "_codecs encode",  # restores the bytes of numpy scalars
    *(" ".join(name.rsplit(".", 1)) for _, name in _NUMPY_SCALARS),
    *(f"torch {kind}Storage" for kind in _KINDS),
}


def read_pt(path: Path, what: str = "", check_crc: bool = False, mmap: bool = False) -> object:
    """Load a `torch.save` file on the CPU, executing no code: dense tensors, plain values and numpy scalars only.

    Numpy scalars become plain numbers. The calls and allocations in the file are checked before it is loaded.
    A `UserError`, which `what` begins, tells of a file that is missing, damaged, or holds anything else.
    `check_crc` compares the checksums, too, which torch does not.
    `mmap` leaves tensor values on the disk until they are used.
    """
    with blame(what):
        path = check_file(path)
        mmap = mmap and str(path).isprintable()  # torch maps by name, and knows UTF-8 alone
        try:
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _check_archive(file, check_crc) if file.read(2) == b"PK" else _check_old_format(file)
                file.seek(0)
                with torch.serialization.safe_globals(_NUMPY_SCALARS):
                    value = torch.load(str(path) if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
            _check_tensors(value, path.stat().st_size)
            return value
        except Exception as error:  # a damaged file can raise any error in the reader
            reason = _FOREIGN if "Weights only load failed" in str(error) else one_line(error)
            raise UserError(f"cannot read {path}: {reason}. Write it again with the stage that makes it") from None


def _check_archive(file: BinaryIO, check_crc: bool) -> None:
    """Refuse archives that torch did not write: compressed or overlapping members, or bytes after the member list."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 22, 0))
    # else torch and zipfile could find different lists of members
    require(file.read(4) == b"PK\5\6", "it is truncated or damaged")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        plain = {m.filename for m in members if not m.compress_type}
        require(len(plain) == len(members), "its members are compressed or duplicated, which torch never writes")
        require(sum(m.file_size for m in members) <= size, "a member claims more bytes than the file has")
        pickles = [m for m in members if m.filename.endswith("/data.pkl")]
        fits = len(pickles) == 1 and pickles[0].file_size <= MAX_PICKLE
        require(fits, "it holds no list of tensors, or an oversized one")
        _check_pickle(io.BytesIO(archive.read(pickles[0])))
        require(not check_crc or archive.testzip() is None, "its checksums are wrong")


def _check_old_format(file: BinaryIO) -> None:
    """Check a file written before PyTorch 1.6: five pickles, then the values of the tensors."""
    file.seek(0)
    start = io.BytesIO(file.read(MAX_PICKLE))
    for _ in range(5):
        _check_pickle(start)


def _check_pickle(stream: BinaryIO) -> None:
    """Scan a pickle's opcodes without executing them; refuse unknown names, and content that would expand in memory."""
    count: Counter[str] = Counter()
    longest, before = 0, ""
    for op, arg, _ in pickletools.genops(stream):
        is_known = op.name not in ("GLOBAL", "STACK_GLOBAL", "INST") or arg in _STORED_GLOBALS
        is_copy = op.name == "REDUCE" and before == "TUPLE1"  # such a call could copy a large list
        require(is_known and not is_copy, _FOREIGN)
        longest = max(longest, len(arg) if isinstance(arg, (str, bytes)) else 0)
        count[op.name] += 1
        before = before if "PUT" in op.name else op.name
    fits = count["REDUCE"] * longest <= MAX_PACKED and count["BUILD"] <= 256
    require(fits, "it is far larger in memory than on disk")


def _check_tensors(value: object, size: int) -> None:
    """Refuse tensors, at any nesting, that are not dense, not on the CPU, or larger than their storage or the file."""
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            is_plain = item.layout is torch.strided and item.device.type == "cpu"
            require(is_plain, f"it holds a {item.layout} tensor on {item.device}; only dense ones are read")
            stored = item.untyped_storage().nbytes()
            fits = item.numel() * item.element_size() <= stored <= size
            require(fits, f"a tensor claims the shape {one_line(list(item.shape))} and has {stored} bytes")
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
