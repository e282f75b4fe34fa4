"""ZCA whitening of images, as kornia's `ZCAWhitening(eps=0.1)` does it; MTT's experiments use it on CIFAR."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from utils.compute.transfer import product_dtype

EPSILON = 0.1


@dataclass(frozen=True)
class ZCA:
    """An affine map of flattened images, of D = C·H·W numbers, that decorrelates their pixel values; float32."""

    mean: torch.Tensor  # [D]
    matrix: torch.Tensor  # [D, D], symmetric
    inverse: torch.Tensor  # of the matrix

    def whiten(self, images: torch.Tensor) -> torch.Tensor:
        """Whiten images `[N, C, H, W]` in [0, 1]."""
        return _product(images.flatten(1) - self.mean, self.matrix).view_as(images)

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """The inverse of `whiten`."""
        return (_product(images.flatten(1), self.inverse) + self.mean).view_as(images)

    def is_close(self, other: "ZCA") -> bool:
        """Whether another whitening is the same but for rounding."""
        same = self.matrix.shape == other.matrix.shape and torch.allclose(self.matrix, other.matrix, 1e-5, 1e-3)
        return same and torch.allclose(self.mean, other.mean, rtol=1e-5, atol=1e-4)

    def to(self, device: torch.device | str) -> "ZCA":
        """The same map on `device`."""
        return replace(self, **{n: getattr(self, n).to(device) for n in ("mean", "matrix", "inverse")})


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in full precision."""
    dtype = product_dtype(a.dtype, a.device)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def fit_zca(batches: Iterable[torch.Tensor]) -> ZCA:
    """Fit the whitening to all images of a set, in batches `[n, C, H, W]` in [0, 1]; in float64.

    With the eigenvalues `s` and eigenvectors `U` of the covariance (divided by N - 1), `matrix` is
    `U diag(1 / sqrt(s + EPSILON)) U'` and `inverse` is `U diag(sqrt(s + EPSILON)) U'`.
    """
    count, total, products = 0, 0.0, 0.0
    for images in batches:
        flat = images.flatten(1).double()
        count += len(flat)
        total = total + flat.sum(0)
        products = products + flat.T @ flat
    mean = total / count
    covariance = (products - count * torch.outer(mean, mean)) / max(1, count - 1)
    values, vectors = torch.linalg.eigh(covariance)
    roots = (values.clamp_min(0) + EPSILON).sqrt()
    matrix, inverse = ((vectors * r) @ vectors.T for r in (1 / roots, roots))
    return ZCA(mean.float(), matrix.float(), inverse.float())
