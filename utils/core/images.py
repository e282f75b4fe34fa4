"""Reading image files and arrays of images by one set of rules, so that networks see what the user sees.

A file is turned as its EXIF orientation says, what is transparent in it lies on white, and its centre is cut out. What
the user should know of a source, such as files that are not read, is noted for the log.
"""

import logging
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.core.errors import UserError, blame, named, one_line, require
from utils.core.files import read_npy, read_npz
from utils.core.pixels import DARK, centre_box, images_to_nchw, in_full_range, scale_table, white_value

# for some others PIL would call external programs, and some have no mark by which a file can be known
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "QOI")
MAX_PIXELS = 40_000_000  # larger images are refused: decoding takes up to 20 bytes per pixel
DECODERS = 8  # threads
ORIENTATION = 0x0112  # the EXIF tag
NOT_CONTENT = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # what systems leave in folders, beside names with a dot

logging.getLogger("PIL").addHandler(logging.NullHandler())  # keeps its messages off stderr: our error reports the image


def is_content(name: str) -> bool:
    """Whether a name may be of a user's file or folder, and not of one that a system or an editor keeps."""
    return not name.startswith(".") and name not in NOT_CONTENT


@lru_cache
def image_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow can open."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@lru_cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of `image_formats`, in lower case, with their dots."""
    return frozenset(s for s, name in Image.registered_extensions().items() if name in (*image_formats(), "MPO"))


def is_image(path: Path) -> bool:
    """Whether a file is an image by its suffix, or, if the suffix says nothing, by its first bytes."""
    if path.suffix.lower() in image_suffixes():
        return True
    try:
        with path.open("rb") as file, Image.open(file, formats=image_formats()):
            return True
    except Exception:  # Pillow raises many kinds
        return False


