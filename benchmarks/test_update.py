"""The state update alone, and with loss, scores and gradient: a training step without its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import emp_fast
from benchmarks import contenders, machine
from benchmarks.cases import checked_rows, expected_scores, logits_and_targets
from benchmarks.conftest import Race
from benchmarks.harness import Case, Contender, Inputs
from emp_fast.rules import EMP
from emp_fast.testing import baselines

#: The number of training images in ImageNet-1k.
_NUM_SAMPLES = 1_281_167
_RULE = EMP(beta=0.5, decay=0.9)


class _TensorState:
    """The state of the baselines, into which `baselines.update_emp` writes."""

    def __init__(self, device: torch.device) -> None:
        self.scores = torch.full((_NUM_SAMPLES,), torch.inf, device=device)
        self.memory = torch.zeros(_NUM_SAMPLES, device=device)
        self.visits = torch.zeros(_NUM_SAMPLES, dtype=torch.int32, device=device)

    def update(
        self,
        update: Callable[..., Any],
        indices: Tensor,
        loss: Tensor,
        entropy: Tensor,
    ) -> None:
        update(
            indices, loss, entropy, self.scores, self.memory, self.visits, _RULE.beta, _RULE.decay
        )


def _batches(rows: int, count: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(_NUM_SAMPLES, generator=generator)[: rows * count]
    return [batch.to(device) for batch in order.split(rows)]


def test_update(race: Race, rows: int, device: torch.device, quick: bool) -> None:
    batches = _batches(rows, 8, device)
    generator = torch.Generator(device).manual_seed(3)
    values = torch.rand(8, 2, rows, generator=generator, device=device)
    inputs = [(at, loss, entropy) for at, (loss, entropy) in zip(batches, values, strict=True)]

    def of_store(store: emp_fast.ScoreStore) -> Mapping[str, Tensor]:
        at = batches[0]
        return {"scores": store.scores[at], "memory": store.memory[at], "visits": store.visits[at]}

    def stored() -> Callable[..., emp_fast.ScoreStore]:
        store = emp_fast.ScoreStore(_NUM_SAMPLES, _RULE, device=device)

        def call(at: Tensor, loss: Tensor, entropy: Tensor) -> emp_fast.ScoreStore:
            store.update(at, {"loss": loss, "entropy": entropy})
            return store

        return call

    def tensors(update: Callable[..., Any]) -> Callable[..., _TensorState]:
        state = _TensorState(device)

        def call(at: Tensor, loss: Tensor, entropy: Tensor) -> _TensorState:
            state.update(update, at, loss, entropy)
            return state

        return call

    def expected(arguments: Inputs) -> Mapping[str, Tensor]:
        call = stored()
        with emp_fast.use_backend("reference"):
            return of_store(call(*arguments))

    compiled = contenders.compiled(baselines.update_emp, wanted=not quick)
    unchecked = "checks no index, duplicate or non-finite value"
    case = Case(
        suite="state update",
        name=f"{rows:,} of {_NUM_SAMPLES:,}",
        inputs=inputs,
        expected=expected,
        # Reads index, loss and entropy; writes score, memory and visits, the last two also read.
        floor_bytes=rows * (16 + 20),
        facts={"rows": rows, "num_samples": _NUM_SAMPLES},
    )
    race(
        case,
        [
            *contenders.ours_each(stored, of_store, device),
            Contender("eager", tensors(baselines.update_emp), of_store, note=unchecked),
            Contender("torch.compile", tensors(compiled), of_store, note=unchecked),
        ],
    )


def test_score_gradient_state(
    race: Race, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, quick: bool
) -> None:
    cache = machine.cache_bytes(device)
    narrow = checked_rows(shape, device)
    scored = logits_and_targets(shape, dtype, device, "random", cache, requires_grad=True)
    batches = _batches(shape[0], len(scored), device)
    inputs = [(*pair, at) for pair, at in zip(scored, batches, strict=True)]

    def pruned() -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:
        pruner = emp_fast.Pruner(_NUM_SAMPLES, prune_rate=0.7, rule=_RULE, device=device)

        def call(logits: Tensor, target: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            loss = pruner.loss(logits, target, at)
            (grad,) = torch.autograd.grad(loss, logits)
            return loss, grad, pruner.store.scores

        return call

    def by_hand(
        score: Callable[..., Any], update: Callable[..., Any]
    ) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        state = _TensorState(device)

        def call(logits: Tensor, target: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            loss, entropy, *_ = score(logits, target)
            mean = loss.mean()
            (grad,) = torch.autograd.grad(mean, logits)
            state.update(update, at, loss.detach(), entropy)
            return mean, grad, state.scores

        return call

    def torch_loss(logits: Tensor, target: Tensor, at: Tensor) -> tuple[Tensor, Tensor, None]:
        loss = torch.nn.functional.cross_entropy(logits, target)
        return loss, torch.autograd.grad(loss, logits)[0], None

    def outputs(result: tuple[Tensor, Tensor, Tensor | None]) -> Mapping[str, Tensor]:
        _, grad, scores = result
        found = {"gradient": grad * shape[0]}
        return found if scores is None else found | {"scores": scores[batches[0]]}

    def expected(arguments: Inputs) -> Mapping[str, Tensor]:
        wanted = dict(expected_scores(narrow, gradient=True)(arguments))
        # On the first visit the memory is the entropy itself.
        return wanted | {"scores": wanted["loss"] + _RULE.beta * wanted["entropy"]}

    compiled_score = contenders.compiled(baselines.five_scores_to_compile, wanted=not quick)
    compiled_update = contenders.compiled(baselines.update_emp, wanted=not quick, reset=False)
    case = Case(
        suite="forward + backward + state",
        name=f"{shape[0]} x {shape[1]}"
        + ("" if device.type == "cpu" else f" {str(dtype).removeprefix('torch.')}"),
        inputs=inputs,
        expected=expected,
        floor_bytes=shape[0] * (2 * shape[1] * dtype.itemsize + 28 + 28),
        narrow=narrow,
        facts={"shape": list(shape), "dtype": str(dtype), "logits": "random"},
    )
    race(
        case,
        [
            *contenders.ours_each(
                pruned, outputs, device, contenders.OUR_GRADIENT, every_row_kernel=True
            ),
            Contender("eager", by_hand(baselines.five_scores, baselines.update_emp), outputs),
            Contender("torch.compile", by_hand(compiled_score, compiled_update), outputs),
            Contender("F.cross_entropy", torch_loss, outputs, note="neither scores nor state"),
        ],
    )
