"""ConvNet, the network of the dataset-condensation papers, and its variants."""

from functools import partial

import torch
from torch import nn

from .common import feature_size

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "leakyrelu": partial(nn.LeakyReLU, 0.01), "swish": nn.SiLU}
POOLINGS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d, "none": None}
NORMS = {
    "instance": lambda c, h, w: nn.GroupNorm(c, c),
    "group": lambda c, h, w: nn.GroupNorm(4, c),
    "layer": lambda c, h, w: nn.LayerNorm([c, h, w]),
    "batch": lambda c, h, w: nn.BatchNorm2d(c),
    "none": None,
}


class ConvNet(nn.Module):
    """Blocks of 3×3 convolution, norm, activation and 2×2 pooling, then a linear classifier.

    Input `[N, channel, *im_size]`, output logits `[N, num_classes]`. One-channel 28×28 images are padded to 32×32 by
    the first convolution (padding 3), as published (Gidaris & Komodakis 2018; Zhao et al., ICLR 2021, section 4.1).
    """

    def __init__(
        self,
        channel: int,
        num_classes: int,
        im_size: tuple[int, int],
        width: int = 128,
        depth: int = 3,
        activation: str = "relu",
        norm: str = "instance",
        pooling: str = "avg",
        name: str = "ConvNet",
    ):
        super().__init__()
        first_padding = 3 if channel == 1 and tuple(im_size) == (28, 28) else 1
        halvings = 0 if pooling == "none" else depth
        out = feature_size(name, im_size, lambda side: (side + 2 * first_padding - 2) >> halvings)

        height, width_px = (side + 2 * first_padding - 2 for side in im_size)
        layers: list[nn.Module] = []
        for block in range(depth):
            layers.append(nn.Conv2d(channel, width, 3, padding=1 if block else first_padding))
            if NORMS[norm]:
                layers.append(NORMS[norm](width, height, width_px))
            layers.append(ACTIVATIONS[activation]())
            if POOLINGS[pooling]:
                layers.append(POOLINGS[pooling](2))
                height, width_px = height // 2, width_px // 2
            channel = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * out[0] * out[1], num_classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.embed(x))


_SUFFIXES = {
    "": {},
    **{f"D{d}": {"depth": d} for d in (1, 2, 3, 4)},
    **{f"W{w}": {"width": w} for w in (32, 64, 128, 256)},
    "AS": {"activation": "sigmoid"},
    "AR": {"activation": "relu"},
    "AL": {"activation": "leakyrelu"},
    "ASwish": {"activation": "swish"},
    "ASwishBN": {"activation": "swish", "norm": "batch"},
    "NN": {"norm": "none"},
    "BN": {"norm": "batch"},
    "LN": {"norm": "layer"},
    "IN": {"norm": "instance"},
    "GN": {"norm": "group"},
    "NP": {"pooling": "none"},
    "MP": {"pooling": "max"},
    "AP": {"pooling": "avg"},
}
NETWORKS = {f"ConvNet{s}": partial(ConvNet, name=f"ConvNet{s}", **kwargs) for s, kwargs in _SUFFIXES.items()}
