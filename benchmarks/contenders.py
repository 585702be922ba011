"""The contenders of each suite, and what to check in their results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

import emp_fast
from benchmarks import peers
from emp_fast.backends import backend_status, load, resolve
from emp_fast.functional import cross_entropy, linear_cross_entropy, topk_indices
from emp_fast.testing import baselines
from emp_fast.testing.benchmark_cases import (
    ONLY_LOSS,
    by_name,
    compiled,
    only_loss,
    our_scores,
    our_selection,
    our_stats,
    score_peers,
    selection_peers,
    torch_loss,
    with_gradients,
)
from emp_fast.testing.contest import BenchmarkCase, Bound, Contender, Unavailable

if TYPE_CHECKING:
    from emp_fast.backends.row_kernels import RowKernelsChoice


def backends(
    device: torch.device, *, every_row_kernel: bool = False
) -> tuple[dict[str, Callable[[], AbstractContextManager[Any]]], dict[str, str]]:
    """The kernel backends of ``device`` with a context for each, and why the others cannot serve.

    The automatic choice comes first, because ratios are relative to it; its context does nothing,
    as in users' code. If no kernel serves, the reference replaces it, under its own name. With
    ``every_row_kernel``, each backend also appears with every choice of row kernels
    (docs/kernels.md).
    """
    status = [s for s in backend_status(device) if s.name != "reference"]
    names = [s.name for s in status if s.available] or ["reference"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emp_fast.EmpFastWarning)
        automatic = resolve(device).name
    names.sort(key=lambda name: name != automatic)
    entered = {name: nullcontext if name == automatic else _entering(name) for name in names}
    if automatic == "reference":
        entered["reference"] = _entering("reference")
    if every_row_kernel:
        for name in names:
            for kernels in getattr(load(name), "row_kernel_names", ())[1:]:
                entered[f"{name}, {kernels}"] = _with_row_kernels(name, kernels)
    wanted = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[device.type]
    refused = {s.name: s.reason or "" for s in status if not s.available and s.name in wanted}
    return entered, refused


def _entering(name: str) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: emp_fast.use_backend(name)


def _with_row_kernels(name: str, kernels: str) -> Callable[[], AbstractContextManager[Any]]:
    """The backend with these row kernels."""

    @contextmanager
    def enter() -> Iterator[None]:
        backend = cast("RowKernelsChoice", load(name))
        before = backend.row_kernels
        backend.row_kernels = kernels
        try:
            with emp_fast.use_backend(name):
                yield
        finally:
            backend.row_kernels = before

    return enter


def ours(
    make: Callable[[], Contender], device: torch.device, *, every_row_kernel: bool = False
) -> list[Contender]:
    """What ``make`` returns, by each backend; one that cannot serve is refused, with the reason.

    ``make`` is called once for every backend, for the state that it may update.
    """
    entered, refused = backends(device, every_row_kernel=every_row_kernel)
    serving = [
        replace(make(), name=f"emp_fast {name}", context=context, ours=True)
        for name, context in entered.items()
    ]
    absent = [
        Contender(f"emp_fast {name}", _unavailable(reason), only_loss)
        for name, reason in refused.items()
    ]
    return serving + absent


def _unavailable(reason: str) -> Callable[..., Any]:
    def call(*_: Any) -> None:
        raise Unavailable(reason)

    return call


def scoring(device: torch.device, *, gradient: bool, compile: bool) -> list[Contender]:
    """Contenders that compute loss and all scores of [S, C] logits, and the gradient if wanted."""
    others: list[Contender] = []
    if device.type == "cuda":
        others = [
            Contender("Liger", peers.liger, only_loss, note=ONLY_LOSS),
            Contender("quack", peers.quack, only_loss, note=ONLY_LOSS),
        ]
    if gradient:
        others = [with_gradients(other) for other in others]
    return [
        *ours(lambda: our_scores(cross_entropy, gradient=gradient), device, every_row_kernel=True),
        *score_peers(gradient=gradient, compile=compile),
        *(_on_a_copy(other) if other.name == "Liger" else other for other in others),
    ]


def linear(device: torch.device, bound: Bound, *, compile: bool) -> list[Contender]:
    """Contenders that compute loss, scores and both gradients of ``hidden @ classifier.T``."""

    def of_logits(score: Callable[..., Any]) -> Callable[..., Any]:
        return lambda hidden, classifier, target: score(hidden @ classifier.T, target)

    mine = with_gradients(Contender("emp_fast", linear_cross_entropy, our_stats, bound))
    others = [Contender("eager", of_logits(baselines.loss_and_scores), by_name, bound)]
    if compile:
        scored = compiled(of_logits(baselines.loss_and_scores_to_compile))
        others.append(Contender("torch.compile", scored, by_name, bound))
    alone = {"F.cross_entropy": of_logits(torch_loss)}
    if device.type == "cuda":
        alone |= {"cut-cross-entropy": peers.cut_cross_entropy, "Liger": peers.liger_linear}
    for name, peer in alone.items():
        others.append(Contender(name, peer, only_loss, bound, note=ONLY_LOSS))
    return [*ours(lambda: mine, device), *map(with_gradients, others)]


def selection(device: torch.device, case: BenchmarkCase) -> list[Contender]:
    """Contenders for the indices of the k highest of N scores."""
    return [*ours(lambda: our_selection(topk_indices), device), *selection_peers(case)]


def _on_a_copy(one: Contender) -> Contender:
    """Copies the logits for a peer that overwrites them by the gradient, to protect the others.

    The first call, which is checked, sees the logits; later calls see what the peer left there.
    """
    copies: dict[int, Tensor] = {}

    def of_copy(logits: Tensor, target: Tensor) -> Any:
        if id(logits) not in copies:
            copy = logits.detach().clone()
            copies[id(logits)] = copy.requires_grad_(logits.requires_grad)
        return one.call(copies[id(logits)], target)

    return replace(one, call=of_copy)
