"""`Selection` on disk: what is saved is loaded, and nothing is lost or half written."""

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from emp_fast import EmpFastWarning, FileProblem, ScoreStore, Selection
from emp_fast.files import write_atomically
from emp_fast.policies import BelowMean
from emp_fast.rules import Loss


@pytest.fixture
def weighted() -> Selection:
    store = ScoreStore(100, Loss())
    store.update(torch.arange(100), {"loss": torch.arange(100.0)})
    return store.select(None, BelowMean(0.5))


@pytest.fixture
def plain(weighted) -> Selection:
    return weighted._replace(weights=None)


@pytest.fixture
def hugging_face():
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"x": list(range(0, 200, 2))})


def needs_library_of(suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_what_is_saved_is_loaded(tmp_path, plain, suffix):
    needs_library_of(suffix)
    plain.save(tmp_path / f"kept{suffix}")
    loaded = Selection.load(str(tmp_path / f"kept{suffix}"))
    assert loaded.indices.dtype == torch.int64
    assert torch.equal(loaded.indices, plain.indices)
    assert loaded.weights is None
    subset = Subset(range(100), loaded.indices)
    assert [subset[i] for i in range(len(subset))] == plain.indices.tolist()


def test_parquet_keeps_the_weights(tmp_path, weighted):
    needs_library_of(".parquet")
    weighted.save(tmp_path / "kept.parquet")
    loaded = Selection.load(tmp_path / "kept.parquet")
    assert torch.equal(loaded.indices, weighted.indices)
    assert loaded.weights.dtype == torch.float32
    assert torch.equal(loaded.weights, weighted.weights)
    assert set(loaded.weights.tolist()) == {1.0, 2.0}


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".txt"])
def test_a_full_disk_is_named_and_leaves_the_previous_file(tmp_path, full_disk, plain, suffix):
    needs_library_of(suffix)
    path = tmp_path / f"kept{suffix}"
    plain.save(path)
    before = path.read_bytes()
    large = Selection(torch.arange(100_000), None)
    with full_disk(), pytest.raises(FileProblem) as told:
        large.save(path, overwrite=True)
    assert str(told.value) == f"cannot write {path}: {os.strerror(errno.EFBIG)}"
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_npy_file_is_that_of_numpy(tmp_path, plain):
    plain.save(tmp_path / "ours.npy")
    np.save(tmp_path / "theirs.npy", plain.indices.numpy())
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


@pytest.mark.parametrize("suffix", [".npy", ".txt"])
def test_formats_without_weights_say_so(tmp_path, weighted, suffix):
    with pytest.warns(EmpFastWarning, match=rf"weights, which {suffix} cannot hold"):
        weighted.save(tmp_path / f"kept{suffix}")
    read = np.load if suffix == ".npy" else np.loadtxt
    assert read(tmp_path / f"kept{suffix}").tolist() == weighted.indices.tolist()


def test_an_existing_file_is_replaced_on_request_alone(tmp_path, plain):
    path = tmp_path / "kept.npy"
    path.write_bytes(b"precious")
    with pytest.raises(FileProblem, match=r"kept\.npy exists already; overwrite replaces it"):
        plain.save(path)
    assert path.read_bytes() == b"precious"
    plain.save(path, overwrite=True)
    assert torch.equal(Selection.load(path).indices, plain.indices)


def test_a_file_made_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "kept.npy"
    with pytest.raises(FileProblem, match=r"kept\.npy exists already; overwrite replaces it"):
        write_atomically(path, lambda _: path.write_bytes(b"precious"), overwrite=False)
    assert path.read_bytes() == b"precious"
    assert [file.name for file in tmp_path.iterdir()] == ["kept.npy"]


def test_a_new_file_needs_no_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    write_atomically(tmp_path / "kept.npy", lambda file: file.write(b"ours"), overwrite=False)
    assert (tmp_path / "kept.npy").read_bytes() == b"ours"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1, 1, 2]), "ascending int64"),
        (np.array([2, 1]), "ascending int64"),
        (np.array([-1, 2]), "ascending int64"),
        (np.array([1.0, 2.0]), "ascending int64 indices, got 2 of dtype float64"),
        (np.zeros((2, 2), dtype=np.int64), r"vector \[N\]"),
        (np.zeros(0, dtype=np.int64), "is empty"),
    ],
)
def test_a_file_of_anything_else_is_refused(tmp_path, array, message):
    np.save(tmp_path / "kept.npy", array)
    with pytest.raises(FileProblem, match=message):
        Selection.load(tmp_path / "kept.npy")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    needs_library_of(".parquet")
    Selection(torch.arange(2), torch.tensor([1.0, torch.nan])).save(tmp_path / "kept.parquet")
    with pytest.raises(FileProblem, match="finite float32 weights, got nan"):
        Selection.load(tmp_path / "kept.parquet")


