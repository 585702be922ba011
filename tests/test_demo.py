"""The demo: its file readers on files made here, and its one budget for every method."""

from __future__ import annotations

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch

from emp_fast.demo import training
from emp_fast.demo.comparison import compare
from emp_fast.demo.datasets import DATASETS, ImageData, load
from emp_fast.demo.models import for_data
from emp_fast.demo.training import METHODS, Settings, train

# ---- datasets -----------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (13, 28, 28)),
        "train-labels-idx1-ubyte": np.arange(13) % 10,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (5, 28, 28)),
        "t10k-labels-idx1-ubyte": np.arange(5),
    }
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path, arrays


def check_images(tensor, raw, train_raw):
    """``tensor`` is ``raw`` standardised by the channels' mean and deviation over ``train_raw``."""
    mean = train_raw.mean((0, 2, 3), keepdims=True)
    deviation = train_raw.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(tensor.numpy(), (raw - mean) / deviation, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gzipped", [False, True])
def test_fashion_mnist_reads_idx_files_gzipped_or_not(fashion, gzipped):
    root, arrays = fashion
    if gzipped:
        for name in arrays:
            (root / f"{name}.gz").write_bytes(gzip.compress((root / name).read_bytes()))
            (root / name).unlink()
    data = load("fashion-mnist", root)
    train_raw = arrays["train-images-idx3-ubyte"][:, None]
    check_images(data.train_images, train_raw, train_raw)
    check_images(data.test_images, arrays["t10k-images-idx3-ubyte"][:, None], train_raw)
    assert data.train_labels.tolist() == arrays["train-labels-idx1-ubyte"].tolist()
    assert data.test_labels.tolist() == [0, 1, 2, 3, 4]
    assert data.train_labels.dtype == torch.int64
    assert for_data(data.name, data.num_classes)(data.test_images).shape == (5, 10)


def test_fashion_mnist_refuses_damaged_files(fashion):
    root, _ = fashion
    labels = root / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for content, message in (
        (whole[:-1], "promises 13 bytes and holds 12"),
        (whole + b"\0", "promises 13 bytes and holds 14"),
        (b"", "starts with nothing"),
        (b"\0\0\x0d\x01" + whole[4:], "not an IDX file"),
        (gzip.compress(whole)[:-9], "damaged gzip"),
        (idx(np.full(13, 10)), r"labels in \[0, 10\), got 10 to 10"),
        (idx(np.arange(9)), "must hold 13 integer labels"),
    ):
        labels.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load("fashion-mnist", root)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=f"neither {labels.name} nor {labels.name}.gz"):
        load("fashion-mnist", root)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load("fashion-mnist", root / "nowhere")


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_fashion_mnist_refuses_images_of_another_size(fashion, part):
    root, arrays = fashion
    name = f"{part}-images-idx3-ubyte"
    (root / name).write_bytes(idx(arrays[name][:, :20, :20]))
    message = rf"{name} must hold images of 28 x 28 pixels, got shape \[{len(arrays[name])}, 20, 20"
    with pytest.raises(ValueError, match=message):
        load("fashion-mnist", root)


def cifar_batch(path, images, labels, key, protocol=2):
    path.parent.mkdir(exist_ok=True)
    batch = {b"data": images, key: labels, b"batch_label": b"part", b"filenames": [b"a.png"]}
    path.write_bytes(pickle.dumps(batch, protocol=protocol))


@pytest.fixture
def cifar10(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (4, 3072), dtype=np.uint8) for _ in range(6)]
    folder = tmp_path / "cifar-10-batches-py"
    names = [f"data_batch_{part}" for part in range(1, 6)] + ["test_batch"]
    for number, (name, images) in enumerate(zip(names, parts, strict=True)):
        labels = [(number + sample) % 10 for sample in range(4)]
        cifar_batch(folder / name, images, labels, b"labels", protocol=number % 3)
    return tmp_path, parts


