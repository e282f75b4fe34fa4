"""Reading what others wrote: arrays, tensors and image folders. Nothing is ever unpickled."""

import io
import json
import logging
import os
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F

from utils.core.errors import UserError
from utils.files.atomic import read_bytes

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".gif", ".tif", ".tiff"}
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "GIF", "TIFF")  # PIL would hand others to outside programs
MAX_PIXELS = 40_000_000  # one decoded image, up to 20 bytes each on the way; larger ones are refused
LARGE_PIXELS = 2_000_000  # larger ones are decoded one at a time, to bound the memory
DECODERS = 8  # threads
MAX_PACKED = 256 << 20  # bytes of compressed arrays that are unpacked whatever their ratio
MAX_RATIO = 100  # above that: packed images seldom reach 10
MAX_PICKLE = 4 << 20  # bytes that describe the tensors of a `.pt`, without their values
PLAIN_TENSORS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it says of damaged images is in the error


class _NumberType:
    """Stands for `numpy.dtype` where a published `.pt` holds accuracies as numpy scalars."""

    def __init__(self, code: str, *_: bool):
        if code not in ("f2", "f4", "f8", "i4", "i8", "b1"):
            raise ValueError(f"numpy type {code!r:.40} is not read")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError("numbers of another byte order are not read")


def _number(kind: _NumberType, data: bytes) -> float | int | bool:
    """Stands for `numpy…multiarray.scalar`."""
    return np.frombuffer(data, "<" + kind.code, count=1)[0].item()


_NUMPY_SCALARS = [
    (_number, "numpy._core.multiarray.scalar"),
    (_number, "numpy.core.multiarray.scalar"),
    (_NumberType, "numpy.dtype"),
]
_KINDS = ("Half", "BFloat16", "Float", "Double", "Byte", "Char", "Short", "Int", "Long", "Bool")
_STORED_GLOBALS = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    "collections OrderedDict",
    "_codecs encode",  # numpy scalars: turns their bytes back
    *(name.replace(".scalar", " scalar").replace("numpy.dtype", "numpy dtype") for _, name in _NUMPY_SCALARS),
    *(f"torch {kind}Storage" for kind in _KINDS),
    *(f"torch Complex{kind}Storage" for kind in ("Float", "Double")),
}


def check_file(path: Path, flag: str) -> Path:
    """Return `path` if it is a regular file; raise a `UserError` that names `flag` otherwise."""
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, false also for names that are too long
        there = "not a file" if os.path.lexists(path) else "not there"
        raise UserError(f"{flag}: {path} is {there}; give an existing file")
    return path


def read_json(path: Path, what: str, most: int = 1 << 20) -> dict:
    """The JSON object in a file of at most `most` bytes.

    Raises:
        UserError: when the file is missing, damaged, too large, or holds anything else.
    """
    path = check_file(path, what)
    try:
        value = json.loads(read_bytes(path, most))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what}: {path} is damaged: {_first_line(error)}") from None
    return value


def read_pt(path: Path, what: str, check_crc: bool = False) -> object:
    """Load a `torch.save` file on the CPU without unpickling: dense tensors, plain values and numpy scalars only.

    Numpy scalars become plain numbers. What the file would call and allocate is checked before it is loaded; with
    `check_crc` so are the checksums of all that it holds, which torch does not compare.

    Raises:
        UserError: when the file is missing, damaged, or holds anything else. It is not executed.
    """
    path = check_file(path, what)
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_archive(file, check_crc) if file.read(2) == b"PK" else _check_old_format(file)
            file.seek(0)
            with torch.serialization.safe_globals(_NUMPY_SCALARS):
                value = torch.load(file, map_location="cpu", weights_only=True)
            _check_tensors(value, path.stat().st_size)
            return value
    except Exception as error:  # a damaged file can fail in any way inside the reader
        reason = _first_line(error)
        if "Weights only load failed" in str(error):
            reason = _FOREIGN
        raise UserError(f"{what}: cannot read {path}: {reason}. Write it again with the stage that makes it") from None


_FOREIGN = "it holds objects other than tensors and plain values, or is damaged; it was not executed"