@pytest.mark.parametrize("name", ["kept.csv", "nowhere/kept.npy", "kept"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, plain, name):
    with pytest.raises(FileProblem, match=name):
        plain.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# ---- Hugging Face data sets ---------------------------------------------------------------------


def test_export_selects_from_a_data_set(hugging_face, plain):
    kept = plain.export(hugging_face)
    assert kept["x"][:] == (2 * plain.indices).tolist()
    assert kept.column_names == ["x"]
    assert len(hugging_face) == 100


def test_export_carries_the_weights(hugging_face, weighted):
    kept = weighted.export(hugging_face)
    assert kept["x"][:] == (2 * weighted.indices).tolist()
    assert kept["weight"][:] == weighted.weights.tolist()
    with pytest.raises(ValueError, match="must not have a column 'weight'"):
        weighted.export(hugging_face.add_column("weight", [0] * 100))


def test_export_saves_to_disk_whole_or_not_at_all(tmp_path, hugging_face, plain, monkeypatch):
    datasets = pytest.importorskip("datasets")
    hugging_face.save_to_disk(tmp_path / "whole")
    plain.export(tmp_path / "whole", tmp_path / "part")
    wanted = (2 * plain.indices).tolist()
    assert datasets.load_from_disk(tmp_path / "part")["x"][:] == wanted
    with pytest.raises(FileProblem, match="part exists already"):
        plain.export(hugging_face, tmp_path / "part")
    with pytest.raises(FileProblem, match=r"cannot write .*: File name too long"):
        plain.export(hugging_face, tmp_path / ("n" * 300))
    fewer = plain._replace(indices=plain.indices[:3])
    fewer.export(hugging_face, tmp_path / "part", overwrite=True)
    assert datasets.load_from_disk(tmp_path / "part")["x"][:] == wanted[:3]

    def fail(self, path, **_):
        assert path.parent.parent == tmp_path  # no rename crosses file systems
        path.mkdir()
        (path / "half").write_bytes(b"")
        raise OSError(28, "No space left on device")

    rename = Path.rename

    def rename_old_alone(self, target):
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    for owner, name, broken in (
        (datasets.Dataset, "save_to_disk", fail),
        (Path, "rename", rename_old_alone),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(FileProblem, match="part: No space"):
                plain.export(hugging_face, tmp_path / "part", overwrite=True)
        assert datasets.load_from_disk(tmp_path / "part")["x"][:] == wanted[:3]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "whole"]


def test_export_does_not_replace_what_it_selects_from(tmp_path, hugging_face, plain):
    datasets = pytest.importorskip("datasets")
    whole = tmp_path / "whole"
    hugging_face.save_to_disk(whole)
    (tmp_path / "link").symlink_to(whole)
    read = datasets.load_from_disk(whole)
    for dataset, path in (
        (whole, whole),
        (str(whole), tmp_path / "link"),
        (tmp_path / "link", whole),
        (read, whole),
        (read.select(range(99, -1, -1)), tmp_path / "link"),
    ):
        with pytest.raises(FileProblem, match=rf"cannot replace {path}: it holds the data set"):
            plain.export(dataset, path, overwrite=True)
    assert len(datasets.load_from_disk(whole)) == 100
    plain.export(whole, tmp_path / "part")
    plain.export(read, tmp_path / "part", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "part", "whole"]


def test_export_replaces_no_other_folder(tmp_path, hugging_face, plain):
    (tmp_path / "kept.txt").write_text("precious")
    with pytest.raises(FileProblem, match="a folder of other things than a data set"):
        plain.export(hugging_face, tmp_path, overwrite=True)
    assert (tmp_path / "kept.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    plain.export(hugging_face, tmp_path / "empty", overwrite=True)


def test_export_refuses_what_is_no_such_data_set(tmp_path, hugging_face, plain, monkeypatch):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(TypeError, match=r"must be a datasets.Dataset, one split, got list"):
        plain.export([1, 2, 3])
    with pytest.raises(TypeError, match="got DatasetDict"):
        plain.export(datasets.DatasetDict(train=hugging_face))
    with pytest.raises(ValueError, match="at least 100, got 50"):
        plain.export(hugging_face.select(range(50)))
    with pytest.raises(FileProblem, match="nowhere is not a data set that was saved to disk"):
        plain.export(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'emp_fast\[datasets\]'"):
        plain.export(hugging_face)
