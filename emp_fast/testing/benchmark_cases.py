"""What is measured: inputs, right results, and plain PyTorch that does the same work.

`emp-fast bench` and the suites in the repository's benchmarks/ build their cases here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from emp_fast.backends import use_backend
from emp_fast.backends.base import FLOAT_STATS
from emp_fast.functional import SampleStats, cross_entropy, topk_indices
from emp_fast.rules import EMP
from emp_fast.store import ScoreStore
from emp_fast.testing import baselines
from emp_fast.testing.contest import (
    Arguments,
    BenchmarkCase,
    Bound,
    Contender,
    cache_bytes,
    rotations,
)
from emp_fast.testing.oracle import ATOL, RTOL

#: How far our results may be from the reference's.
OUR_BOUND = Bound(RTOL, ATOL)
#: For the gradient of a mean, which `with_gradients` rescales to a single sample.
OUR_GRADIENT_BOUND = Bound(1e-4, 2e-6)
EXACT = Bound(0.0, 0.0)
#: Bytes of a row besides its logits: a class id read; a loss and four scores written.
SCORE_BYTES = 8 + 5 * 4
#: Of a row in a fused step: an index, memory and visits read; these two and the score written.
STATE_BYTES = 8 + 5 * 4
#: Of a row in an update by itself: its loss and entropy are read too.
UPDATE_BYTES = STATE_BYTES + 2 * 4
#: Of a row in a backward pass by itself: a class id, the incoming gradient and four fields read.
BACKWARD_BYTES = 8 + 5 * 4
ONLY_LOSS = "computes the loss alone"
#: The number of training images in ImageNet-1k.
NUM_SAMPLES = 1_281_167
RULE = EMP(beta=0.5, decay=0.9)

#: Rows and classes at which the CPU backends are measured.
CPU_BENCHMARK_SHAPES = (
    (128, 10),
    (65536, 10),
    (256, 100),
    (16384, 100),
    (4096, 1000),
    (256, 32000),
    (64, 128256),
)

#: Rows and classes at which the GPU backends are measured, from small batches to language models.
GPU_BENCHMARK_SHAPES = (
    (128, 10),
    (512, 10),
    (65536, 10),
    (128, 100),
    (512, 100),
    (65536, 100),
    (128, 1000),
    (512, 1000),
    (65536, 1000),
    (4096, 32000),
    (8192, 128256),
    (8192, 151936),
    (2048, 262144),
)

#: Most logits in the rows that are checked, because float64 and its temporaries must fit.
_CHECKED_LOGITS = 2**24


# ---- scores of logits ----------------------------------------------------------------------------


def benchmark_shapes(device: str | torch.device) -> tuple[tuple[int, int], ...]:
    """The (rows, classes) at which ``device`` is measured."""
    cpu = torch.device(device).type == "cpu"
    return CPU_BENCHMARK_SHAPES if cpu else GPU_BENCHMARK_SHAPES


def score_case(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    kind: str,
    *,
    gradient: bool = False,
) -> BenchmarkCase:
    """Loss and all scores of logits [S, C], and the gradient if wanted; `logits_and_targets`."""
    narrow = rows_to_check(shape, device)
    precision = "" if device.type == "cpu" else f" {str(dtype).removeprefix('torch.')}"
    return BenchmarkCase(
        suite="forward + backward" if gradient else "forward",
        name=f"{shape[0]} x {shape[1]}{precision} {kind}",
        inputs=logits_and_targets(shape, dtype, device, kind, requires_grad=gradient),
        expected=expected_scores(narrow, gradient=gradient),
        floor_bytes=score_bytes(shape, dtype, gradient=gradient),
        narrow=narrow,
        facts={"shape": list(shape), "dtype": str(dtype), "logits": kind},
    )


def our_scores(score: Callable[..., SampleStats], *, gradient: bool) -> Contender:
    """``score``, which is `emp_fast.functional.cross_entropy`, for a `score_case`."""
    mine = Contender("emp_fast", score, our_stats, OUR_BOUND, ours=True)
    return replace(with_gradients(mine), bound=OUR_GRADIENT_BOUND) if gradient else mine


def score_peers(*, gradient: bool, compile: bool) -> list[Contender]:
    """Plain PyTorch for a `score_case`; ``compile`` adds torch.compile of it."""
    peers = [Contender("eager", baselines.loss_and_scores, by_name)]
    if compile:
        scores = compiled(baselines.loss_and_scores_to_compile)
        peers.append(Contender("torch.compile", scores, by_name))
    peers.append(Contender("F.cross_entropy", torch_loss, only_loss, note=ONLY_LOSS))
    return [with_gradients(peer) for peer in peers] if gradient else peers


def logits_and_targets(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    kind: str,
    *,
    requires_grad: bool = False,
) -> list[Arguments]:
    """Several (logits [S, C], target [S]) to rotate over.

    "random" is 3 * normal: every class has some probability. "peaked" resembles a trained network:
    p_y is near 1 - 1e-6 in most rows, and one row in eight is confidently wrong.
    """
    samples, classes = shape
    generator = torch.Generator(device).manual_seed(0)
    nbytes = samples * classes * dtype.itemsize
    made = []
    # On a GPU the cache is flushed between calls, so one input suffices; the largest fit only once.
    for _ in range(rotations(nbytes, cache_bytes(device)) if device.type == "cpu" else 1):
        target = torch.randint(classes, (samples,), generator=generator, device=device)
        logits = torch.randn(samples, classes, generator=generator, device=device).mul_(3)
        if kind == "peaked":
            likely = target.clone()
            likely[::8] = (target[::8] + 1) % classes
            height = 14 + logits.amax(1, keepdim=True) + torch.tensor(float(classes)).log().item()
            logits.scatter_(1, likely[:, None], height)
        made.append((logits.to(dtype).requires_grad_(requires_grad), target))
    return made


def score_bytes(shape: tuple[int, int], dtype: torch.dtype, *, gradient: bool) -> int:
    """The logits read once and the gradient written once, and what each row has besides."""
    samples, classes = shape
    return samples * ((2 if gradient else 1) * classes * dtype.itemsize + SCORE_BYTES)


def rows_to_check(shape: tuple[int, int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Selects the rows to check: all of a small case, evenly spaced ones of a large case."""
    samples, classes = shape
    count = min(samples, max(8, _CHECKED_LOGITS // classes))
    rows = torch.linspace(0, samples - 1, count, device=device, dtype=torch.float64).round().long()
    return lambda tensor: tensor[rows]


def expected_scores(
    narrow: Callable[[Tensor], Tensor], *, gradient: bool = False
) -> Callable[[Arguments], Mapping[str, Tensor]]:
    """The reference backend in float64, which the tests compare with the float64 oracle."""

    def expected(arguments: Arguments) -> Mapping[str, Tensor]:
        logits = narrow(arguments[0].detach()).double().requires_grad_(gradient)
        stats = cross_entropy(logits, narrow(arguments[1]))
        wanted = {name: value.detach() for name, value in stats._asdict().items()}
        if gradient:
            (wanted["gradient"],) = torch.autograd.grad(stats.loss.sum(), logits)
        return wanted

    return expected


def with_gradients(one: Contender) -> Contender:
    """Calls ``one(*inputs, target)`` and computes the mean loss's gradients of all inputs.

    The first of these gradients is checked too, rescaled from the mean to a single sample.
    """

    def call(*arguments: Tensor) -> tuple[Any, Tensor]:
        result = one.call(*arguments)
        loss = result if isinstance(result, Tensor) else result[0]
        return result, torch.autograd.grad(loss.mean(), arguments[:-1])[0]

    def outputs(pair: tuple[Any, Tensor]) -> Mapping[str, Tensor]:
        return {**one.outputs(pair[0]), "gradient": pair[1] * pair[1].shape[0]}

    return replace(one, call=call, outputs=outputs)


def compiled(function: Callable[..., Any], *, reset: bool = True) -> Callable[..., Any]:
    """``torch.compile`` in its default mode, specialised to the shapes of the case.

    ``reset`` discards what earlier cases compiled, before dynamo reaches its recompilation limit
    and runs eager code.
    """
    if reset:
        torch.compiler.reset()
    made: Callable[..., Any] = torch.compile(function, dynamic=False)
    return made


def torch_loss(logits: Tensor, target: Tensor) -> Tensor:
    """PyTorch's own loss of every row, without any score."""
    return functional.cross_entropy(logits, target, reduction="none")


def our_stats(stats: SampleStats) -> Mapping[str, Tensor]:
    """The loss and scores of `emp_fast.functional.cross_entropy`, by name."""
    return {name: getattr(stats, name) for name in FLOAT_STATS}


def by_name(stats: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
    """The loss and scores of a baseline, by name."""
    return dict(zip(FLOAT_STATS, stats, strict=True))


def only_loss(loss: Tensor) -> Mapping[str, Tensor]:
    """The loss, by name."""
    return {"loss": loss}


# ---- selection -----------------------------------------------------------------------------------


def selection_case(num_scores: int, share: float, device: torch.device, kind: str) -> BenchmarkCase:
    """Indices of the highest scores; `drawn_scores`."""
    k = int(share * num_scores)

    def expected(arguments: Arguments) -> Mapping[str, Tensor]:
        with use_backend("reference"):
            indices = topk_indices(*arguments)
        return {"values": _values(arguments[0], indices), "indices": indices}

    return BenchmarkCase(
        suite="selection",
        name=f"{share:.0%} of {num_scores:,} {kind}",
        inputs=[(drawn_scores(num_scores, kind, device), k)],
        expected=expected,
        floor_bytes=4 * num_scores + 8 * k,  # the scores read once, the indices written once
        facts={"num_scores": num_scores, "share": share, "k": k, "scores": kind},
    )


def our_selection(select: Callable[..., Tensor]) -> Contender:
    """``select``, which is `emp_fast.functional.topk_indices`, for a `selection_case`."""
    return Contender("emp_fast", select, _only_indices, EXACT, ours=True)


def selection_peers(case: BenchmarkCase) -> list[Contender]:
    """What PyTorch and NumPy have for a `selection_case`."""
    (scores, _) = case.inputs[0]

    def values(indices: Any) -> Mapping[str, Tensor]:
        return {"values": _values(scores, torch.as_tensor(indices))}

    unordered = "neither index order nor a rule for ties"
    peers = [
        Contender("torch.topk", _topk, values, EXACT, note=unordered),
        Contender("torch.sort", _sort, values, EXACT, note="in the order of the scores"),
    ]
    if scores.device.type == "cpu":
        peers.append(Contender("np.argpartition", _argpartition, values, EXACT, note=unordered))
    return peers


def drawn_scores(n: int, kind: str, device: torch.device) -> Tensor:
    """[N] scores: "random" is exponential, as losses in training are.

    In "peaked", all but a twentieth are within a few per cent of each other, with many ties, as
    late in training.
    """
    generator = torch.Generator(device).manual_seed(1)
    made = torch.empty(n, device=device).exponential_(generator=generator)
    if kind == "peaked":
        made.mul_(2**-10).add_(0.25)
        made[::20] += 1
    return made


def _only_indices(indices: Tensor) -> Mapping[str, Tensor]:
    return {"indices": indices}


def _values(scores: Tensor, indices: Tensor) -> Tensor:
    """The chosen scores, sorted; contenders without a rule for ties differ only in indices."""
    return scores[indices].sort().values


def _topk(scores: Tensor, k: int) -> Tensor:
    return torch.topk(scores, k, sorted=False).indices


def _sort(scores: Tensor, k: int) -> Tensor:
    return torch.sort(scores, descending=True).indices[:k]


def _argpartition(scores: Tensor, k: int) -> Any:
    n = scores.shape[0]
    return np.argpartition(scores.numpy(), n - k)[n - k :]


# ---- the state's update --------------------------------------------------------------------------


class TensorState:
    """A state [N] of plain tensors, into which `baselines.update_emp` writes."""

    def __init__(self, device: torch.device) -> None:
        self.scores = torch.full((NUM_SAMPLES,), torch.inf, device=device)
        self.memory = torch.zeros(NUM_SAMPLES, device=device)
        self.visits = torch.zeros(NUM_SAMPLES, dtype=torch.int32, device=device)

    def update(
        self,
        update: Callable[..., Any],
        indices: Tensor,
        loss: Tensor,
        entropy: Tensor,
    ) -> None:
        """``update`` with `RULE`."""
        state = self.scores, self.memory, self.visits
        update(indices, loss, entropy, *state, RULE.beta, RULE.decay)


def update_case(rows: int, device: torch.device) -> BenchmarkCase:
    """The update of `NUM_SAMPLES` states by the losses and entropies of batches."""
    batches = sample_batches(rows, 8, device)
    generator = torch.Generator(device).manual_seed(3)
    values = torch.rand(8, 2, rows, generator=generator, device=device)
    inputs = [(at, loss, entropy) for at, (loss, entropy) in zip(batches, values, strict=True)]

    def expected(arguments: Arguments) -> Mapping[str, Tensor]:
        update = _of_store(device)
        with use_backend("reference"):
            return _states_at(arguments[0])(update(*arguments))

    return BenchmarkCase(
        suite="state update",
        name=f"{rows:,} of {NUM_SAMPLES:,}",
        inputs=inputs,
        expected=expected,
        floor_bytes=rows * UPDATE_BYTES,
        facts={"rows": rows, "num_samples": NUM_SAMPLES},
    )


def sample_batches(rows: int, count: int, device: torch.device) -> list[Tensor]:
    """``count`` batches of ``rows`` indices, all different."""
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(NUM_SAMPLES, generator=generator)[: rows * count]
    return [batch.to(device) for batch in order.split(rows)]


def store_updates(case: BenchmarkCase) -> Contender:
    """A new store for an `update_case`."""
    at = case.inputs[0][0]
    return Contender("emp_fast", _of_store(at.device), _states_at(at), OUR_BOUND, ours=True)


def tensor_updates(name: str, update: Callable[..., Any], case: BenchmarkCase) -> Contender:
    """``update``, which is `baselines.update_emp` or that compiled, for an `update_case`."""
    at = case.inputs[0][0]
    state = TensorState(at.device)

    def call(at: Tensor, loss: Tensor, entropy: Tensor) -> TensorState:
        state.update(update, at, loss, entropy)
        return state

    note = "checks no index, duplicate or non-finite value"
    return Contender(name, call, _states_at(at), note=note)


def _of_store(device: torch.device) -> Callable[..., ScoreStore]:
    store = ScoreStore(NUM_SAMPLES, RULE, device=device)

    def call(at: Tensor, loss: Tensor, entropy: Tensor) -> ScoreStore:
        store.update(at, {"loss": loss, "entropy": entropy})
        return store

    return call


def _states_at(at: Tensor) -> Callable[[Any], Mapping[str, Tensor]]:
    return lambda state: {
        "scores": state.scores[at],
        "memory": state.memory[at],
        "visits": state.visits[at],
    }
