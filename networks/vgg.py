"""VGG for small images (Simonyan & Zisserman 2015), with instance or batch norm."""

from functools import partial

import torch
from torch import nn

from .common import channel_norm, feature_size

CONFIGURATIONS = {  # widths of each stage; a max pooling ends every stage
    "VGG11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "VGG13": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "VGG16": ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    "VGG19": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nn.Module):
    """Stages of 3×3 convolution, norm and ReLU, each ended by a max pooling, then one linear `classifier`."""

    def __init__(
        self,
        channel: int,
        num_classes: int,
        im_size: tuple[int, int],
        stages: tuple[tuple[int, ...], ...],
        norm: str = "instance",
        name: str = "VGG",
    ):
        super().__init__()
        first_padding = 3 if channel == 1 else 1
        height, width = feature_size(name, im_size, lambda side: (side + 2 * first_padding - 2) >> len(stages))
        layers: list[nn.Module] = []
        for stage in stages:
            for out in stage:
                layers.append(nn.Conv2d(channel, out, 3, padding=1 if layers else first_padding))
                layers += [channel_norm(norm, out), nn.ReLU()]
                channel = out
            layers.append(nn.MaxPool2d(2))
        layers.append(nn.AvgPool2d(1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channel * height * width, num_classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.embed(x))


NETWORKS = {name: partial(VGG, stages=stages, name=name) for name, stages in CONFIGURATIONS.items()}
NETWORKS["VGG11BN"] = partial(VGG, stages=CONFIGURATIONS["VGG11"], norm="batch", name="VGG11BN")
