"""What the numbers of distilled images mean: decoding them, checking what is assumed, and normalising them."""

import torch

from utils.core.errors import require
from utils.data.datasets import RealData
from utils.data.distilled_file import Statistics, is_close
from utils.data.whitening import ZCA


def to_training_space(
    images: torch.Tensor, space: str, statistics: Statistics, real: RealData, zca: ZCA | None = None
) -> torch.Tensor:
    """Images as networks see those of `real`: normalised with its statistics, or whitened.

    They are float32 `[N, C, H, W]`, and returned unchanged if they were made like that.
    `space` is one of `SPACES`, `statistics` are of the normalised one; `zca` whitened the images, if that is known.
    """
    if space == "zca" and (zca is None or real.zca.to("cpu").is_close(zca.mean, zca.matrix)):
        return images
    if space == "normalised" and real.zca is None and all(map(is_close, statistics, (real.mean, real.std))):
        return images
    unit = images if space == "unit" else to_unit(images, statistics, zca if space == "zca" else None)
    return real.normalize(unit.to(real.device)).cpu()


def to_unit(images: torch.Tensor, statistics: Statistics | None, zca: ZCA | None = None) -> torch.Tensor:
    """Undo the normalisation, or the whitening if `zca` is given; the numbers are not clipped to [0, 1]."""
    if zca is not None:
        return zca.undo(images)
    mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in statistics)
    return images * std + mean


def check_possible(space: str, statistics: Statistics, real: RealData, where: str) -> None:
    """Check that images of a space can be used for `real`; `where`, the file, begins the message.

    A `UserError` tells that they are whitened and those of `real` are not, or the statistics are of other channels.
    """
    require(
        space != "zca" or real.zca is not None,
        f"{where} is whitened (ZCA), so networks must see whitened test images: add --zca. "
        "If it is not, give --distilled_space normalised",
    )
    mean, std = map(len, statistics)
    told = f"--distilled_mean, --distilled_std: give one number each, or one for each of {real.channel} channels"
    require(mean == std and mean in (1, real.channel), told)


def check_guess(images: torch.Tensor, space: str, real: RealData, where: str) -> None:
    """Raise a `UserError` where the numbers of images contradict a space that no file states.

    Pixels lie in [0, 1]. Normalised images have negative numbers and, when they are distilled, a deviation from 0.4 to
    40. Whitened images have the deviation of pixels once the whitening is undone; normalised ones would get 18 times
    that (CIFAR-10).
    """
    low, high, mean, std = (f(images).item() for f in (torch.min, torch.max, torch.mean, torch.std))
    what = {"unit": "pixels from 0 to 1", "normalised": "normalised images", "zca": "whitened images (ZCA)"}[space]
    like = ""
    if space == "unit":
        wrong = low < -0.1 or high > 1.1
        like = "normalised or whitened images" if low < -0.1 else "pixels from 0 to 255" if high > 2 else ""
    elif low >= -0.05:
        wrong, like = True, "pixels from 0 to 1" if high <= 1.1 else "pixels from 0 to 255"
    elif space == "normalised":
        wrong, like = not 0.4 < std < 40 or abs(mean) > 3, "whitened images" if std < 0.4 else ""
    else:
        pixels = real.zca.undo(images.to(real.device))
        wrong, like = bool(pixels.std() > 4 * sum(real.std) / len(real.std)), "normalised images"
    require(
        not wrong,
        f"{where} is taken to hold {what}, but its numbers are from {low:.3g} to {high:.3g}, mean {mean:.3g}, "
        f"deviation {std:.3g}{like and f', as of {like}'}. Say what they are with --distilled_space "
        "(and --distilled_mean, --distilled_std)",
    )
