"""ResNet in its CIFAR form (He et al. 2016), with instance or batch norm, strided or average-pooled ("AP")."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .common import channel_norm, feature_size


class Block(nn.Module):
    """What both residual blocks share: the stride and the shortcut.

    With `pooled`, a stride of 2 becomes stride 1 followed by average pooling: in the block after the activation that
    follows the first 3×3 convolution, in the shortcut between convolution and norm.
    """

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int, norm: str, pooled: bool):
        super().__init__()
        self.pool = nn.AvgPool2d(2) if pooled and stride == 2 else nn.Identity()
        self.stride = 1 if pooled else stride
        out = planes * self.expansion
        layers: list[nn.Module] = []
        if stride != 1 or in_planes != out:
            layers = [nn.Conv2d(in_planes, out, 1, stride=self.stride, bias=False), channel_norm(norm, out)]
            if pooled:
                layers.insert(1, nn.AvgPool2d(stride))
        self.shortcut = nn.Sequential(*layers)


class BasicBlock(Block):
    """Two 3×3 convolutions."""

    def __init__(self, in_planes: int, planes: int, stride: int, norm: str, pooled: bool):
        super().__init__(in_planes, planes, stride, norm, pooled)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = channel_norm(norm, planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = channel_norm(norm, planes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.pool(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(Block):
    """1×1, 3×3 and 1×1 convolutions; the middle one takes the stride."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int, norm: str, pooled: bool):
        super().__init__(in_planes, planes, stride, norm, pooled)
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = channel_norm(norm, planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=self.stride, padding=1, bias=False)
        self.bn2 = channel_norm(norm, planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = channel_norm(norm, 4 * planes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.pool(F.relu(self.bn2(self.conv2(out))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of residual blocks; 4×4 average pooling (none if `pooled`); one linear `classifier`."""

    def __init__(
        self,
        channel: int,
        num_classes: int,
        im_size: tuple[int, int],
        block: type[Block],
        depths: tuple[int, int, int, int],
        norm: str = "instance",
        pooled: bool = False,
        name: str = "ResNet",
    ):
        super().__init__()
        least = 8 if norm == "batch" else 16  # pooled: InstanceNorm needs two values a side; that of one is a constant
        along = (lambda side: side // 8 if side >= least else 0) if pooled else (lambda side: -(-side // 8) // 4)
        height, width = feature_size(name, im_size, along)
        self.conv1 = nn.Conv2d(channel, 64, 3, padding=1, bias=False)
        self.bn1 = channel_norm(norm, 64)
        planes = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                out = 64 * 2**stage
                blocks.append(block(planes, out, 2 if stage and not index else 1, norm, pooled))
                planes = out * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.final_pool = nn.Identity() if pooled else nn.AvgPool2d(4)
        self.classifier = nn.Linear(planes * height * width, num_classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.final_pool(out).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.embed(x))


def _resnet(block: type[Block], *depths: int, **kwargs):
    return partial(ResNet, block=block, depths=depths, **kwargs)


NETWORKS = {
    "ResNet18": _resnet(BasicBlock, 2, 2, 2, 2, name="ResNet18"),
    "ResNet34": _resnet(BasicBlock, 3, 4, 6, 3, name="ResNet34"),
    "ResNet50": _resnet(Bottleneck, 3, 4, 6, 3, name="ResNet50"),
    "ResNet101": _resnet(Bottleneck, 3, 4, 23, 3, name="ResNet101"),
    "ResNet152": _resnet(Bottleneck, 3, 8, 36, 3, name="ResNet152"),
    "ResNet18BN": _resnet(BasicBlock, 2, 2, 2, 2, norm="batch", name="ResNet18BN"),
    "ResNet18_AP": _resnet(BasicBlock, 2, 2, 2, 2, pooled=True, name="ResNet18_AP"),
    "ResNet18BN_AP": _resnet(BasicBlock, 2, 2, 2, 2, norm="batch", pooled=True, name="ResNet18BN_AP"),
}
