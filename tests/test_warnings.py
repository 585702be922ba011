"""A warning names the line of the user's code that led to it, however deep it is issued."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from emp_fast import EmpFastWarning, Pruner, ScoreStore, Selection, score_dataset, with_indices
from emp_fast.rules import Loss

N = 8


def spoil(store: ScoreStore) -> None:
    store.update(torch.arange(1), {"loss": torch.tensor([torch.nan])})


def select(folder: Path) -> None:
    store = ScoreStore(N, Loss())
    spoil(store)
    store.select(4)  # warns


def loop(folder: Path) -> None:
    pruner = Pruner(N, rule=Loss())
    loader = DataLoader(with_indices(list(range(N))), batch_size=4, sampler=pruner.sampler)
    spoil(pruner.store)
    for _ in loader:  # warns
        pass


def stats(folder: Path) -> None:
    pruner = Pruner(N, rule=Loss())
    for _ in range(3):
        pruner.store.update(torch.arange(N), {"loss": torch.ones(N)})
    pruner.stats()  # warns


def save(folder: Path) -> None:
    Selection(torch.arange(2), torch.ones(2)).save(folder / "kept.txt")  # warns


def score(folder: Path) -> None:
    samples = [(torch.full((3,), torch.nan), i % 3) for i in range(N)]
    loader = DataLoader(with_indices(samples), batch_size=4)
    score_dataset(lambda x: x, loader, output=folder / "scores.npy", progress=False)  # warns


@pytest.mark.parametrize("act", [select, loop, stats, save, score])
def test_a_warning_names_the_line_of_the_user(act: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.warns(EmpFastWarning) as caught:
        act(tmp_path)
    lines, first = inspect.getsourcelines(act)
    expected = [first + at for at, line in enumerate(lines) if line.endswith("# warns\n")]
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, expected[0])]