def _check_archive(file: BinaryIO, check_crc: bool) -> None:
    """Refuse archives that torch did not write: compressed or overlapping members, or a list not at the very end."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 22, 0))
    if file.read(4) != b"PK\5\6":  # elsewhere torch and zipfile could find different lists of members
        raise ValueError("it is truncated or damaged")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len({m.filename for m in members}) != len(members) or any(m.compress_type for m in members):
            raise ValueError("torch did not write it like this: members are compressed or there twice")
        if sum(m.file_size for m in members) > size:
            raise ValueError("a member claims more bytes than the file has")
        pickles = [m for m in members if m.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
            raise ValueError("it holds no list of tensors, or an oversized one")
        _check_pickle(io.BytesIO(archive.read(pickles[0])))
        if check_crc and archive.testzip() is not None:
            raise ValueError("its checksums are wrong")


def _check_old_format(file: BinaryIO) -> None:
    """Check a file of PyTorch before 1.6: five pickles, then the values of the tensors."""
    file.seek(0)
    start = io.BytesIO(file.read(MAX_PICKLE))
    for _ in range(5):
        _check_pickle(start)


def _check_pickle(stream: BinaryIO) -> None:
    """Read a pickle's instructions without following them; refuse foreign names, and what could swell in memory."""
    calls, longest, builds, before = 0, 0, 0, ""
    for op, arg, _ in pickletools.genops(stream):
        if op.name in ("GLOBAL", "STACK_GLOBAL", "INST") and arg not in _STORED_GLOBALS:
            raise ValueError(_FOREIGN)
        if isinstance(arg, (str, bytes)):
            longest = max(longest, len(arg))
        calls += op.name == "REDUCE"
        builds += op.name == "BUILD"
        if op.name == "REDUCE" and before == "TUPLE1":  # copies of one large list, each a few bytes long here
            raise ValueError(_FOREIGN)
        if "PUT" not in op.name:
            before = op.name
    if calls * longest > MAX_PACKED or builds > 256:
        raise ValueError("it is far larger in memory than on disk")


def _check_tensors(value: object, size: int) -> None:
    """Refuse tensors other than dense ones in memory of their own, whatever lists and dicts they are in."""
    for tensor in _tensors(value):
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"it holds a {tensor.layout} tensor on {tensor.device}; only dense ones are read")
        stored = tensor.untyped_storage().nbytes()
        if stored > size or tensor.numel() * tensor.element_size() > stored:
            raise ValueError(f"a tensor claims the shape {_short(list(tensor.shape))} and has {stored} bytes")


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists and dicts, also in ones that hold themselves."""
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            todo += item


def read_npy(path: Path, flag: str) -> np.ndarray:
    """Memory-map a `.npy` array (copy-on-write). Raises `UserError` for anything but a plain array."""
    path = check_file(path, flag)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.lib.format.open_memmap(path, mode="c")
    except Exception as error:
        raise UserError(f"{flag}: cannot read {path} as a .npy array: {_first_line(error)}") from None


def read_npz(path: Path, keys: Sequence[str], flag: str) -> list[np.ndarray]:
    """Read the arrays `keys` of an `.npz` file. Raises `UserError` naming the missing key or the damage."""
    path = check_file(path, flag)
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = archive.namelist()
            for key in keys:
                if f"{key}.npy" not in names:
                    has = ", ".join(sorted(n.removesuffix(".npy") for n in names)[:10]) or "nothing"
                    raise UserError(
                        f"{flag}: {path} has no key {key!r}; it needs {', '.join(keys)} and has {_short(has)}"
                    )
            members = [archive.getinfo(f"{key}.npy") for key in keys]
            _check_sizes(members, path.stat().st_size)
            return [_read_member(archive, member) for member in members]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{flag}: cannot read {path} as an .npz file: {_first_line(error)}") from None


def _check_sizes(members: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Refuse members that claim more than the file can hold, or than there is memory."""
    unpacked, packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
    if packed > size or any(m.compress_type == zipfile.ZIP_STORED and m.file_size > size for m in members):
        raise ValueError("an array claims more bytes than the file has")
    if unpacked > MAX_PACKED and unpacked > MAX_RATIO * packed:
        raise ValueError(f"its arrays claim {unpacked} bytes, packed into {packed}: no images are like that")
    if unpacked > free_memory():
        raise ValueError(f"its arrays need {unpacked >> 20} MB of memory and {free_memory() >> 20} MB are free")