def test_cifar10_reads_the_python_batches(cifar10):
    root, parts = cifar10
    train_raw = np.concatenate(parts[:5]).reshape(-1, 3, 32, 32)
    for given in (root, root / "cifar-10-batches-py"):
        data = load("cifar10", given)
        check_images(data.train_images, train_raw, train_raw)
        check_images(data.test_images, parts[5].reshape(-1, 3, 32, 32), train_raw)
        assert data.train_labels.tolist() == [(b + s) % 10 for b in range(5) for s in range(4)]
    assert for_data(data.name, data.num_classes)(data.test_images).shape == (4, 10)


def test_cifar100_reads_the_fine_labels(tmp_path):
    rng = np.random.default_rng(0)
    for name, labels in (("train", [99, 0, 7]), ("test", [1, 2, 3])):
        images = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
        cifar_batch(tmp_path / name, images, labels, b"fine_labels")
    data = load("cifar100", tmp_path)
    assert data.train_labels.tolist() == [99, 0, 7]
    assert data.num_classes == 100


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_never_runs_what_a_pickle_asks_for(cifar10, protocol):
    root, _ = cifar10
    trace = root / "ran"
    batch = {b"data": Malicious(str(trace)), b"labels": [0]}
    (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(batch, protocol))
    with pytest.raises(ValueError, match=r"data_batch_3 is not a batch.*open, which is refused"):
        load("cifar10", root)
    assert not trace.exists()


