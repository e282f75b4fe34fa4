"""Reading image files and arrays of images by one set of rules, so that networks see what the user sees.

A file is turned as its EXIF orientation says, and what is transparent in it lies on white. Of files and arrays alike,
the shorter side is scaled and the centre is cut out. A source whose values use a small part of their range is an error.
What the user should know of a source, such as files that are not read, is noted for the log.
"""

import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch

from utils.core.arrays import images_to_nchw, read_npy, read_npz
from utils.core.errors import UserError, blame, named, one_line
from utils.core.pixels import DARK, centre_box, in_full_range, scale_table, white_value

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

# for some others PIL would call external programs, and some have no mark by which a file can be known
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "QOI")
MAX_PIXELS = 40_000_000  # larger images are refused: decoding takes up to 20 bytes per pixel
LARGE_PIXELS = 2_000_000  # larger images are decoded one at a time, to bound the memory
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
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@lru_cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of `image_formats`, in lower case, with their dots."""
    from PIL import Image

    return frozenset(s for s, name in Image.registered_extensions().items() if name in (*image_formats(), "MPO"))


def is_image(path: Path) -> bool:
    """Whether a file is an image by its suffix, or, if the suffix says nothing, by its first bytes."""
    from PIL import Image

    if path.suffix.lower() in image_suffixes():
        return True
    try:
        with path.open("rb") as file, Image.open(file, formats=image_formats()):
            return True
    except Exception:  # Pillow raises many kinds
        return False


def check_link(path: Path, tree: Path) -> None:
    """Raise a `UserError` if `path` is a broken link or resolves to a place outside `tree` (a resolved folder)."""
    if not os.path.exists(path):
        raise UserError(f"{path} is a broken link; mend or remove it")
    if not path.resolve().is_relative_to(tree):
        raise UserError(f"{path} is a link that leads out of {tree}; put the files themselves there")


class ImageReader:
    """Reads the images of one source, and keeps what the user should know of them.

    Args:
        flag: the flag that names the source; it begins messages and notes. Empty where `blame` names it.
        pixel_max: the value of white in a source that uses a small part of its type's range (`--pixel_max`).
    """

    def __init__(self, flag: str, pixel_max: int | None = None):
        self.flag, self.pixel_max = flag, pixel_max
        self.begin = f"{flag}: " if flag else ""  # of messages
        self.unread: Counter[str] = Counter()  # files that are no images, by suffix
        self.seen: dict[str, list[Path]] = {}  # files of which something is noted, by what
        self._one_large = Lock()

    def notes(self) -> tuple[str, ...]:
        """Lines for the log."""
        lines = []
        if self.unread:
            counts = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in sorted(self.unread.items()))
            lines.append(f"{self.begin}not read, as they are no images: {counts}")
        for what, paths in self.seen.items():
            lines.append(f"{self.begin}{len(paths)} of the images {what}, e.g. {min(paths)}")
        return tuple(lines)

    def find(self, folder: Path, tree: Path | None = None) -> list[Path]:
        """All image files below `folder`, at any depth, sorted by name.

        Names that begin with a dot, and those of `NOT_CONTENT`, are passed over.

        Args:
            folder: where to look. Links to folders below it are not followed.
            tree: links must stay inside it; default: `folder`.
        Raises:
            UserError: for a link that is broken or leads out of `tree`, and for a folder that cannot be read.
        """
        tree = (tree or folder).resolve()
        try:
            with blame(self.flag):
                check_link(folder, tree)
                paths = sorted(_files_below(folder))
                for path in paths:
                    if path.is_symlink() and path.suffix.lower() in image_suffixes():
                        check_link(path, tree)
            images = [path for path in paths if path.is_file() and is_image(path)]
            self.unread.update(path.suffix.lower() for path in {*paths} - {*images})
            return images
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise UserError(f"{self.begin}cannot list {folder}: {one_line(error)}") from None

    def files(self, paths: Sequence[Path], channel: int, im_size: tuple[int, int]) -> torch.Tensor:
        """Decode image files in threads to uint8 `[N, channel, H, W]`: `centre_box`, bilinear resize.

        Raises:
            UserError: naming the files that are damaged, of another format, or larger than `MAX_PIXELS`; and for dark
                images, see `white_value`.
        """
        images, decoder = self._decoded(paths, channel, im_size, None)
        self.seen, (brightest, full) = decoder.seen, decoder.brightest
        if brightest * DARK <= full:
            where = f"{self.begin}{os.path.commonpath(paths)}"
            if len(decoder.types) > 1:
                raise UserError(
                    f"{where}: dark images of 8 and of 16 bits, brightest {brightest} of {full}; store 8 bits"
                )
            white = white_value(brightest, full, self.pixel_max, where)
            if white != full:
                images, _ = self._decoded(paths, channel, im_size, white)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def array(self, path: Path) -> torch.Tensor:
        """The images of a `.npz` (key `images`) or `.npy` file, uint8 `[N, C, H, W]` of their own size.

        A `.npy` file is memory-mapped.
        """
        with blame(self.flag):
            array = read_npz(path, ["images"])[0] if path.suffix == ".npz" else read_npy(path)
            return in_full_range([images_to_nchw(array, path)], self.pixel_max, str(path))[0]

    def folder_or_array(self, path: Path, channel: int, im_size: tuple[int, int]) -> torch.Tensor:
        """All images of a folder, decoded to `channel` and `im_size`, or those of an array file as they are."""
        if not path.is_dir():
            return self.array(path)
        return self.files(self.some(path), channel, im_size)

    def some(self, folder: Path) -> list[Path]:
        """All image files below `folder`; a `UserError` if there are none."""
        files = self.find(folder)
        if not files:
            raise UserError(". ".join([f"{self.begin}{folder} holds no images", *self.notes()]))
        return files

    def _decoded(
        self, paths: Sequence[Path], channel: int, im_size: tuple[int, int], white: int | None
    ) -> tuple[np.ndarray, "_Decoder"]:
        """The images, uint8 `[N, H, W, channel]`, and what decoded them.

        `white`: the value that becomes 255; None: the largest of the type.
        """
        height, width = im_size
        images = np.empty((len(paths), height, width, channel), np.uint8)
        decoder = _Decoder(channel, im_size, white)

        def decode(index: int) -> str:
            """Read one file into its place in `images`; returns what is wrong with it."""
            try:
                images[index] = decoder(paths[index], self._one_large)
            except Exception as error:
                damaged = type(error).__name__ == "UnidentifiedImageError"  # its message shows the object of the file
                return f"{paths[index]}: {'no image that can be read' if damaged else one_line(error)}"
            return ""

        with warnings.catch_warnings(), ThreadPoolExecutor(DECODERS) as pool:
            warnings.simplefilter("ignore")
            wrong = [text for text in pool.map(decode, range(len(paths))) if text]
        if wrong:
            what, them = ("the image", "it") if len(wrong) == 1 else (f"{len(wrong)} images:", "them")
            raise UserError(f"{self.begin}cannot read {what} {named(wrong)}. Mend or remove {them}")
        return images, decoder


class _Decoder:
    """Decodes files to uint8 `[H, W, channel]`, and notes what they have.

    `seen`: files of which something is to be said, by what; `brightest`: the brightest value, and the largest that its
    type holds; `types`: the largest values of all types.
    """

    def __init__(self, channel: int, im_size: tuple[int, int], white: int | None):
        self.mode, self.channel, self.im_size, self.white = "L" if channel == 1 else "RGB", channel, im_size, white
        self.seen: dict[str, list[Path]] = {}
        self.brightest = (0, 255)
        self.types: set[int] = set()
        self.lock = Lock()

    def __call__(self, path: Path, one_large: Lock) -> np.ndarray:
        """Decode one file; several threads do so, but large images one after another."""
        from PIL import Image

        with path.open("rb") as file, Image.open(file, formats=image_formats()) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            if pixels > LARGE_PIXELS:
                with one_large:
                    return self._fitted(image, path)
            return self._fitted(image, path)

    def _fitted(self, image: "PILImage", path: Path) -> np.ndarray:
        from PIL import Image, ImageOps

        if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photograph and its preview
            self._note("have several frames, of which the first is read", path)
        if image.getexif().get(ORIENTATION, 1) != 1:
            self._note("are turned as their EXIF orientation says", path)
            ImageOps.exif_transpose(image, in_place=True)
        of_16_bits = image.mode.startswith("I")
        opaque = self._on_white(self._eight_bits(image) if of_16_bits or image.mode == "F" else image, path)
        whole = opaque if opaque.mode == self.mode else opaque.convert(self.mode)
        whole = whole if of_16_bits else self._whitened(whole)
        height, width = self.im_size
        if (whole.height, whole.width) != (height, width):
            top, left, h, w = centre_box((whole.height, whole.width), (height, width))
            if (h, w) != (whole.height, whole.width):
                self._note(f"are cut to their centre, as they are not {width}:{height} in shape", path)
            part = whole.crop((left, top, left + w, top + h))  # `resize(box=…)` would mix in pixels from outside
            whole = part.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(whole, dtype=np.uint8).reshape(height, width, self.channel)

    def _eight_bits(self, image: "PILImage") -> "PILImage":
        """An image of 16 bits a pixel scaled to 8: PIL's `convert` would make all above 255 white.

        Raises:
            ValueError: for pixels of 32 bits, whose range is not known.
        """
        from PIL import Image

        if not image.mode.startswith("I;16") and (image.mode == "F" or image.format not in ("PNG", "PPM")):  # older: I
            raise ValueError(f"pixels of 32 bits (mode {image.mode}) have no range; store 8 or 16 bits")
        values = np.asarray(image).astype(np.uint32)
        self._note_brightest(int(values.max()), 65535)
        white = self.white or 65535
        return Image.fromarray(((values * 255 + white // 2) // white).clip(0, 255).astype(np.uint8))

    def _on_white(self, image: "PILImage", path: Path) -> "PILImage":
        """The image without transparency: what is transparent shows white, as in a viewer."""
        from PIL import Image

        if not image.has_transparency_data:
            return image
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema()[0] == 255:
            return layer.convert("RGB")
        self._note("have transparent parts, which lie on white", path)
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)

    def _whitened(self, image: "PILImage") -> "PILImage":
        """An image of 8 bits, with white at 255."""
        if self.white is not None:
            return image.point([*scale_table(self.white)] * self.channel)
        if self.brightest[0] * DARK <= self.brightest[1]:  # else this source is known to be bright
            extrema = image.getextrema()
            self._note_brightest(max(extrema[1:] if self.channel == 1 else (high for _, high in extrema)), 255)
        return image

    def _note(self, what: str, path: Path) -> None:
        with self.lock:
            self.seen.setdefault(what, []).append(path)

    def _note_brightest(self, value: int, full: int) -> None:
        with self.lock:
            self.types.add(full)
            if value * self.brightest[1] >= self.brightest[0] * full:
                self.brightest = (value, full)


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, and links to files, whose names are a user's; links to folders are not followed."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = filter(is_content, folders)
        yield from (Path(place, name) for name in files if is_content(name))
