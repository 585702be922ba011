"""An absent optional dependency raises one error that says what to install."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from emp_fast import Selection, load_checkpoint, plots, save_checkpoint
from emp_fast._optional import needs
from emp_fast.demo import datasets
from emp_fast.selection import load_dataset


@pytest.mark.parametrize(
    ("modules", "act", "message"),
    [
        (
            ["pyarrow.parquet"],
            lambda path: Selection(torch.arange(2), None).save(path / "kept.parquet"),
            r"a \.parquet file needs pyarrow, .*'emp_fast\[parquet\]'",
        ),
        (
            ["pyarrow.parquet"],
            lambda path: Selection.load(path / "kept.parquet"),
            "needs pyarrow",
        ),
        (
            ["safetensors", "safetensors.torch"],
            lambda path: save_checkpoint(path / "run.safetensors", step=1),
            r"a \.safetensors file needs safetensors, .*'emp_fast\[safetensors\]'",
        ),
        (
            ["safetensors"],
            lambda path: load_checkpoint(path / "run.safetensors"),
            "needs safetensors",
        ),
        (
            ["datasets"],
            load_dataset,
            r"a Hugging Face data set needs datasets, .*'emp_fast\[datasets\]'",
        ),
        (
            ["matplotlib", "matplotlib.figure"],
            lambda path: plots.selection_figure([1.0, 2.0], [1, 1], [1]),
            r"a plot needs matplotlib, .*'emp_fast\[plot\]'",
        ),
        (
            ["sklearn", "sklearn.datasets"],
            lambda path: datasets.load("digits"),
            r"the data set digits needs scikit-learn, .*'emp_fast\[demo\]'",
        ),
    ],
)
def test_the_error_says_what_to_install(
    modules: list[str],
    act: Callable[[Path], object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=message):
        act(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_library_that_lacks_its_own_dependency_is_not_called_absent() -> None:
    with (
        pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'"),
        needs("this", "library", extra="extra"),
    ):
        importlib.import_module("no_such_module")
