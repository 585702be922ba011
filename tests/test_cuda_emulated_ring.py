"""The kernels for long rows that stream through shared memory, in the emulator: rows over clusters
fed by bulk copies, and rings of 16-byte copies.

Copies arrive late or early as the seed decides; whoever does not wait for one, or starts one over
values that are still read, fails the test.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cuda_emulator import EmulatedBackend
from test_cuda_emulated import (  # noqa: F401  (emulated and module are fixtures)
    GRAD_TOLERANCE,
    REFERENCE,
    Shape,
    assert_same_state,
    assert_scores,
    close,
    emulated,
    module,
)
from test_update_state import RECURRENCES, make_state

from emp_fast.backends.base import LossOptions

LARGE, SMALL = 227 * 1024, 76 * 1024  # shared memory for six slots; for two
f16, bf16 = torch.float16, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Rows of one plan; a round is 2 KiB a warp."""

    kernels: str
    device: tuple[int, int, int]  # multiprocessors, shared memory, blocks of the widest cluster
    plan: tuple[int, int, int]  # cluster, rounds, slots
    rows: Shape


def long_rows(rows: int, classes: int, dtype: torch.dtype = torch.float32, **rest: Any) -> Shape:
    return Shape(("", 512), rows, classes, dtype, **rest)


STREAMED = [
    # More rows than blocks: the copies of the next row are under way during each.
    Streamed("ring", (2, LARGE, 0), (1, 1, 3), long_rows(5, 4200, offset=1)),
    # One, two, four and eight warps a row, and all sixteen.
    Streamed("ring", (1, LARGE, 0), (1, 3, 3), long_rows(40, 1100)),
    Streamed("ring", (1, LARGE, 0), (1, 5, 5), long_rows(30, 4099, bf16, padding=1, offset=1)),
    Streamed("ring", (1, LARGE, 0), (1, 5, 5), long_rows(14, 8200, f16)),
    Streamed("ring", (1, LARGE, 0), (1, 5, 5), long_rows(5, 16391, f16, offset=3, padding=1)),
    Streamed("ring", (1, LARGE, 0), (1, 4, 7), long_rows(3, 30011, offset=2)),
    Streamed("ring", (1, LARGE, 0), (1, 9, 7), long_rows(2, 70001)),
    # The gradient's rows do not fit: the front comes a second time.
    Streamed("ring", (1, SMALL, 0), (1, 3, 2), long_rows(3, 17003)),
    Streamed("ring", (1, SMALL, 0), (1, 5, 2), long_rows(2, 65551, bf16, offset=5)),
    Streamed("ring", (1, LARGE, 0), (1, 2, 7), long_rows(3, 4200, smoothing=0.1)),
    Streamed("ring", (1, LARGE, 0), (1, 2, 7), long_rows(3, 4200, softcap=50.0, saturated=True)),
    Streamed(
        "cluster", (6, LARGE, 8), (2, 2, 6), long_rows(3, 16500, softcap=50.0, saturated=True)
    ),
    Streamed(
        "cluster", (8, LARGE, 8), (4, 2, 6), long_rows(2, 40001, softcap=50.0, saturated=True)
    ),
    Streamed("cluster", (1, LARGE, 8), (1, 1, 6), long_rows(5, 8301, bf16, offset=7)),
    Streamed("cluster", (1, LARGE, 8), (1, 2, 6), long_rows(5, 8301)),
    Streamed("cluster", (1, SMALL, 1), (1, 3, 2), long_rows(3, 17003, padding=2, offset=2)),
    Streamed("cluster", (2, LARGE, 8), (2, 4, 6), long_rows(3, 50001, offset=3)),
    Streamed("cluster", (1, LARGE, 1), (1, 8, 6), long_rows(2, 130001, f16)),  # two read twice
    Streamed("cluster", (1, SMALL, 8), (2, 2, 2), long_rows(4, 17003)),
    Streamed("cluster", (1, SMALL, 2), (2, 3, 2), long_rows(2, 66001, bf16, offset=3)),
    Streamed("cluster", (4, LARGE, 8), (2, 3, 6), long_rows(2, 65601, f16, weighted=True)),
    Streamed("cluster", (4, LARGE, 8), (4, 2, 6), long_rows(1, 65601, bf16)),
    Streamed(
        "cluster",
        (4, LARGE, 8),
        (2, 2, 6),
        long_rows(2, 16500, softcap=5.0, smoothing=0.2, weighted=True, offset=1),
    ),
]
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


def use(backend: EmulatedBackend, module: Any, case: Streamed, seed: int) -> None:  # noqa: F811
    """Chooses the case's kernels and checks that its rows get the plan that it is about."""
    backend.row_kernels = case.kernels
    backend.seed, backend.poison = seed, (0xFF, 0xA5, 0x00)[seed]
    backend.set_device(*case.device)
    shape = case.rows
    logits = shape.make()[0]
    general = shape.softcap > 0 or (shape.smoothing > 0 and shape.weighted)
    plan = module.plans.choose_rows(
        *(shape.rows, shape.classes, logits.stride(0), logits.element_size()),
        *(logits.data_ptr() % 16 == 0, False, general, shape.smoothing > 0, True, *case.device),
        backend._row_kernels,
    )
    assert plan["path"] == case.kernels
    assert (plan["cluster"], plan["rounds"], plan["slots"]) == case.plan


