"""Reads the demo's images: scikit-learn's digits, Fashion-MNIST (IDX files), CIFAR-10 and -100.

Nothing is downloaded. Every reader validates its files, and errors name the file.
"""

from __future__ import annotations

import gzip
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emp_fast._optional import needs

__all__ = ["DATASETS", "ImageData", "load"]

#: Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")
_DIGITS_TEST = 449  # a quarter of the 1797 images


class ImageData(NamedTuple):
    """A classification data set, standardised by the mean and deviation of its training images."""

    name: str
    train_images: Tensor  # [N, channels, height, width] float32
    train_labels: Tensor  # [N] int64
    test_images: Tensor  # [M, channels, height, width] float32
    test_labels: Tensor  # [M] int64
    num_classes: int


def load(name: str, root: Path | None = None) -> ImageData:
    """Reads the data set of that name.

    Args:
        name: one of ``DATASETS``.
        root: the folder of its files. The default for Fashion-MNIST is where Debian installs it;
            digits come with scikit-learn and take no root.

    Raises:
        ValueError: the name is unknown, the root is missing or not wanted, or a file is malformed.
        FileNotFoundError: a file is not there.
        ModuleNotFoundError: digits without scikit-learn.
    """
    if name not in DATASETS:
        raise ValueError(f"data must be one of {list(DATASETS)}, got {name!r}")
    return DATASETS[name](root)


# ---- digits -------------------------------------------------------------------------------------


def _digits(root: Path | None) -> ImageData:
    if root is not None:
        raise ValueError(f"digits come with scikit-learn and take no root, got {str(root)!r}")
    with needs("the data set digits", "scikit-learn", extra="demo", module="sklearn"):
        from sklearn.datasets import load_digits
    bunch = load_digits()
    images = np.asarray(bunch.images, dtype=np.float32)[:, None]
    labels = np.asarray(bunch.target, dtype=np.int64)
    # The file is ordered by writer; shuffle, so that no writer occurs only in the test set.
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    return _standardised("digits", images[train], labels[train], images[test], labels[test], 10)


# ---- Fashion-MNIST ------------------------------------------------------------------------------


def _fashion_mnist(root: Path | None) -> ImageData:
    folder = FASHION_MNIST_ROOT if root is None else root
    if not folder.is_dir():
        hint = (
            "; install Debian's package dataset-fashion-mnist, or name the folder of the IDX files "
            "with --root"
            if root is None
            else ""
        )
        raise FileNotFoundError(f"no folder {folder}{hint}")
    train, train_labels = _idx_pair(folder, "train")
    test, test_labels = _idx_pair(folder, "t10k")
    return _standardised("fashion-mnist", train, train_labels, test, test_labels, 10)


