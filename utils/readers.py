"""Reading what others wrote: arrays, tensors and image folders. Nothing is ever unpickled."""

import _codecs
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".gif", ".tif", ".tiff"}
MAX_PIXELS = 64_000_000  # one decoded image; larger ones are refused

# What a published `.pt` holds beside tensors: accuracies as numpy scalars. `_codecs.encode` turns their bytes back.
_NUMPY_SCALARS = [
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "bool")),
    _codecs.encode,
]


def check_file(path: Path, flag: str) -> Path:
    """Return `path` if it is a regular file; raise a `UserError` that names `flag` otherwise."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag}: {path} is {'not a file' if path.exists() else 'not there'}; give an existing file")
    return path


def read_pt(path: Path, what: str) -> object:
    """Load a `torch.save` file on the CPU without unpickling: tensors, plain values and numpy scalars only.

    Raises:
        UserError: when the file is missing, damaged, or holds anything else. It is not executed.
    """
    path = check_file(path, what)
    try:
        _check_stored_sizes(path)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail in any way inside the reader
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        if "Weights only load failed" in str(error):
            reason = "it holds objects other than tensors and plain values, or is damaged; it was not executed"
        raise UserError(f"{what}: cannot read {path}: {reason}. Write it again with the stage that makes it") from None


def _check_stored_sizes(path: Path) -> None:
    """Refuse archives whose members claim more bytes than the file has (torch never compresses)."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(member.file_size > path.stat().st_size for member in archive.infolist()):
            raise UserError(f"cannot read {path}: a member claims more bytes than the file has")


def read_npy(path: Path, flag: str) -> np.ndarray:
    """Memory-map a `.npy` array (copy-on-write). Raises `UserError` for anything but a plain array."""
    path = check_file(path, flag)
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:
        raise UserError(f"{flag}: cannot read {path} as a .npy array: {_first_line(error)}") from None


def read_npz(path: Path, keys: Sequence[str], flag: str) -> list[np.ndarray]:
    """Read the arrays `keys` of an `.npz` file. Raises `UserError` naming the missing key or the damage."""
    path = check_file(path, flag)
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            for key in keys:
                if f"{key}.npy" not in names:
                    has = ", ".join(sorted(n.removesuffix(".npy") for n in names)) or "nothing"
                    raise UserError(f"{flag}: {path} has no key {key!r}; it needs {', '.join(keys)} and has {has}")
                _check_claim(archive, f"{key}.npy")
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[key] for key in keys]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{flag}: cannot read {path} as an .npz file: {_first_line(error)}") from None


def _check_claim(archive: zipfile.ZipFile, name: str) -> None:
    """Compare the array's header with the member's size, so that a false header cannot make numpy allocate."""
    size = archive.getinfo(name).file_size
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects")
        claimed = int(np.prod([int(s) for s in shape], dtype=object)) * dtype.itemsize
        if claimed != size - member.tell():
            raise ValueError(f"{name} claims {claimed} bytes and has {size - member.tell()}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


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


def list_images(folder: Path) -> list[Path]:
    """All image files below `folder`, at any depth, sorted by name."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def read_images(paths: Sequence[Path], channel: int, im_size: tuple[int, int], flag: str) -> torch.Tensor:
    """Decode image files to uint8 `[N, channel, H, W]`: shorter side resized, centre cropped. Threads decode."""
    height, width = im_size

    def decode(path: Path) -> np.ndarray:
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are too many")
                image = image.convert("L" if channel == 1 else "RGB")
                fitted = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        except Exception as error:
            raise UserError(f"{flag}: cannot read the image {path}: {_first_line(error)}. Mend or remove it") from None
        return np.asarray(fitted, dtype=np.uint8).reshape(height, width, channel)

    with ThreadPoolExecutor() as pool:
        stacked = np.stack(list(pool.map(decode, paths)))
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


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
        images = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    elif images.shape[1] == 1 and channel == 3:
        images = images.expand(-1, 3, -1, -1)
    if tuple(images.shape[2:]) != tuple(im_size):
        images = F.interpolate(images, tuple(im_size), mode="bilinear", antialias=True, align_corners=False)
    return images.clamp(0, 1)