@pytest.mark.parametrize("case", STREAMED, ids=str)
@seeds
def test_streamed_rows_equal_the_reference(
    case: Streamed,
    seed: int,
    emulated: EmulatedBackend,  # noqa: F811
    module: Any,  # noqa: F811
) -> None:
    """Scores alone, and the fused step, whose gradient finds the row in shared memory."""
    use(emulated, module, case, seed)
    shape = case.rows
    logits, target, weight, options = shape.make()
    row_scale = torch.linspace(-1, 2, shape.rows)
    exact = (target, weight if weight is None else weight.double())
    wanted = REFERENCE.cross_entropy(logits.double(), *exact, options)
    wanted_grad = REFERENCE.cross_entropy_backward(
        row_scale.double() * 0.5, logits.double(), *exact, wanted.fields.double(), options
    )
    assert_scores(emulated.cross_entropy(logits, target, weight, options), wanted)

    indices = torch.arange(shape.rows).flip(0)
    state = make_state(shape.rows)
    scores, grad = emulated.cross_entropy_step(
        *(logits, target, weight, options, row_scale, 0.5, indices, state, RECURRENCES["ema"])
    )
    assert_scores(scores, wanted)
    close(grad, wanted_grad, *GRAD_TOLERANCE[shape.dtype])
    assert torch.equal(state.visits[indices], scores.count)
    again = make_state(shape.rows)
    made = emulated.mean_step(
        *(logits, target, weight, options, None, indices, again, RECURRENCES["ema"])
    )
    mean, factor = REFERENCE.mean_loss(wanted.loss.float(), wanted.count, None)
    close(made.mean, mean)
    close(made.factor, factor)
    assert torch.equal(again.scores, state.scores)


#: A ring that goes round several times, and a cluster of two.
BOTH = [
    Streamed("ring", (1, LARGE, 0), (1, 5, 5), long_rows(30, 4099, bf16, padding=1, offset=1)),
    Streamed("cluster", (2, LARGE, 8), (2, 4, 6), long_rows(3, 50001, offset=3)),
]


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_streamed_rows_repeat_bit_for_bit_under_every_schedule(
    case: Streamed,
    emulated: EmulatedBackend,  # noqa: F811
    module: Any,  # noqa: F811
) -> None:
    logits, target, weight, options = case.rows.make()
    indices = torch.arange(case.rows.rows)
    outcomes = []
    for seed in range(3):
        use(emulated, module, case, seed)
        state = make_state(case.rows.rows)
        scores, grad = emulated.cross_entropy_step(
            *(logits, target, weight, options, None, 1.0, indices, state, RECURRENCES["ema"])
        )
        outcomes.append((*scores, grad, state.scores))
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_streamed_rows_keep_what_spoils_them_to_themselves(
    case: Streamed,
    emulated: EmulatedBackend,  # noqa: F811
    module: Any,  # noqa: F811
) -> None:
    """NaN, -inf, +inf, a class that does not exist, and samples that repeat in the batch."""
    use(emulated, module, case, 1)
    classes = case.rows.classes
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(7, classes, generator=generator)
    target = torch.randint(classes, (7,), generator=generator)
    logits[1, classes // 2] = torch.nan
    logits[2, : classes - 40] = -torch.inf  # whole chunks
    target[2] = classes - 1
    logits[3] = -torch.inf
    logits[3, target[3]] = 2.0  # every class but the target: loss 0
    logits[4, target[4]] = -torch.inf
    target[5] = classes
    target[6] = -100
    safe = target.clone()
    safe[5] = -100
    wanted = REFERENCE.cross_entropy(logits.double(), safe, None, LossOptions())
    indices = torch.tensor([3, 1, 3, 0, 3, 2, 3])
    got_state, wanted_state = make_state(4), make_state(4)
    scores, grad = emulated.cross_entropy_step(
        *(logits, target, None, LossOptions(), None, 1.0, indices, got_state),
        RECURRENCES["ema"],
    )
    fine = torch.tensor([True, True, True, True, True, False, True])
    wanted_loss = wanted.loss.clone()
    close(scores.loss[fine], wanted_loss[fine])
    close(scores.fields[:, fine], wanted.fields[:, fine])
    assert scores.loss[5].isnan()
    assert scores.fields[:, 5].isnan().all()
    assert scores.count.tolist() == [1, 1, 1, 1, 1, 1, 0]
    assert scores.loss[3] == 0
    assert scores.loss[4] == torch.inf
    assert grad[1].isnan().all()
    assert (grad[6] == 0).all()
    exact = REFERENCE.cross_entropy_backward(
        torch.ones(7).double(), logits.double(), safe, None, wanted.fields.double(), LossOptions()
    )
    close(grad[[0, 2, 3]], exact[[0, 2, 3]], 1e-5, 1e-6)
    # The state moves by the scores that the kernel itself wrote.
    read = scores.read_by(RECURRENCES["ema"])
    REFERENCE.update_state(indices, *read, scores.count, wanted_state, RECURRENCES["ema"])
    assert_same_state(got_state, wanted_state)


@pytest.mark.parametrize("kernels", ["shared", "cluster", "ring"])
def test_what_a_choice_cannot_serve_the_plain_kernels_do(
    kernels: str,
    emulated: EmulatedBackend,  # noqa: F811
) -> None:
    emulated.row_kernels = kernels
    generator = torch.Generator().manual_seed(3)
    for rows, classes, soft in ((3, 2100, True), (2, 100, False), (1, 16500, False)):
        emulated.set_device(10, LARGE)
        logits = torch.randn(rows, classes, generator=generator)
        target = torch.randint(classes, (rows,), generator=generator)
        if soft:
            target = torch.softmax(torch.randn(rows, classes, generator=generator), 1)
        exact = target.double() if soft else target
        wanted = REFERENCE.cross_entropy(logits.double(), exact, None, LossOptions())
        assert_scores(emulated.cross_entropy(logits, target, None, LossOptions()), wanted)
