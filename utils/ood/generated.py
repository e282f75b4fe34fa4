"""OOD sets that are generated, not read from files: float32 images `[n, C, H, W]` in normalised space."""

from collections.abc import Callable

import numpy as np
import torch

from utils.core.pixels import conform
from utils.data.datasets import RealData


def gaussian(real: RealData, n: int, g: torch.Generator) -> torch.Tensor:
    """Normal noise of standard deviation 0.5, clipped to [-1, 1]."""
    return (0.5 * torch.randn(n, real.channel, *real.im_size, generator=g)).clamp_(-1, 1)


def uniform(real: RealData, n: int, g: torch.Generator) -> torch.Tensor:
    """Uniform noise in [-1, 1)."""
    return torch.rand(n, real.channel, *real.im_size, generator=g) * 2 - 1


def rademacher(real: RealData, n: int, g: torch.Generator) -> torch.Tensor:
    """Each value is -1 or 1, with equal probability."""
    return torch.randint(0, 2, (n, real.channel, *real.im_size), generator=g).float() * 2 - 1


def blob(real: RealData, n: int, g: torch.Generator) -> torch.Tensor:
    """A Bernoulli(0.7) image, blurred with sigma 1.5; values below 0.75 are set to 0; then ·2-1.

    Colours are blurred like rows and columns, so that blobs are nearly grey, as in Outlier Exposure (Hendrycks et al.,
    ICLR 2019).
    """
    from scipy.ndimage import gaussian_filter

    bernoulli = (torch.rand(n, real.channel, *real.im_size, generator=g) < 0.7).numpy().astype(np.float32)
    sigma, at_border = (0, 1.5 if real.channel > 1 else 0, 1.5, 1.5), ("reflect", "nearest", "reflect", "reflect")
    blurred = torch.from_numpy(gaussian_filter(bernoulli, sigma=sigma, mode=at_border))
    return torch.where(blurred < 0.75, torch.zeros(()), blurred) * 2 - 1


def patches(real: RealData, n: int, g: torch.Generator) -> torch.Tensor:
    """Square crops, of 16 to 255 pixels a side, of scikit-learn's two photographs, in the data set's shape."""
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in load_sample_images().images]
    crops = []
    for choice, side, top, left in torch.rand(n, 4, generator=g).tolist():
        photo, side = photos[int(choice * len(photos))], int(16 * 16**side)
        row, col = (int(u * (length - side)) for u, length in zip((top, left), photo.shape[1:], strict=True))
        crops.append(conform(photo[None, :, row : row + side, col : col + side], real.channel, real.im_size))
    return real.normalize(torch.cat(crops).to(real.device))


DRAWN: dict[str, Callable[[RealData, int, torch.Generator], torch.Tensor]] = {
    f.__name__: f for f in (gaussian, uniform, rademacher, blob, patches)
}
