"""MLP, LeNet and AlexNet."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .common import channel_norm, feature_size


class MLP(nn.Module):
    """Three linear layers with ReLU between them; the hidden width is 128."""

    def __init__(self, channel: int, num_classes: int, im_size: tuple[int, int]):
        super().__init__()
        self.fc_1 = nn.Linear(channel * im_size[0] * im_size[1], 128)
        self.fc_2 = nn.Linear(128, 128)
        self.fc_3 = nn.Linear(128, num_classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.fc_2(F.relu(self.fc_1(x.flatten(1)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc_3(self.embed(x))


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling (LeCun et al. 1998)."""

    def __init__(self, channel: int, num_classes: int, im_size: tuple[int, int]):
        super().__init__()
        padding = 2 if channel == 1 else 0
        height, width = feature_size("LeNet", im_size, lambda side: ((side + 2 * padding - 4) // 2 - 4) // 2)
        self.features = nn.Sequential(
            nn.Conv2d(channel, 6, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.fc_1 = nn.Linear(16 * height * width, 120)
        self.fc_2 = nn.Linear(120, 84)
        self.fc_3 = nn.Linear(84, num_classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.fc_2(F.relu(self.fc_1(self.features(x).flatten(1)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc_3(self.embed(x))


class AlexNet(nn.Module):
    """Five convolutions, three max poolings, a linear layer `fc`; `norm="batch"`: BatchNorm after each convolution."""

    # (width, kernel, pooled); the padding of the first convolution depends on the number of channels
    LAYERS = ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True))

    def __init__(
        self, channel: int, num_classes: int, im_size: tuple[int, int], norm: str = "none", name: str = "AlexNet"
    ):
        super().__init__()
        first_padding = 4 if channel == 1 else 2
        height, width = feature_size(name, im_size, lambda side: (side + 2 * first_padding - 4) // 8)
        layers: list[nn.Module] = []
        for index, (out, kernel, pooled) in enumerate(self.LAYERS):
            layers.append(nn.Conv2d(channel, out, kernel, padding=kernel // 2 if index else first_padding))
            if norm == "batch":
                layers.append(channel_norm(norm, out))
            layers.append(nn.ReLU())
            if pooled:
                layers.append(nn.MaxPool2d(2))
            channel = out
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(192 * height * width, num_classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embed(x))


NETWORKS = {
    "MLP": MLP,
    "LeNet": LeNet,
    "AlexNet": AlexNet,
    "AlexNetBN": partial(AlexNet, norm="batch", name="AlexNetBN"),
}
