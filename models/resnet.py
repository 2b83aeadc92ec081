"""Residual networks of He et al. (2016), for small images (depth 6n+2) and for ImageNet (18 to 152).

Parameters, with 10 classes for small images and 1000 for ImageNet:

    ============ ========== === ======== ==========
    small images parameters     ImageNet parameters
    ============ ========== === ======== ==========
    20              272,474     18       11,689,512
    32              466,906     34       21,797,672
    44              661,338     50       25,557,032
    56              855,770     101      44,549,160
                                152      60,192,808
    ============ ========== === ======== ==========

Names of parameters are those of torchvision's ResNet. Shortcuts where the shape changes are a 1x1 convolution with
BatchNorm (option B), in the CIFAR networks too: the recipe of the paper.
"""

import math
from typing import Any

from torch import Tensor, nn

Regime = dict[int, dict[str, Any]]

# Epoch: settings from there on (sticky).
CIFAR_REGIME: Regime = {
    0: {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    100: {"lr": 0.01},
    150: {"lr": 0.001},
}
IMAGENET_REGIME: Regime = {
    0: {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    30: {"lr": 0.01},
    60: {"lr": 0.001, "weight_decay": 0.0},
    90: {"lr": 0.0001},
}

IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. ``(N, inputs, H, W)`` to ``(N, maps, H / stride, W / stride)``."""

    expansion = 1

    def __init__(self, inputs: int, maps: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, maps, 3, stride)
        self.bn1 = nn.BatchNorm2d(maps)
        self.conv2 = _conv(maps, maps, 3)
        self.bn2 = nn.BatchNorm2d(maps)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x.add_(shortcut))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions and a shortcut; four times ``maps`` at its output."""

    expansion = 4

    def __init__(self, inputs: int, maps: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, maps, 1)
        self.bn1 = nn.BatchNorm2d(maps)
        self.conv2 = _conv(maps, maps, 3, stride)
        self.bn2 = nn.BatchNorm2d(maps)
        self.conv3 = _conv(maps, self.expansion * maps, 1)
        self.bn3 = nn.BatchNorm2d(self.expansion * maps)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu(x.add_(shortcut))


def _stage(block: type[BasicBlock | Bottleneck], inputs: int, maps: int, blocks: int, stride: int) -> nn.Sequential:
    outputs = maps * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    first = block(inputs, maps, stride, downsample)
    return nn.Sequential(first, *(block(outputs, maps, 1, None) for _ in range(blocks - 1)))


def _initialize(model: nn.Module) -> None:
    """Convolutions normal with std sqrt(2 / (k * k * out)), BatchNorm at 1 and 0; the classifier stays at torch's default."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


class _ResNet(nn.Module):
    """What the two have in common: they can say what they are."""

    depth: int
    fc: nn.Linear

    @property
    def config(self) -> dict[str, int]:
        """What ``resnet`` needs to build this one."""
        return {"depth": self.depth, "num_classes": self.fc.out_features}

    @property
    def size(self) -> str:
        """In words."""
        return f"depth {self.depth}"

    def quantizable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and weights that may be quantized: of every convolution and of the classifier, but not those of the shortcuts,
        whose 1x1 convolutions stay in full precision in every mode."""
        layers = [(name, layer) for name, layer in self.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        return [(f"{name}.weight", layer.weight) for name, layer in layers if "downsample" not in name.split(".")]


class CifarResNet(_ResNet):
    """ResNet for 32x32 images: three stages of n basic blocks with 16, 32 and 64 maps; depth 6n+2.

    ``(N, 3, 32, 32)`` normalized images to ``(N, num_classes)`` logits.
    """

    regime = CIFAR_REGIME

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        self.depth = depth
        blocks = (depth - 2) // 6
        self.conv1 = _conv(3, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(BasicBlock, 16, 16, blocks, 1)
        self.layer2 = _stage(BasicBlock, 16, 32, blocks, 2)
        self.layer3 = _stage(BasicBlock, 32, 64, blocks, 2)
        self.avgpool = nn.AvgPool2d(8)
        self.fc = nn.Linear(64, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


class ImageNetResNet(_ResNet):
    """ResNet for ImageNet: four stages with 64, 128, 256 and 512 maps. ``(N, 3, H, W)`` images to ``(N, num_classes)`` logits."""

    regime = IMAGENET_REGIME

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        self.depth = depth
        block = BasicBlock if depth < 50 else Bottleneck
        blocks = IMAGENET_BLOCKS[depth]
        self.conv1 = _conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(block, 64, 64, blocks[0], 1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, blocks[1], 2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, blocks[2], 2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet(dataset: str = "cifar10", depth: int | None = None, num_classes: int = 10) -> nn.Module:
    """The ResNet for a data set: ``ImageNetResNet`` for ``imagenet``, else ``CifarResNet``.

    Args:
        dataset: name of the data set.
        depth: 6n+2 for small images (default 20); 18, 34, 50, 101 or 152 for ImageNet (default 18).
        num_classes: number of logits.

    Raises:
        ValueError: on a depth that no such network has, or fewer than 2 classes.
    """
    if not _is_whole(num_classes) or num_classes < 2:
        raise ValueError(f"num_classes {num_classes!r}: a whole number from 2 up is accepted")
    if dataset == "imagenet":
        depth = 18 if depth is None else depth
        if not _is_whole(depth) or depth not in IMAGENET_BLOCKS:
            raise ValueError(f"depth {depth!r}: 18, 34, 50, 101 or 152 is accepted for imagenet")
        return ImageNetResNet(depth, num_classes)
    depth = 20 if depth is None else depth
    if not _is_whole(depth) or not 8 <= depth <= 1202 or depth % 6 != 2:
        raise ValueError(f"depth {depth!r}: 6n+2 (8, 14, 20, 32, 44, 56, ... 1202) is accepted for {dataset}")
    return CifarResNet(depth, num_classes)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