def free_memory() -> int:
    """Bytes of memory that a process can still take without swapping; where that is not known, a large number."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 1 << 62


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array, after its header is compared with its size: a false header cannot make numpy allocate."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds Python objects")
        claimed = int(np.prod([int(s) for s in shape], dtype=object)) * dtype.itemsize
        if min(shape, default=0) < 0 or claimed != info.file_size - member.tell():
            raise ValueError(f"{info.filename} claims {claimed} bytes and has {info.file_size - member.tell()}")
    with archive.open(info) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # also makes zipfile compare the checksum of what was read
            raise ValueError(f"{info.filename} has more bytes than its header says")
        return array


def _short(value: object, most: int = 160) -> str:
    """One printable line of at most `most` characters."""
    line = " ".join(str(value).split())
    return "".join(c if c.isprintable() else "?" for c in line[:most])


def _first_line(error: Exception) -> str:
    return _short((str(error).strip() or type(error).__name__).splitlines()[0])


def images_to_nchw(array: np.ndarray, path: Path, flag: str) -> torch.Tensor:
    """uint8 `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]` as a uint8 tensor `[N, C, H, W]` (a view where possible)."""
    shape_ok = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))
    if array.dtype != np.uint8 or not shape_ok or 0 in array.shape:
        raise UserError(
            f"{flag}: {path} holds {array.dtype} {list(array.shape)}; it must be uint8 [N, H, W], [N, H, W, "
            "1] or [N, H, W, 3]"
        )
    images = torch.from_numpy(array)
    return images.unsqueeze(1) if array.ndim == 3 else images.permute(0, 3, 1, 2)


def list_images(folder: Path, tree: Path | None = None, flag: str = "") -> list[Path]:
    """All image files below `folder`, at any depth, sorted by name.

    Args:
        folder: where to look. Links to folders below it are not followed.
        tree: links must stay inside it; left out: `folder`.
        flag: what the message names.
    Raises:
        UserError: for a link that is broken or leads out of `tree`, and for a folder that cannot be read.
    """
    tree = (tree or folder).resolve()
    try:
        check_link(folder, tree, flag)
        named = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        for path in named:
            if path.is_symlink():
                check_link(path, tree, flag)
        return [p for p in named if p.is_file()]
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise UserError(f"{flag}: cannot list {folder}: {_first_line(error)}") from None


def check_link(path: Path, tree: Path, flag: str) -> None:
    """Raise a `UserError` if `path` is broken or, its links followed, lies outside the resolved folder `tree`."""
    if not os.path.exists(path):
        raise UserError(f"{flag}: {path} is a broken link; mend or remove it")
    if not path.resolve().is_relative_to(tree):
        raise UserError(f"{flag}: {path} is a link that leads out of {tree}; put the files themselves there")


def read_images(paths: Sequence[Path], channel: int, im_size: tuple[int, int], flag: str) -> torch.Tensor:
    """Decode image files to uint8 `[N, channel, H, W]`: shorter side resized, centre cropped. Threads decode.

    Raises:
        UserError: naming the first file that is damaged, of another kind, or of too many pixels.
    """
    height, width = im_size
    one_large = Lock()
    images = np.empty((len(paths), height, width, channel), np.uint8)

    def decode(index: int) -> None:
        """Read one file into its place in `images`."""
        from PIL import Image

        path = paths[index]
        try:
            with path.open("rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
                pixels = image.width * image.height
                if pixels > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are too many")
                if pixels > LARGE_PIXELS:
                    with one_large:
                        fitted = _fitted(image, channel, (width, height))
                else:
                    fitted = _fitted(image, channel, (width, height))
        except Exception as error:
            raise UserError(f"{flag}: cannot read the image {path}: {_first_line(error)}. Mend or remove it") from None
        images[index] = np.asarray(fitted, dtype=np.uint8).reshape(height, width, channel)

    with warnings.catch_warnings(), ThreadPoolExecutor(DECODERS) as pool:
        warnings.simplefilter("ignore")
        for _ in pool.map(decode, range(len(paths))):
            pass
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _fitted(image: "PIL.Image.Image", channel: int, size: tuple[int, int]) -> "PIL.Image.Image":  # noqa: F821
    from PIL import Image, ImageOps

    mode = "L" if channel == 1 else "RGB"
    converted = image if image.mode == mode else image.convert(mode)  # convert always copies
    return ImageOps.fit(converted, size, Image.Resampling.BILINEAR)


def unit_images(images: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] as float32: uint8 is divided by 255, float is taken as it is."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def conform(images: torch.Tensor, channel: int, im_size: tuple[int, int]) -> torch.Tensor:
    """Bring images `[N, C, H, W]` to float32 [0, 1] with `channel` channels and size `im_size`.

    Three channels become one by the luma weights of ITU-R 601; one becomes three by repetition; sizes change by
    antialiased bilinear interpolation.
    """
    images = unit_images(images)
    if images.shape[1] == 3 and channel == 1:
        images = 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]
    elif images.shape[1] == 1 and channel == 3:
        images = images.expand(-1, 3, -1, -1)
    if tuple(images.shape[2:]) != tuple(im_size):
        images = F.interpolate(images, tuple(im_size), mode="bilinear", antialias=True, align_corners=False)
    return images.clamp(0, 1)
