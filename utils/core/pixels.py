"""Pixels of images that were read: in [0, 1], of one size and number of channels, over the full range of their type."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils.core.errors import require

DARK = 8  # images whose brightest value is at most this part of their type's range are not taken as they are
LOOKED_AT = 1000  # images in which a bright value is looked for first
LEAST_SIDE = 5  # pixels; a narrower side may be an axis of channels


def unit_images(images: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] as float32: uint8 is divided by 255, float is returned unchanged."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def images_to_nchw(array: np.ndarray, path: Path) -> torch.Tensor:
    """uint8 `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]` as a view `[N, C, H, W]`; a `UserError` for other arrays.

    Refused are also shapes with several readings, as `[32, 32, 3]`: one colour picture, or 32 grey ones.
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


def centre_box(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest centred part of an image of `size` that has the shape of `wanted`."""
    (height, width), (h, w) = size, wanted
    inner_h, inner_w = min(height, max(1, round(width * h / w))), min(width, max(1, round(height * w / h)))
    return (height - inner_h) // 2, (width - inner_w) // 2, inner_h, inner_w


def conform(images: torch.Tensor, channel: int, im_size: tuple[int, int]) -> torch.Tensor:
    """Bring images `[N, C, H, W]` to float32 [0, 1] with `channel` channels and size `im_size`.

    Three channels become one with the ITU-R 601 luma weights; one becomes three by repetition. Of images of another
    size, the centre is scaled, as of image files: antialiased bilinear interpolation of `centre_box`.
    """
    images = unit_images(images)
    if images.shape[1] == 3 and channel == 1:
        images = 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]
    elif images.shape[1] == 1 and channel == 3:
        images = images.expand(-1, 3, -1, -1)
    if tuple(images.shape[2:]) != tuple(im_size):
        top, left, height, width = centre_box(tuple(images.shape[2:]), tuple(im_size))
        images = images[:, :, top : top + height, left : left + width]
        images = F.interpolate(images, tuple(im_size), mode="bilinear", antialias=True, align_corners=False)
    return images.clamp(0, 1)


def white_value(brightest: int, full: int, pixel_max: int | None, where: str, of_data: bool = False) -> int:
    """The value of white in images that hold values up to `brightest`, of a type that holds up to `full`.

    The user says it (`--pixel_max`), else it is `full`. Dark images use at most 1/8 of the range, as values of 12 bits
    in files of 16; for them a `UserError`, which `where` begins, asks for it. Another refuses what does not fit; but
    other images than those `of_data`, the data set, may be brighter, and have the white of their type then.
    """
    if pixel_max is not None and pixel_max >= full:
        return full
    found = f"{where}: the brightest pixel is {brightest}, and white is {full} in this type"
    if brightest * DARK > full:
        fits = pixel_max is not None and brightest <= pixel_max
        told = f"{found}; --pixel_max {pixel_max} does not fit: give the value of white, or leave it out"
        require(pixel_max is None or fits or not of_data, told)
        return pixel_max if fits else full
    as_they_are = f"--pixel_max {full} takes them as they are"
    white = f"if white is {brightest}, give --pixel_max {brightest}; " if brightest else ""
    require(pixel_max is not None, f"{found}, so these images are nearly black: {white}{as_they_are}")
    wrong = f"{found}; --pixel_max {pixel_max} does not fit: give the value of white, or {as_they_are}"
    require(brightest <= pixel_max < max(1, brightest) * DARK, wrong)
    return pixel_max


def in_full_range(
    parts: Sequence[torch.Tensor], pixel_max: int | None, where: str, of_data: bool = False
) -> list[torch.Tensor]:
    """The parts of one source of images, uint8 ones scaled so that white is 255; see `white_value`."""
    if any(part.dtype != torch.uint8 for part in parts):
        return list(parts)
    is_bright = any(int(part[:: max(1, len(part) // LOOKED_AT)].max()) * DARK > 255 for part in parts)
    if is_bright and (pixel_max is None or pixel_max >= 255):
        return list(parts)
    white = white_value(max(int(part.max()) for part in parts), 255, pixel_max, where, of_data)
    return [torch.from_numpy(scale_table(white)[part.numpy()]) if white < 255 else part for part in parts]


def scale_table(white: int) -> np.ndarray:
    """For each value of 8 bits the one that it becomes when `white` becomes 255, uint8 `[256]`."""
    return (np.arange(256) * 255 / white).round().clip(0, 255).astype(np.uint8)
