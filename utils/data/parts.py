"""Images in parts: a stored image holds factor × factor smaller ones (IDC, Kim et al., ICML 2022, section 3.2).

Networks see the parts, each enlarged to the size of the whole. So `ipc` stored images are factor²·ipc to train on.
"""

import torch
import torch.nn.functional as F

from utils.core.errors import require


def decode(images: torch.Tensor, factor: int, fill: float = 0.0) -> torch.Tensor:
    """Cut images into `factor × factor` parts and enlarge each to the size of the whole; differentiable.

    A side that `factor` does not divide is first padded with `fill`, below and on the right.

    Args:
        images: `[N, C, H, W]`.
        fill: 0 is the mean of the data set once images are normalised; published sets of IDC pad pixels with 0.5.
    Returns:
        `[factor²·N, C, H, W]`: the upper left parts of all images, then those to their right, and so on.
    """
    if factor == 1:
        return images
    height, width = images.shape[2:]
    rows, columns = part_size((height, width), factor)
    padded = F.pad(images, (0, columns * factor - width, 0, rows * factor - height), value=fill)
    parts = padded.unfold(2, rows, rows).unfold(3, columns, columns)  # [N, C, factor, factor, rows, columns]
    parts = parts.permute(2, 3, 0, 1, 4, 5).reshape(-1, images.shape[1], rows, columns)
    return F.interpolate(parts, (height, width), mode="bilinear", align_corners=False)


def encode(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Put images into parts: each is shrunk to the size of a part, by the mean over areas.

    Args:
        images: `[factor²·N, C, H, W]`, in the order of `decode`.
    Returns:
        `[N, C, H, W]`.
    """
    if factor == 1:
        return images
    (height, width), channel = images.shape[2:], images.shape[1]
    rows, columns = part_size((height, width), factor)
    small = F.adaptive_avg_pool2d(images, (rows, columns)).view(factor, factor, -1, channel, rows, columns)
    whole = small.permute(2, 3, 0, 4, 1, 5).reshape(-1, channel, factor * rows, factor * columns)
    return whole[:, :, :height, :width].contiguous()


def as_parts(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Images as they look once they were stored in parts, shrunk and enlarged; as many must fill whole images."""
    return decode(encode(images, factor), factor)


def check_factor(factor: object, size: tuple[int, int], flag: str) -> int:
    """`factor`, if parts of images of this size have two pixels a side or more.

    Raises:
        UserError: that begins with `flag` if they have not.
    """
    most = max(1, min(size) // 2)
    fits = type(factor) is int and 1 <= factor <= most
    require(fits, f"{flag} {factor}: images of {size[0]}x{size[1]} hold at most {most} parts a side")
    return factor


def part_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Height and width of a part."""
    return -(-size[0] // factor), -(-size[1] // factor)


def decode_slots(images: torch.Tensor, factor: int) -> torch.Tensor:
    """`decode` for images by class slot: `[slots, n, C, H, W]` becomes `[slots, factor²·n, C, H, W]`."""
    if factor == 1:
        return images
    slots, n = images.shape[:2]
    parts = decode(images.flatten(0, 1), factor).view(factor**2, slots, n, *images.shape[2:])
    return parts.transpose(0, 1).flatten(1, 2)


def on_stored(images: torch.Tensor, factor: int, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient on stored images `[slots, n, C, H, W]` that a gradient on the decoded ones gives."""
    if factor == 1:
        return gradient
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        (on_images,) = torch.autograd.grad(decode_slots(leaf, factor), leaf, gradient)
    return on_images
