"""Reading image files: listing folders safely, decoding to one size, and pixels in [0, 1]."""

import logging
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F

from utils.core.errors import UserError, one_line

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".gif", ".tif", ".tiff"}
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "GIF", "TIFF")  # for some others PIL would call external programs
MAX_PIXELS = 40_000_000  # larger images are refused: decoding takes up to 20 bytes per pixel
LARGE_PIXELS = 2_000_000  # larger images are decoded one at a time, to bound the memory
DECODERS = 8  # threads

logging.getLogger("PIL").addHandler(logging.NullHandler())  # keeps its messages off stderr: our error reports the image


def list_images(folder: Path, tree: Path | None = None, flag: str = "") -> list[Path]:
    """All image files below `folder`, at any depth, sorted by name.

    Args:
        folder: where to look. Links to folders below it are not followed.
        tree: links must stay inside it; default: `folder`.
        flag: the flag that the error message names.
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
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UserError(f"{flag}: cannot list {folder}: {one_line(error)}") from None


def check_link(path: Path, tree: Path, flag: str) -> None:
    """Raise a `UserError` if `path` is a broken link or resolves to a place outside `tree` (a resolved folder)."""
    if not os.path.exists(path):
        raise UserError(f"{flag}: {path} is a broken link; mend or remove it")
    if not path.resolve().is_relative_to(tree):
        raise UserError(f"{flag}: {path} is a link that leads out of {tree}; put the files themselves there")


def read_images(paths: Sequence[Path], channel: int, im_size: tuple[int, int], flag: str) -> torch.Tensor:
    """Decode image files in threads to uint8 `[N, channel, H, W]`: centre crop to the aspect ratio, bilinear resize.

    Raises:
        UserError: naming the first file that is damaged, of another format, or larger than `MAX_PIXELS`.
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
            raise UserError(f"{flag}: cannot read the image {path}: {one_line(error)}. Mend or remove it") from None
        images[index] = np.asarray(fitted, dtype=np.uint8).reshape(height, width, channel)

    with warnings.catch_warnings(), ThreadPoolExecutor(DECODERS) as pool:
        warnings.simplefilter("ignore")
        for _ in pool.map(decode, range(len(paths))):
            pass
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _fitted(image: "PIL.Image.Image", channel: int, size: tuple[int, int]) -> "PIL.Image.Image":  # noqa: F821
    from PIL import Image, ImageOps

    mode = "L" if channel == 1 else "RGB"
    image = _eight_bits(image)
    converted = image if image.mode == mode else image.convert(mode)  # convert always copies
    return ImageOps.fit(converted, size, Image.Resampling.BILINEAR)


def _eight_bits(image: "PIL.Image.Image") -> "PIL.Image.Image":  # noqa: F821
    """The image, one of 16 bits a pixel scaled to 8: PIL's `convert` would make all above 255 white.

    Raises:
        ValueError: for pixels of 32 bits, whose range is not known.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # older PIL: I
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}) have no range; store 8 or 16 bits")
    return image


def unit_images(images: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] as float32: uint8 is divided by 255, float is returned unchanged."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def conform(images: torch.Tensor, channel: int, im_size: tuple[int, int]) -> torch.Tensor:
    """Bring images `[N, C, H, W]` to float32 [0, 1] with `channel` channels and size `im_size`.

    Three channels become one with the ITU-R 601 luma weights; one becomes three by repetition; images are resized by
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
