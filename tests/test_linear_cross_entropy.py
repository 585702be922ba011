"""`linear_cross_entropy` against the float64 oracle of logits composed in float64."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from serving import require
from test_functional import assert_stats, incoming
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from watching import LargestTensor

from emp_fast import SampleStats, functional
from emp_fast.functional import cross_entropy, linear_cross_entropy
from emp_fast.testing import Case, make, oracle

E = 8


@dataclasses.dataclass
class Inputs:
    """One call and what it is held against."""

    hidden: Tensor
    classifier: Tensor
    bias: Tensor | None
    target: Tensor
    options: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.classifier, self.bias) if x is not None]

    def run(self) -> SampleStats:
        return linear_cross_entropy(
            self.hidden, self.classifier, self.target, bias=self.bias, **self.options
        )


def inputs(case: Case, bias: bool = True, exact: bool = True) -> Inputs:
    """Features and parameters of the case's shapes, dtype, target and options.

    With ``exact`` they are small multiples of 1/8: their products are exact in float32, and what
    differs from the oracle is the scoring, not the order in which a matrix product adds up.
    """
    logits, target, options = make(case)
    generator = torch.Generator().manual_seed(7)

    def made(*shape: int) -> Tensor:
        if exact:
            x = torch.randint(-12, 13, shape, generator=generator) / 8
        else:
            x = torch.randn(shape, generator=generator)
        return x.to(logits.dtype).requires_grad_()

    hidden = made(*logits.shape[:-1], E)
    return Inputs(
        hidden, made(case.classes, E), made(case.classes) if bias else None, target, options
    )


def wanted(given: Inputs, grad_loss: Tensor | None = None) -> tuple[Any, dict[str, np.ndarray]]:
    """Statistics and gradients in float64, by the chain rule from the oracle's to the logits."""
    h, w = given.hidden.detach().double(), given.classifier.detach().double()
    logits = h @ w.T + (0 if given.bias is None else given.bias.detach().double())
    stats, grad = oracle(logits, given.target, grad_loss=grad_loss, **given.options)
    rows, flat = torch.from_numpy(grad).flatten(0, -2), h.flatten(0, -2)
    grads = [(rows @ w).view(h.shape), rows.T @ flat]
    if given.bias is not None:
        grads.append(rows.sum(0))
    names = ("hidden", "classifier", "bias")[: len(grads)]
    return stats, dict(zip(names, (g.numpy() for g in grads), strict=True))


@functools.cache
def wanted_of(case: Case, bias: bool) -> tuple[Any, dict[str, np.ndarray]]:
    """`wanted` of exact inputs, for gradients that arrive as `incoming`."""
    return wanted(inputs(case, bias), incoming(case.samples))


CASES = [
    Case("linear", 9, 10),
    Case("linear_one_class", 4, 1),
    Case("linear_wide", 5, 1025),
    Case("linear_ignored", 9, 10, ignored="some"),
    Case("linear_all_ignored", 4, 10, ignored="all"),
    Case("linear_ignore_index", 9, 5, ignored="some", ignore_index=3),
    Case("linear_options", 9, 33, weighted=True, label_smoothing=0.1, softcap=3.0),
    Case("linear_soft", 7, 33, target="soft"),
    Case("linear_soft_options", 7, 33, target="soft", weighted=True, label_smoothing=0.2),
    Case("linear_sequences", 4, 10, positions=5, ignored="some"),
    Case("linear_sequences_soft", 3, 10, positions=4, target="soft"),
    Case("linear_no_positions", 3, 10, positions=0),
    Case("linear_packed", 5, 10, lengths=(3, 0, 1, 5, 4), ignored="some", weighted=True),
    Case("linear_no_samples", 0, 10),
]


