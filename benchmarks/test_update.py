"""The state update alone, and with loss, scores and gradient: a training step without its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import emp_fast
from benchmarks import contenders
from benchmarks.conftest import Race
from emp_fast.testing import baselines
from emp_fast.testing.benchmark_cases import (
    NUM_SAMPLES,
    OUR_GRADIENT_BOUND,
    RULE,
    STATE_BYTES,
    TensorState,
    compiled,
    expected_scores,
    logits_and_targets,
    rows_to_check,
    sample_batches,
    score_bytes,
    store_updates,
    tensor_updates,
    update_case,
)
from emp_fast.testing.contest import Arguments, BenchmarkCase, Contender


def test_update(race: Race, rows: int, device: torch.device, quick: bool) -> None:
    case = update_case(rows, device)
    peers = [tensor_updates("eager", baselines.update_emp, case)]
    if not quick:
        peers.append(tensor_updates("torch.compile", compiled(baselines.update_emp), case))
    race(case, [*contenders.ours(lambda: store_updates(case), device), *peers])


def test_score_gradient_state(
    race: Race, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, quick: bool
) -> None:
    narrow = rows_to_check(shape, device)
    scored = logits_and_targets(shape, dtype, device, "random", requires_grad=True)
    batches = sample_batches(shape[0], len(scored), device)
    inputs = [(*pair, at) for pair, at in zip(scored, batches, strict=True)]

    def pruned() -> Contender:
        pruner = emp_fast.Pruner(NUM_SAMPLES, prune_rate=0.7, rule=RULE, device=device)

        def call(logits: Tensor, target: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            loss = pruner.loss(logits, target, at)
            (grad,) = torch.autograd.grad(loss, logits)
            return loss, grad, pruner.store.scores

        return Contender("emp_fast", call, outputs, OUR_GRADIENT_BOUND)

    def by_hand(
        score: Callable[..., Any], update: Callable[..., Any]
    ) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        state = TensorState(device)

        def call(logits: Tensor, target: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            loss, entropy, *_ = score(logits, target)
            mean = loss.mean()
            (grad,) = torch.autograd.grad(mean, logits)
            state.update(update, at, loss.detach(), entropy)
            return mean, grad, state.scores

        return call

    def of_torch(logits: Tensor, target: Tensor, at: Tensor) -> tuple[Tensor, Tensor, None]:
        loss = torch.nn.functional.cross_entropy(logits, target)
        return loss, torch.autograd.grad(loss, logits)[0], None

    def outputs(result: tuple[Tensor, Tensor, Tensor | None]) -> Mapping[str, Tensor]:
        _, grad, scores = result
        found = {"gradient": grad * shape[0]}
        return found if scores is None else found | {"scores": scores[batches[0]]}

    def expected(arguments: Arguments) -> Mapping[str, Tensor]:
        wanted = dict(expected_scores(narrow, gradient=True)(arguments))
        # On the first visit the memory is the entropy itself.
        return wanted | {"scores": wanted["loss"] + RULE.beta * wanted["entropy"]}

    peers = [Contender("eager", by_hand(baselines.loss_and_scores, baselines.update_emp), outputs)]
    if not quick:
        score = compiled(baselines.loss_and_scores_to_compile)
        update = compiled(baselines.update_emp, reset=False)
        peers.append(Contender("torch.compile", by_hand(score, update), outputs))
    case = BenchmarkCase(
        suite="forward + backward + state",
        name=f"{shape[0]} x {shape[1]}"
        + ("" if device.type == "cpu" else f" {str(dtype).removeprefix('torch.')}"),
        inputs=inputs,
        expected=expected,
        floor_bytes=score_bytes(shape, dtype, gradient=True) + shape[0] * STATE_BYTES,
        narrow=narrow,
        facts={"shape": list(shape), "dtype": str(dtype), "logits": "random"},
    )
    race(
        case,
        [
            *contenders.ours(pruned, device, every_row_kernel=True),
            *peers,
            Contender("F.cross_entropy", of_torch, outputs, note="neither scores nor state"),
        ],
    )