def _idx_pair(folder: Path, part: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    image_file = _idx_file(folder, f"{part}-images-idx3-ubyte")
    images = read_idx(image_file, dimensions=3)
    if images.shape[1:] != (28, 28):  # those of another data set in the same format
        raise ValueError(
            f"{image_file} must hold images of 28 x 28 pixels, got shape {list(images.shape)}"
        )
    label_file = _idx_file(folder, f"{part}-labels-idx1-ubyte")
    labels = read_idx(label_file, dimensions=1)
    _require_labels(label_file, labels, len(images), 10)
    return images[:, None].astype(np.float32), labels.astype(np.int64)


def _idx_file(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"neither {name} nor {name}.gz is in {folder}")


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Reads an IDX file of unsigned bytes, gzipped or not (judged by its first bytes).

    Format: http://yann.lecun.com/exdb/mnist/: two zero bytes, the type (0x08), the number of
    dimensions, then each size as a big-endian uint32, then the data.

    Raises:
        ValueError: it is not such a file, or it is truncated.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(
            f"{path} is not an IDX file of {dimensions}-dimensional unsigned bytes, "
            f"it starts with {content[:4].hex() or 'nothing'}"
        )
    sizes = struct.unpack_from(f">{dimensions}I", content, 4)
    if len(content) - header != math.prod(sizes):
        raise ValueError(
            f"{path} promises {'x'.join(map(str, sizes))} bytes and holds {len(content) - header}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


# ---- CIFAR --------------------------------------------------------------------------------------


class _Cifar(NamedTuple):
    """The layout of one of the two data sets in the python version of its archive."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    num_classes: int


_CIFAR10 = _Cifar(
    "cifar10",
    "cifar-10-batches-py",
    tuple(f"data_batch_{part}" for part in range(1, 6)),
    "test_batch",
    b"labels",
    10,
)
_CIFAR100 = _Cifar("cifar100", "cifar-100-python", ("train",), "test", b"fine_labels", 100)


def _cifar(layout: _Cifar) -> Callable[[Path | None], ImageData]:
    def read(root: Path | None) -> ImageData:
        if root is None:
            raise ValueError(
                f"{layout.name} needs --root, the folder that holds {layout.folder} (the python "
                "version of https://www.cs.toronto.edu/~kriz/cifar.html)"
            )
        folder = root / layout.folder if (root / layout.folder).is_dir() else root
        parts = [read_cifar_batch(folder / file, layout) for file in layout.train]
        train = np.concatenate([images for images, _ in parts])
        train_labels = np.concatenate([labels for _, labels in parts])
        test, test_labels = read_cifar_batch(folder / layout.test, layout)
        return _standardised(
            layout.name, train, train_labels, test, test_labels, layout.num_classes
        )

    return read


def read_cifar_batch(path: Path, layout: _Cifar) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Reads one batch: images [n, 3, 32, 32] in 0..255 and labels [n].

    The format is a pickle, which could run any code; only what a NumPy array needs is allowed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a CIFAR batch.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file).load()
        images = np.asarray(batch[b"data"])
        labels = np.asarray(batch[layout.labels])
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(
            f"{path} is not a batch of {layout.name}: {type(error).__name__}: {error}"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3 * 32 * 32:
        raise ValueError(
            f"{path} must hold uint8 images of shape [n, 3072], "
            f"got {images.dtype} of shape {list(images.shape)}"
        )
    _require_labels(path, labels, len(images), layout.num_classes)
    return images.reshape(-1, 3, 32, 32).astype(np.float32), labels.astype(np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds dicts, lists, numbers and numpy arrays; refuses every other class or function."""

    # The files name NumPy's module at the time of writing; the function is that of today.
    _ALLOWED: dict[tuple[str, str], Any] = {  # noqa: RUF012 - constant
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which is refused") from None


def _latin1(text: str, encoding: object) -> bytes:
    """How Python 3 writes bytes in the old pickle protocols."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it wants the codec {encoding!r}, which is refused")
    return text.encode("latin1")


# ---- common -------------------------------------------------------------------------------------


def _require_labels(path: Path, labels: NDArray[Any], number: int, num_classes: int) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != number:
        raise ValueError(
            f"{path} must hold {number} integer labels, "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )
    if len(labels) == 0:
        raise ValueError(f"{path} holds no samples")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{path} must hold labels in [0, {num_classes}), got {labels.min()} to {labels.max()}"
        )


def _standardised(
    name: str,
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    test_labels: NDArray[np.int64],
    num_classes: int,
) -> ImageData:
    mean = train.mean(axis=(0, 2, 3), keepdims=True)
    deviation = train.std(axis=(0, 2, 3), keepdims=True) + 1e-6
    return ImageData(
        name,
        torch.from_numpy((train - mean) / deviation),
        torch.from_numpy(train_labels),
        torch.from_numpy((test - mean) / deviation),
        torch.from_numpy(test_labels),
        num_classes,
    )


DATASETS: dict[str, Callable[[Path | None], ImageData]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar(_CIFAR10),
    "cifar100": _cifar(_CIFAR100),
}
