"""torch's own internals, and what stands in for them: both give the same answers."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emp_fast import _torch_internals as internals
from emp_fast import functional

ROOT = Path(__file__).parents[1]

#: Names under torch that `_torch_internals` looks up, and those that a torch without CUDA lacks.
ASKED = {
    "_C._get_tracing_state": torch.jit.is_tracing,
    "_C._len_torch_dispatch_stack": internals._assume_active,
    "_C._functorch.peek_interpreter_stack": internals._assume_active,
    "_C._autograd._profiler_enabled": internals._assume_active,
}


def test_no_other_module_names_them() -> None:
    private = re.compile(r"\btorch\._C|from torch\._|forward_ad\._")
    for file in sorted((ROOT / "emp_fast").rglob("*.py")):
        if file.name != "_torch_internals.py":
            assert not private.search(file.read_text()), file


@pytest.mark.parametrize("name", ASKED)
def test_this_torch_has_them(name: str) -> None:
    """Else every batch would take the longer way."""
    assert internals._torch_or(name, ASKED[name]) is not ASKED[name]


def test_a_name_that_torch_lacks_is_replaced() -> None:
    assert internals._torch_or("_C._no_such_thing", torch.jit.is_tracing) is torch.jit.is_tracing


class Quiet(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_each_says_who_looks_on() -> None:
    def seen() -> list[bool]:
        asked = (
            internals.count_dispatch_modes,
            internals.innermost_transform,
            internals.tracing_state,
            internals.is_profiled,
        )
        return [bool(ask()) for ask in asked]

    answers: list[list[bool]] = []

    def asking(x: Tensor) -> Tensor:
        answers.append(seen())
        return x + 1

    asking(torch.ones(2))
    with Quiet():
        asking(torch.ones(2))
    torch.func.vmap(asking)(torch.ones(2))
    torch.jit.trace(asking, torch.ones(2), check_trace=False)
    with torch.autograd.profiler.profile():
        asking(torch.ones(2))
    assert answers == [
        [False, False, False, False],
        [True, False, False, False],
        [False, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]
    with torch.autograd.forward_ad.dual_level():
        assert internals.forward_level() >= 0
    assert internals.forward_level() < 0


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`ops` and `functional` on a torch that has none of it."""
    monkeypatch.setattr(internals.operator, "attrgetter", _lacking)
    replaced = importlib.reload(internals)
    own = [module for name, module in sys.modules.items() if name.startswith("emp_fast.ops.")]
    for module in (functional, *own):
        for name in internals.__all__:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(replaced, name))
    monkeypatch.setattr(functional, "forward_level", lambda: 0)
    yield replaced
    monkeypatch.undo()
    importlib.reload(internals)


def _lacking(name: str) -> object:
    def get(_: object) -> object:
        raise AttributeError(name)

    return get


def test_without_them_the_results_are_the_same(stand_ins: ModuleType) -> None:
    assert stand_ins.count_dispatch_modes()
    assert stand_ins.innermost_transform()
    logits = torch.randn(7, 5, requires_grad=True)
    target = torch.arange(7) % 5
    stats = functional.cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(stats.loss.sum(), logits)
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    (wanted,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(stats.loss, loss)
    torch.testing.assert_close(gradient, wanted)
    assert torch.equal(functional.topk_indices(stats.loss, 7), torch.arange(7))
    with pytest.raises(IndexError, match=r"target must lie in \[0, 5\)"):
        functional.cross_entropy(logits, target + 5)