class ImageReader:
    """Reads the images of one source, and keeps what the user should know of them.

    Args:
        flag: the flag that names the source; it begins messages and notes. Empty where `blame` names it.
        pixel_max: the value of white in a source that uses a part of its type's range (`--pixel_max`).
        exact: refuse files of another size or number of channels than that which is asked for.
    """

    def __init__(self, flag: str, pixel_max: int | None = None, exact: bool = False):
        self.flag, self.pixel_max, self.exact = flag, pixel_max, exact
        self.unread: Counter[str] = Counter()  # files that are no images, by suffix
        self.seen: dict[str, set[Path]] = {}  # files of which something is noted, by what
        self._peaks: set[tuple[int, int]] = set()  # of each file the brightest value, and the largest of its type
        self._deep = False  # whether a file has colours of 16 bits, of which Pillow reads 8

    @property
    def has_decoded(self) -> bool:
        """Whether it has read image files, whose white is 255 by now."""
        return bool(self._peaks)

    def notes(self) -> tuple[str, ...]:
        """Lines for the log."""
        lines = [f"{len(paths)} of the images {what}, e.g. {min(paths)}" for what, paths in self.seen.items()]
        if self.unread:
            counts = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in sorted(self.unread.items()))
            lines.insert(0, f"not read, as they are no images: {counts}")
        return tuple(f"{self.flag}: {line}" if self.flag else line for line in lines)

    def find(self, folder: Path) -> list[Path]:
        """All image files below `folder`, at any depth, sorted by name. Links are followed, to each folder once; a
        `UserError` tells of broken ones."""
        paths, errors, seen = [], [], {folder.resolve()}
        with blame(self.flag):
            try:
                for place, folders, files in os.walk(folder, onerror=errors.append, followlinks=True):
                    inside = {name: Path(place, name).resolve() for name in sorted(folders) if is_content(name)}
                    folders[:] = [name for name, path in inside.items() if path not in seen]
                    seen |= {*inside.values()}
                    paths += [Path(place, name) for name in files if is_content(name)]
                if errors:
                    raise errors[0]
                broken = [p for p in sorted(paths) if p.suffix.lower() in image_suffixes() and not os.path.exists(p)]
                require(not broken, f"broken links, to be mended or removed: {named([str(path) for path in broken])}")
                images = sorted(path for path in paths if path.is_file() and is_image(path))
            except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
                raise UserError(f"cannot list {folder}: {one_line(error)}") from None
        self.unread.update(path.suffix.lower() for path in {*paths} - {*images})
        return images

    def some(self, folder: Path) -> list[Path]:
        """All image files below `folder`, see `find`; a `UserError` if there are none."""
        files = self.find(folder)
        with blame(self.flag):
            require(files, ". ".join([f"{folder} holds no images; put some there, or remove it", *self.notes()]))
        return files

    def files(self, paths: Sequence[Path], channel: int, im_size: tuple[int, int]) -> torch.Tensor:
        """Image files as uint8 `[N, channel, H, W]`: of those of another size the centre, scaled.

        A `UserError` names files that cannot be read, or tells of dark images, see `white_value`.
        """
        with blame(self.flag):
            self._peaks.clear()
            self._deep = False
            images = self._decoded(paths, (*im_size, channel), None)
            where, peaks = os.path.commonpath(paths), {}
            for peak, full in self._peaks:
                peaks[full] = max(peak, peaks.get(full, 0))
            dark = [full for full, peak in peaks.items() if peak * DARK <= full]
            require(len(dark) < 2, f"{where}: dark images of 8 and of 16 bits; store 8 bits")
            require(not (self._deep and 255 in dark), f"{where}: dark colours of 16 bits, of which 8 are read; store 8")
            of_data = self.flag == "--data_path"
            white = {full: white_value(peak, full, self.pixel_max, where, of_data) for full, peak in peaks.items()}
            if any(full != value for full, value in white.items()):
                images = self._decoded(paths, (*im_size, channel), white)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def array(self, path: Path) -> torch.Tensor:
        """The images of a `.npz` (key `images`) or `.npy` file (memory-mapped), uint8 `[N, C, H, W]` of any size."""
        with blame(self.flag):
            array = read_npz(path, ["images"])[0] if path.suffix == ".npz" else read_npy(path)
            return in_full_range([images_to_nchw(array, path)], self.pixel_max, str(path))[0]

    def folder_or_array(self, path: Path, channel: int, im_size: tuple[int, int]) -> torch.Tensor:
        """All images of a folder, decoded to `channel` and `im_size`, or those of an array file as they are."""
        return self.files(self.some(path), channel, im_size) if path.is_dir() else self.array(path)

    def _decoded(self, paths: Sequence[Path], shape: tuple[int, int, int], white: dict[int, int] | None) -> np.ndarray:
        """The images, uint8 `[N, *shape]`. `white`: for each type, by its largest value, the value that becomes 255;
        None: the largest."""
        images = np.empty((len(paths), *shape), np.uint8)

        def decode(index: int) -> str:
            """Read one file into its place in `images`; returns what is wrong with it."""
            try:
                images[index] = self._decode(paths[index], shape, white)
            except UnidentifiedImageError:  # its message shows the object of the file
                return f"{paths[index]}: no image that can be read"
            except Exception as error:
                return f"{paths[index]}: {one_line(error)}"
            return ""

        with warnings.catch_warnings(), ThreadPoolExecutor(DECODERS) as pool:
            warnings.simplefilter("ignore")
            wrong = [text for text in pool.map(decode, range(len(paths))) if text]
        what, them = ("the image", "it") if len(wrong) == 1 else (f"{len(wrong)} images:", "them")
        require(not wrong, f"cannot read {what} {named(wrong)}. Mend or remove {them}")
        return images

    def _decode(self, path: Path, shape: tuple[int, int, int], white: dict[int, int] | None) -> np.ndarray:
        """One file as uint8 `shape`: upright, on white, with white at 255, and of another size its centre, scaled."""
        height, width, channel = shape
        with path.open("rb") as file, Image.open(file, formats=image_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            found = (image.height, image.width, 1 if image.mode in ("1", "L", "I;16", "I") else 3)
            if self.exact and found != shape:
                raise ValueError("it is {2}x{0}x{1}, not {5}x{3}x{4}".format(*found, *shape))
            plain = self._plain(image, path, "L" if channel == 1 else "RGB", white)
        size = (plain.height, plain.width)
        if size != (height, width):
            top, left, h, w = centre_box(size, (height, width))
            if (h, w) != size:
                self._note(f"are cut to their centre, as they are not {width}:{height} in shape", path)
            part = plain.crop((left, top, left + w, top + h))  # `resize(box=…)` would mix in pixels from outside
            plain = part.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(plain, dtype=np.uint8).reshape(shape)

    def _plain(self, image: Image.Image, path: Path, mode: str, white: dict[int, int] | None) -> Image.Image:
        """The image upright, on white, of 8 bits, in a mode (grey or RGB), with white at 255."""
        self._deep |= image.mode.startswith("RGB") and any(";16" in str(tile[3:]) for tile in image.tile)
        if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photograph and its preview
            self._note("have several frames, of which the first is read", path)
        if image.getexif().get(ORIENTATION, 1) != 1:
            self._note("are turned as their EXIF orientation says", path)
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            return self._eight_bits(image, white).convert(mode)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            if layer.getchannel("A").getextrema()[0] < 255:
                self._note("have transparent parts, which lie on white", path)
                layer = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            image = layer
        image = image.convert(mode)
        self._peaks.add((int(np.asarray(image).max()), 255))
        return image.point([*scale_table(white[255])] * len(mode)) if white else image

    def _eight_bits(self, image: Image.Image, whites: dict[int, int] | None) -> Image.Image:
        """An image of 16 bits a pixel scaled to 8: PIL's `convert` would make all above 255 white."""
        if not image.mode.startswith("I;16") and (image.mode == "F" or image.format not in ("PNG", "PPM")):  # older: I
            raise ValueError(f"pixels of 32 bits (mode {image.mode}) have no range; store 8 or 16 bits")
        values = np.asarray(image).astype(np.uint32)
        self._peaks.add((int(values.max()), 65535))
        white = whites[65535] if whites else 65535
        return Image.fromarray(((values * 255 + white // 2) // white).clip(0, 255).astype(np.uint8))

    def _note(self, what: str, path: Path) -> None:
        self.seen.setdefault(what, set()).add(path)