def test_cifar_refuses_damaged_batches(cifar10):
    root, parts = cifar10
    path = root / "cifar-10-batches-py" / "test_batch"
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is not a batch of cifar10"),
        (b"", "EOFError"),
        (pickle.dumps([1, 2]), "is not a batch of cifar10"),
        (pickle.dumps({b"labels": [0]}), "KeyError"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load("cifar10", root)
    for images, labels, message in (
        (parts[5][:, :-1], [0, 1, 2, 3], r"uint8 images of shape \[n, 3072\], got uint8"),
        (parts[5].astype(np.float32), [0, 1, 2, 3], "got float32"),
        (parts[5], [0, 1, 2], "must hold 4 integer labels"),
        (parts[5], [0, 1, 2, 10], r"labels in \[0, 10\), got 0 to 10"),
        (parts[5][:0], [], "integer labels"),
    ):
        cifar_batch(path, images, labels, b"labels", protocol=3)
        with pytest.raises(ValueError, match=message):
            load("cifar10", root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*test_batch"):
        load("cifar10", root)


def test_digits_are_split_without_overlap():
    pytest.importorskip("sklearn")
    data = load("digits")
    assert data.train_images.shape == (1348, 1, 8, 8)
    assert data.test_images.shape == (449, 1, 8, 8)
    assert sorted(set(data.test_labels.tolist())) == list(range(10))
    assert torch.equal(load("digits").train_images, data.train_images)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_needs_a_root(name):
    with pytest.raises(ValueError, match=f"{name} needs --root"):
        load(name)


def test_unknown_data_and_unwanted_root_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data must be one of .*, got 'imagenet'"):
        load("imagenet")
    with pytest.raises(ValueError, match="digits come with scikit-learn and take no root"):
        load("digits", tmp_path)
    assert set(DATASETS) == {"digits", "fashion-mnist", "cifar10", "cifar100"}


# ---- training -----------------------------------------------------------------------------------


@pytest.fixture
def tiny() -> ImageData:
    """101 training images of ten classes that a network can tell apart."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 1, 8, 8, generator=generator)
    labels = torch.arange(141) % 10
    images = centres[labels] + 0.3 * torch.randn(141, 1, 8, 8, generator=generator)
    return ImageData("digits", images[:101], labels[:101], images[101:], labels[101:], 10)


SETTINGS = Settings(
    prune_rate=0.7,
    epochs=7,
    batch_size=8,
    learning_rate=0.05,
    tests=4,
    device=torch.device("cpu"),
)
BUDGET = 7 * 30  # round(0.3 * 101) = 30


@pytest.mark.parametrize("name", METHODS)
def test_every_method_sees_exactly_the_budget(tiny, name):
    seen = []
    run = train(tiny, METHODS[name], SETTINGS, seed=1, progress=seen.append)
    assert SETTINGS.budget(101) == BUDGET
    assert run.samples_seen == BUDGET
    assert int(run.visits.sum()) == BUDGET
    assert seen[-1] == BUDGET
    assert len(seen) == run.steps == len(run.loss_seconds)
    assert [point for point, _ in run.accuracy][-1] == BUDGET
    assert len(run.accuracy) == SETTINGS.tests
    assert all(0 <= value <= 1 for _, value in run.accuracy)
    if name == "full":
        assert run.scores is None
        assert run.visits.min() >= BUDGET // 101
        assert run.visits.max() <= -(-BUDGET // 101)
    elif name != "infobatch":
        assert run.epochs == 7
        assert run.kept.numel() == 30


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_reproducible_and_depends_on_its_seed(tiny, name):
    method = METHODS[name]
    torch.manual_seed(123)  # the global generator has no say
    first = train(tiny, method, SETTINGS, seed=1)
    again = train(tiny, method, SETTINGS, seed=1)
    other = train(tiny, method, SETTINGS, seed=2)
    assert torch.equal(first.visits, again.visits)
    assert first.accuracy == again.accuracy
    assert not torch.equal(first.visits, other.visits)


def test_training_learns(tiny):
    run = train(tiny, METHODS["emp"], SETTINGS._replace(epochs=20), seed=0)
    assert run.accuracy[-1][1] > 0.9


def test_training_leaves_the_global_generators_alone(tiny, monkeypatch):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    train(tiny, METHODS["full"], SETTINGS, seed=0)
    assert torch.equal(torch.rand(3), wanted)
    assert seeded == []


def test_a_budget_below_one_batch_and_one_epoch(tiny):
    settings = SETTINGS._replace(epochs=1, batch_size=64, prune_rate=0.98, tests=12)
    for name in METHODS:
        run = train(tiny, METHODS[name], settings, seed=0)
        assert run.samples_seen == int(run.visits.sum()) == 2
        assert len(run.accuracy) == 12


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [training._schedule(step / 100) for step in range(101)]
    assert rates[0] == 0
    assert max(rates) == rates[20] == 1
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)


# ---- comparison ---------------------------------------------------------------------------------


def test_compare_summarises_what_was_measured(tiny):
    heard = []
    comparison = compare(
        tiny, SETTINGS, ["full", "emp", "infobatch"], range(2), lambda *step: heard.append(step)
    )
    summaries = {summary.name: summary for summary in comparison.summaries()}
    assert list(summaries) == ["full", "emp", "infobatch"]
    assert {(name, seed) for name, seed, _ in heard} == {
        (name, seed) for name in summaries for seed in (0, 1)
    }
    for name, summary in summaries.items():
        finals = [run.accuracy[-1][1] for run in comparison.runs[name]]
        assert summary.accuracies == finals
        assert summary.accuracy_mean == pytest.approx(np.mean(finals))
        assert summary.accuracy_std == pytest.approx(np.std(finals, ddof=1))
        assert summary.samples_seen == BUDGET
        assert summary.train_seconds > 0
    assert summaries["full"].overhead_percent is None
    emp = comparison.runs["emp"]
    plain = np.median([s for run in comparison.runs["full"] for s in run.loss_seconds])
    step = np.median([s for run in emp for s in run.loss_seconds])
    extra = sum((step - plain) * run.steps + run.selection_seconds for run in emp)
    assert summaries["emp"].overhead_percent == pytest.approx(
        100 * extra / sum(run.train_seconds for run in emp)
    )


def test_one_seed_has_no_deviation_and_no_plain_loop_no_overhead(tiny):
    (summary,) = compare(tiny, SETTINGS, ["emp"], [3]).summaries()
    assert summary.accuracy_std is None
    assert summary.overhead_percent is None


def test_the_comparison_is_drawn(tiny):
    pytest.importorskip("matplotlib")
    figure = compare(tiny, SETTINGS, ["full", "random", "emp"], range(2)).figure()
    accuracy, visits, scores = figure.axes
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == [
        "full data",
        "random",
        "EMP",
    ]
    assert len(accuracy.lines) == len(visits.lines) == 3
    assert scores.get_title(loc="left") == "Score distribution: EMP, seed 0"
    assert len(compare(tiny, SETTINGS, ["full"], [0]).figure().axes) == 2
