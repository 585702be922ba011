"""The contenders of each suite, and what to check in their results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional

import emp_fast
from benchmarks import peers
from benchmarks.harness import Bound, Contender, Unavailable
from emp_fast.backends import backend_status, load, resolve
from emp_fast.functional import SampleStats, cross_entropy, linear_cross_entropy, topk_indices
from emp_fast.testing import baselines

if TYPE_CHECKING:
    from emp_fast.backends.row_kernels import RowKernelsChoice

OURS = Bound(1e-5, 1e-6)
#: For the gradient of a mean, which `outputs` rescales to a single sample.
OUR_GRADIENT = Bound(1e-4, 2e-6)
EXACT = Bound(0.0, 0.0)
ONLY_LOSS = "computes the loss alone"


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
    call: Callable[..., Any],
    outputs: Callable[[Any], Mapping[str, Tensor]],
    device: torch.device,
    bound: Bound = OURS,
    *,
    every_row_kernel: bool = False,
) -> list[Contender]:
    """One contender per backend; those that cannot serve are marked as refused, with the reason."""
    return ours_each(lambda: call, outputs, device, bound, every_row_kernel=every_row_kernel)


def ours_each(
    make: Callable[[], Callable[..., Any]],
    outputs: Callable[[Any], Mapping[str, Tensor]],
    device: torch.device,
    bound: Bound = OURS,
    *,
    every_row_kernel: bool = False,
) -> list[Contender]:
    """The same, if every backend needs its own call for the state that it updates."""
    entered, refused = backends(device, every_row_kernel=every_row_kernel)
    contenders = [
        Contender(f"emp_fast {name}", make(), outputs, bound, context=context, ours=True)
        for name, context in entered.items()
    ]
    for name, reason in refused.items():
        contenders.append(Contender(f"emp_fast {name}", _unavailable(reason), outputs))
    return contenders


def _unavailable(reason: str) -> Callable[..., Any]:
    def call(*_: Any) -> None:
        raise Unavailable(reason)

    return call


def forward(device: torch.device, *, compile: bool) -> list[Contender]:
    """Contenders that compute the loss and all scores of [S, C] logits."""
    others = [
        Contender("eager", baselines.five_scores, _five),
        Contender(
            "torch.compile", compiled(baselines.five_scores_to_compile, wanted=compile), _five
        ),
        Contender("F.cross_entropy", _torch_loss, _loss, note=ONLY_LOSS),
    ]
    if device.type == "cuda":
        others += [
            Contender("Liger", _on_a_copy(peers.liger), _loss, note=ONLY_LOSS),
            Contender("quack", peers.quack, _loss, note=ONLY_LOSS),
        ]
    return [*ours(cross_entropy, _stats, device, every_row_kernel=True), *others]


def gradient(device: torch.device, *, compile: bool) -> list[Contender]:
    """The same with the gradient of the mean loss with respect to the logits."""
    compiled_scores = compiled(baselines.five_scores_to_compile, wanted=compile)
    others = [
        Contender("eager", _with_gradients(baselines.five_scores), _and_gradient(_five)),
        Contender("torch.compile", _with_gradients(compiled_scores), _and_gradient(_five)),
        Contender(
            "F.cross_entropy", _with_gradients(_torch_loss), _and_gradient(_loss), note=ONLY_LOSS
        ),
    ]
    if device.type == "cuda":
        others += [
            Contender(
                "Liger",
                _on_a_copy(_with_gradients(peers.liger)),
                _and_gradient(_loss),
                note=ONLY_LOSS,
            ),
            Contender("quack", _with_gradients(peers.quack), _and_gradient(_loss), note=ONLY_LOSS),
        ]
    return [
        *ours(
            _with_gradients(cross_entropy),
            _and_gradient(_stats),
            device,
            OUR_GRADIENT,
            every_row_kernel=True,
        ),
        *others,
    ]


def linear(device: torch.device, bound: Bound, *, compile: bool) -> list[Contender]:
    """Contenders that compute loss, scores and both gradients of ``hidden @ classifier.T``."""

    def of_logits(score: Callable[..., Any]) -> Callable[..., Any]:
        return lambda hidden, classifier, target: score(hidden @ classifier.T, target)

    scored = compiled(of_logits(baselines.five_scores_to_compile), wanted=compile)
    others = [
        Contender(
            "eager", _with_gradients(of_logits(baselines.five_scores)), _and_gradient(_five), bound
        ),
        Contender("torch.compile", _with_gradients(scored), _and_gradient(_five), bound),
        Contender(
            "F.cross_entropy",
            _with_gradients(of_logits(_torch_loss)),
            _and_gradient(_loss),
            bound,
            note=ONLY_LOSS,
        ),
    ]
    if device.type == "cuda":
        for name, peer in (
            ("cut-cross-entropy", peers.cut_cross_entropy),
            ("Liger", peers.liger_linear),
        ):
            call = _with_gradients(peer)
            others.append(Contender(name, call, _and_gradient(_loss), bound, note=ONLY_LOSS))
    call = _with_gradients(linear_cross_entropy)
    return [*ours(call, _and_gradient(_stats), device, bound), *others]


def _with_gradients(score: Callable[..., Any]) -> Callable[..., Any]:
    """Calls ``score(*inputs, target)`` and computes the gradients of the mean loss for all inputs.

    Returns the result and the first of these gradients.
    """

    def call(*arguments: Tensor) -> tuple[Any, Tensor]:
        result = score(*arguments)
        loss = result if isinstance(result, Tensor) else result[0]
        return result, torch.autograd.grad(loss.mean(), arguments[:-1])[0]

    return call


def _and_gradient(
    outputs: Callable[[Any], Mapping[str, Tensor]],
) -> Callable[[Any], Mapping[str, Tensor]]:
    """Outputs of `_with_gradients`; rescales the gradient of the mean to a single sample."""
    return lambda pair: {**outputs(pair[0]), "gradient": pair[1] * pair[1].shape[0]}


def selection(device: torch.device, values: Callable[[Tensor], Tensor]) -> list[Contender]:
    """Indices of the k highest of N scores; ``values`` returns the chosen scores in order."""

    def exact(indices: Tensor) -> Mapping[str, Tensor]:
        return {"indices": indices}

    def equal(indices: Any) -> Mapping[str, Tensor]:
        return {"values": values(torch.as_tensor(indices))}

    unordered = "neither index order nor a rule for ties"
    others = [
        Contender("torch.topk", _topk, equal, EXACT, note=unordered),
        Contender("torch.sort", _sort, equal, EXACT, note="in the order of the scores"),
    ]
    if device.type == "cpu":
        others.append(Contender("np.argpartition", _argpartition, equal, EXACT, note=unordered))
    return [*ours(topk_indices, exact, device, EXACT), *others]


def _topk(scores: Tensor, k: int) -> Tensor:
    return torch.topk(scores, k, sorted=False).indices


def _sort(scores: Tensor, k: int) -> Tensor:
    return torch.sort(scores, descending=True).indices[:k]


def _argpartition(scores: Tensor, k: int) -> Any:
    import numpy as np

    n = scores.shape[0]
    return np.argpartition(scores.numpy(), n - k)[n - k :]


def _on_a_copy(call: Callable[..., Any]) -> Callable[..., Any]:
    """Copies the logits for a peer that overwrites them by the gradient, to protect the others.

    The first call, which is checked, sees the logits; later calls see what the peer left there.
    """
    copies: dict[int, Tensor] = {}

    def of_copy(logits: Tensor, target: Tensor) -> Any:
        if id(logits) not in copies:
            copy = logits.detach().clone()
            copies[id(logits)] = copy.requires_grad_(logits.requires_grad)
        return call(copies[id(logits)], target)

    return of_copy


def compiled(
    function: Callable[..., Any], *, wanted: bool, reset: bool = True
) -> Callable[..., Any]:
    """``torch.compile`` in its default mode, specialised to the shapes of the case.

    ``reset`` discards what earlier cases compiled, before dynamo reaches its recompilation limit.
    """
    if not wanted:
        return _unavailable("not compiled in a quick run")
    if reset:
        torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _torch_loss(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits, target, reduction="none")


def _stats(stats: SampleStats) -> Mapping[str, Tensor]:
    return {name: getattr(stats, name) for name in baselines.FIVE}


def _five(scores: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
    return dict(zip(baselines.FIVE, scores, strict=True))


def _loss(loss: Tensor) -> Mapping[str, Tensor]:
    return {"loss": loss}
