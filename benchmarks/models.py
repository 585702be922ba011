"""The networks of the whole-step benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emp_fast.demo.models import fashion_mnist_cnn


class ResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images: a 3 x 3 stem without pooling, otherwise as in the paper.

    He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        widths = (64, 128, 256, 512)
        blocks: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            blocks += [_Block(before, width, 1 if stage == 0 else 2), _Block(width, width, 1)]
            before = width
        self.stem = nn.Sequential(
            _convolution(3, widths[0], 1), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of [S, 3, 32, 32] images."""
        features: Tensor = self.blocks(self.stem(images))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            _convolution(before, width, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _convolution(width, width, 1),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.main(images) + self.shortcut(images))


def _convolution(before: int, width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, stride, padding=1, bias=False)


class Workload(NamedTuple):
    """A network and the size of its usual data."""

    name: str
    model: Callable[[], nn.Module]
    image: tuple[int, int, int]
    batch: int
    num_samples: int


#: The workloads for each kind of device.
WORKLOADS = {
    "cpu": (Workload("Fashion-MNIST CNN", fashion_mnist_cnn, (1, 28, 28), 128, 60_000),),
    "cuda": (
        Workload("Fashion-MNIST CNN", fashion_mnist_cnn, (1, 28, 28), 128, 60_000),
        Workload("ResNet-18", ResNet18, (3, 32, 32), 128, 50_000),
        Workload("ResNet-18", ResNet18, (3, 32, 32), 512, 50_000),
    ),
}