@pytest.fixture(params=[None, 3], ids=["one block", "blocks of 3"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """How many rows of logits there are at a time."""
    if request.param is not None:
        monkeypatch.setattr(functional, "_BLOCK_LOGITS", _Rows(request.param))
    chosen: int | None = request.param
    return chosen


class _Rows(int):
    """An element count of so many rows, whatever the number of classes."""

    def __floordiv__(self, classes: int) -> int:
        return int(self)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(
    case: Case, bias: bool, blocks: int | None, backend: str, poison: None
) -> None:
    given = inputs(case, bias)
    got = given.run()
    stats, grads = wanted_of(case, bias)
    assert_stats(got, stats)
    found = torch.autograd.grad(got.loss, given.leaves, incoming(case.samples))
    for (name, grad), tensor in zip(grads.items(), found, strict=True):
        assert tensor.dtype == torch.float32
        # Sums of signed terms: the tolerance is relative to the largest.
        atol = 1e-6 + 1e-6 * np.abs(grad).max(initial=0.0)
        np.testing.assert_allclose(tensor.numpy(), grad, 1e-5, atol, err_msg=name)


def test_blocks_change_no_bit_of_a_row(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(Case("linear_bits", 11, 33, label_smoothing=0.1))
    whole = given.run()
    for rows in (1, 2, 5, 10, 11, 12):
        monkeypatch.setattr(functional, "_BLOCK_LOGITS", rows * 33)
        for name, a, b in zip(whole._fields, whole, given.run(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=f"{name}, {rows} rows")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types(dtype: torch.dtype, backend: str) -> None:
    """The logits are rounded to the type of the features, as a linear layer rounds them."""
    given = inputs(Case("linear_types", 9, 33, dtype=dtype), exact=False)
    got = given.run()
    h, w, b = (x.detach() for x in given.leaves)
    logits = torch.nn.functional.linear(h, w, b)
    assert_stats(got, oracle(logits, given.target)[0])
    found = torch.autograd.grad(got.loss.sum(), given.leaves)
    _, grads = wanted(given)
    for (name, grad), tensor in zip(grads.items(), found, strict=True):
        assert tensor.dtype == dtype
        scale = np.abs(grad).max()
        tolerance = {torch.float64: 1e-7, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        error = np.abs(tensor.double().numpy() - grad).max()
        assert error <= tolerance * scale, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_blocks_keep_what_each_adds(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, classes = 4096, 2
    monkeypatch.setattr(functional, "_BLOCK_LOGITS", classes)
    hidden = torch.ones(rows, 1, dtype=dtype)
    classifier = torch.zeros(classes, 1, dtype=dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=dtype, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64)
    loss = linear_cross_entropy(hidden, classifier, target, bias=bias).loss.sum()
    for grad in torch.autograd.grad(loss, (classifier, bias)):
        assert grad.dtype == dtype
        assert grad.flatten().tolist() == [-rows / 2, rows / 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_the_layer_and_the_loss(dtype: torch.dtype, backend: str) -> None:
    given = inputs(Case("linear_autocast", 9, 33), exact=False)
    with torch.autocast("cpu", dtype=dtype):
        got = given.run()
        logits = torch.nn.functional.linear(*given.leaves)
        assert logits.dtype == dtype
        composed = cross_entropy(logits, given.target)
    for a, b in zip(got, composed, strict=True):
        torch.testing.assert_close(a, b)
    found = torch.autograd.grad(got.loss.sum(), given.leaves)
    reference = torch.autograd.grad(composed.loss.sum(), given.leaves)
    for a, b in zip(found, reference, strict=True):
        assert a.dtype == torch.float32
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps * float(b.abs().max()))


def test_a_backward_pass_under_autocast_keeps_the_type_of_the_forward_pass(backend: str) -> None:
    given = inputs(Case("linear_late_autocast", 9, 33), exact=False)
    grads = []
    for enabled in (False, True):
        loss = given.run().loss.sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(loss, given.leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_backward_pass_outside_autocast_is_the_same(backend: str) -> None:
    """Training loops leave the context before ``backward``."""
    given = inputs(Case("linear_outside", 9, 33), exact=False)
    grads = []
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = given.run().loss.sum()
            if inside:
                grads.append(torch.autograd.grad(loss, given.leaves))
        if not inside:
            grads.append(torch.autograd.grad(loss, given.leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_only_the_gradients_asked_for_are_computed(backend: str) -> None:
    for wants in ((True, False, False), (False, True, False), (False, False, True)):
        given = inputs(Case("linear_some", 9, 10))
        for leaf, want in zip(given.leaves, wants, strict=True):
            leaf.requires_grad_(want)
        given.run().loss.sum().backward()
        assert [leaf.grad is not None for leaf in given.leaves] == list(wants)
    given = inputs(Case("linear_none", 9, 10))
    with torch.no_grad():
        assert not given.run().loss.requires_grad


def test_a_retained_graph_gives_the_gradient_again(backend: str) -> None:
    given = inputs(Case("linear_again", 9, 10))
    loss = given.run().loss.sum()
    first = torch.autograd.grad(loss, given.leaves, retain_graph=True)
    second = torch.autograd.grad(loss, given.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_features_and_parameters(backend: str) -> None:
    given = inputs(Case("linear_strided", 9, 10))
    wide = torch.full((9, 2 * E), torch.nan)
    wide[:, ::2] = given.hidden.detach()
    moved = linear_cross_entropy(
        wide[:, ::2],
        given.classifier.detach().T.contiguous().T,
        given.target,
        bias=given.bias.detach().repeat_interleave(2)[::2],
    )
    assert_stats(moved, wanted(given)[0])


def test_a_nan_feature_spoils_its_sample_alone(backend: str) -> None:
    given = inputs(Case("linear_nan", 9, 33))
    clean = given.run()
    with torch.no_grad():
        given.hidden[4, 2] = torch.nan
    got = given.run()
    others = torch.arange(9) != 4
    for name in ("loss", "entropy", "el2n", "margin", "confidence"):
        field = getattr(got, name)
        assert torch.isnan(field[4]), name
        assert torch.equal(field[others], getattr(clean, name)[others]), name


def test_the_logits_never_exist(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, classes, block = 60, 100, 8
    monkeypatch.setattr(functional, "_BLOCK_LOGITS", block * classes)
    given = inputs(Case("linear_memory", rows, classes))
    with LargestTensor() as seen:
        loss = given.run().loss.sum()
        torch.autograd.grad(loss, given.leaves)
    assert block * classes <= seen.elements  # it sees the blocks
    assert seen.elements <= block * classes
    monkeypatch.setattr(functional, "_BLOCK_LOGITS", rows * classes)
    with LargestTensor() as whole:
        given.run()
    assert whole.elements == rows * classes  # and would have seen the logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_does_not_grow_by_the_logits(dtype: str) -> None:
    """Memory that is freed and cannot be reused counts too, unlike in the test above."""
    require("cpu")
    script = f"""
import torch
from emp_fast.functional import linear_cross_entropy

def step(rows):
    target = torch.arange(rows)
    loss = linear_cross_entropy(hidden[:rows], classifier, target, bias=bias).loss.mean()
    torch.autograd.grad(loss, (hidden, classifier, bias))

def height():
    # Not getrusage's ru_maxrss, which begins at the height of the process that started this one.
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

torch.set_num_threads(2)
dtype = torch.{dtype}
hidden = torch.randn(8192, 64, dtype=dtype, requires_grad=True)
classifier = torch.randn(32000, 64, dtype=dtype, requires_grad=True)
bias = torch.randn(32000, dtype=dtype, requires_grad=True)
step(16)
before = height()
for _ in range(2):
    step(8192)
print((height() - before) / (8192 * 32000 * dtype.itemsize))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.5


class _LinearOnly(Tensor):
    """As quantised weights: a subclass that serves `linear` and little else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.mm, torch.addmm):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("block", [4, 9])
@pytest.mark.parametrize("name", ["classifier", "bias"])
def test_a_parameter_of_a_subclass(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_BLOCK_LOGITS", block * 33)
    given = inputs(Case("linear_subclass", 9, 33))
    parameter = getattr(given, name).detach()
    made = []
    for of_type in (parameter, parameter.as_subclass(_LinearOnly)):
        setattr(given, name, of_type)
        loss = given.run().loss
        made.append((loss, *torch.autograd.grad(loss.sum(), given.hidden)))
    torch.testing.assert_close(*([x.as_subclass(Tensor) for x in pair] for pair in made))


@pytest.mark.parametrize("block", [4, 9])
def test_gradients_of_many_losses_at_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_BLOCK_LOGITS", block * 33)
    given = inputs(Case("linear_batched", 9, 33))
    loss = given.run().loss
    batched = torch.autograd.grad(
        loss, given.leaves, torch.eye(9), is_grads_batched=True, retain_graph=True
    )
    single = [torch.autograd.grad(loss[i], given.leaves, retain_graph=True) for i in range(9)]
    for got, wanted in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(wanted))


def test_within_an_activation_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_BLOCK_LOGITS", 4 * 33)
    given = inputs(Case("linear_checkpointed", 9, 33))
    made = [
        torch.autograd.grad(loss.sum(), given.leaves)
        for loss in (
            given.run().loss,
            checkpoint(lambda: given.run().loss, use_reentrant=False),
        )
    ]
    torch.testing.assert_close(*made, rtol=0, atol=0)


def test_a_gpu_takes_as_many_rows_at_a_time_as_there_are_features_but_2_to_the_27_logits() -> None:
    def rows(shape: tuple[int, ...], classes: int, is_cuda: bool) -> int:
        hidden = types.SimpleNamespace(shape=shape, is_cuda=is_cuda)
        return functional._rows_of_a_block(hidden, classes)  # type: ignore[arg-type]

    assert rows((8192, 2048), 32000, is_cuda=True) == 2048
    assert rows((8192, 2048), 128256, is_cuda=True) == 1046
    assert rows((8192, 64), 10**9, is_cuda=True) == 1
    assert rows((8192, 2048), 128256, is_cuda=False) == 65
    assert rows((8192, 64), 1000, is_cuda=True) == 8388
    assert rows((8192, 64), 10**8, is_cuda=False) == 1
