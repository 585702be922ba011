"""The demo's networks: small enough for two CPU cores."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["digits_mlp", "fashion_mnist_cnn", "for_data", "small_resnet"]


def for_data(name: str, num_classes: int) -> nn.Module:
    """The network that the demo trains on the data set of that name, freshly initialised."""
    if name == "digits":
        return digits_mlp(num_classes)
    if name == "fashion-mnist":
        return fashion_mnist_cnn(num_classes)
    return small_resnet(num_classes)


def digits_mlp(num_classes: int = 10) -> nn.Sequential:
    """Two hidden layers for 1 x 8 x 8 images."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def fashion_mnist_cnn(num_classes: int = 10) -> nn.Sequential:
    """Two convolutions and one hidden layer for 1 x 28 x 28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def small_resnet(num_classes: int) -> nn.Sequential:
    """Three stages of one residual block each for 3 x 32 x 32 images."""
    return nn.Sequential(
        *_convolution(3, 32),
        _Residual(32),
        *_convolution(32, 64),
        nn.MaxPool2d(2),
        _Residual(64),
        *_convolution(64, 128),
        nn.MaxPool2d(2),
        _Residual(128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, num_classes),
    )


class _Residual(nn.Module):
    """``x + convolutions(x)`` (He et al., arXiv 1512.03385)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(channels, channels), *_convolution(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.convolutions(x)
        return x + added


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]
