"""The Triton kernels in Triton's interpreter, on every path that a plan can take, made small.

The other files run the whole equivalence suite through the paths that their sizes lead to; here the
limits between the paths are moved, so that small cases walk rows, split them, sample scores,
overflow the candidates and miss the bracket.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import test_functional
import test_fused_step
import test_selection
import torch

from emp_fast import Pruner, use_backend
from emp_fast.backends import resolve
from emp_fast.backends._triton_launch import INTERPRETED
from emp_fast.backends.base import ROW_FIELDS, Backend, LossOptions, Recurrence, State
from emp_fast.backends.reference import ReferenceBackend
from emp_fast.testing import CASES, Case, make, shrunk

if not INTERPRETED:
    pytest.skip("set TRITON_INTERPRET=1", allow_module_level=True)

from machine_code.triton_variants import recorded

from emp_fast.backends import _triton_selection, load, triton
from emp_fast.backends._triton_selection import grouped_topk_indices
from emp_fast.kernels import bracket, plan, row_epilogue
from emp_fast.kernels import update_state as state_kernels

TRITON = triton.TritonBackend()


@pytest.fixture(autouse=True)
def _on_triton(poison: None) -> Iterator[None]:
    with use_backend("triton"):
        resolve(torch.device("cpu"))  # the self-check has launches of its own, once a process
        yield


def launched(call: object) -> list[str]:
    """The names of the kernels that ``call()`` launches, in order, without repetition."""
    with recorded(then=triton.launch) as seen:
        call()  # type: ignore[operator]
    return list(dict.fromkeys(variant.kernel.split(".")[1] for variant in seen))


def test_kernels_and_host_number_the_fields_alike() -> None:
    numbers = [getattr(row_epilogue, name.upper()).value for name in ROW_FIELDS]
    assert numbers == list(range(len(ROW_FIELDS)))


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch, unlisted: None) -> None:
    """Any number of rows is enough to take in steps, on a device that runs two warps at a time."""
    monkeypatch.setattr(plan, "KEPT_TILES", 0)
    for kind in ("", "_GRAD", "_SHARED", "_AHEAD", "_AHEAD_GRAD", "_LONG", "_LONG_GRAD"):
        monkeypatch.setattr(plan, f"ROWS_WARPS{kind}", 2)
    monkeypatch.setattr(triton, "multiprocessors", lambda _: 1)


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch, filled: None) -> None:
    """As `filled`, and they are, whatever is faster."""
    for backend in (TRITON, load("triton")):
        monkeypatch.setattr(backend, "row_kernels", "stepped")


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch, unlisted: None) -> None:
    """No row fits a tile: each is walked in steps of 512 or 1024 classes."""
    monkeypatch.setattr(plan, "TILE_CLASSES", 0)
    monkeypatch.setattr(plan, "TILE_CLASSES_GRAD", 0)
    monkeypatch.setattr(plan, "LOOP_UNROLL", 1)
    monkeypatch.setattr(plan, "LOOP_UNROLL_CROWDED", 1)
    monkeypatch.setattr(triton, "multiprocessors", lambda _: 1)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch, walked: None) -> None:
    """As `walked`, on a device with more multiprocessors than rows: each step is a part."""
    monkeypatch.setattr(triton, "multiprocessors", lambda _: 1000)


# ---- scores and gradients -----------------------------------------------------------------------


def small(case: Case) -> Case:
    return shrunk(case, samples=3, classes=1200 if case.classes > 1000 else 37)


SERVED = [small(case) for case in CASES if case.dtype != torch.float64]


def test_row_kernels_are_chosen_by_argument_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMP_FAST_TRITON_ROWS", raising=False)
    assert triton.TritonBackend().row_kernels == "auto"
    assert triton.TritonBackend("plain").row_kernels == "plain"
    monkeypatch.setenv("EMP_FAST_TRITON_ROWS", "stepped")
    assert triton.TritonBackend().row_kernels == "stepped"
    assert triton.TritonBackend("plain").row_kernels == "plain"
    with pytest.raises(ValueError, match=r"row_kernels must be one of .*'stepped'\], got 'ring'"):
        triton.TritonBackend("ring")
    monkeypatch.setenv("EMP_FAST_TRITON_ROWS", "ring")
    with pytest.raises(ValueError, match=r"EMP_FAST_TRITON_ROWS must be .* got 'ring'"):
        triton.TritonBackend()


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_stepped_rows_agree_with_the_oracle(case: Case, stepped: None) -> None:
    test_functional.assert_fields(case)
    test_functional.assert_gradient(case)


EACH_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str
)


def assert_step(case: Case, options: LossOptions, kernel: str) -> None:
    """Without class weights, by ``kernel``: the scores and the gradient of the reference."""
    logits, target, _ = make(case)
    indices, row_scale = torch.arange(case.rows), torch.linspace(0.1, 1.0, case.rows)

    def step(backend: Backend, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arguments = (given, target, None, options, row_scale, 0.5, indices, make_state(case.rows))
        scores, grad = backend.cross_entropy_step(*arguments, RULES["ema"])
        return *scores, grad.float()

    got: list[tuple[torch.Tensor, ...]] = []
    launches = launched(lambda: got.append(step(TRITON, logits)))
    assert launches == [kernel, "update_state"]
    wanted = step(ReferenceBackend(), logits.float())
    torch.testing.assert_close(got[0][:-1], wanted[:-1], rtol=1e-5, atol=1e-6, equal_nan=True)
    rounding = 1e-5 + torch.finfo(case.dtype).eps / 2
    torch.testing.assert_close(got[0][-1], wanted[-1], rtol=rounding, atol=1e-7, equal_nan=True)


@EACH_DTYPE
@pytest.mark.parametrize(
    ("rows", "classes"),  # several rows a step and one, of every alignment, by one warp and by more
    [
        (67, 33),
        (67, 40),
        (35, 100),
        (35, 104),
        (11, 257),
        (5, 512),
        (35, 1000),
        (3, 1001),
        (3, 4096),
        (3, 8190),
    ],
)
def test_steps_of_any_shape_give_scores_and_gradient(
    rows: int, classes: int, dtype: torch.dtype, stepped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "STEP_UPDATE_ROWS", 0)
    for kind in ("_AHEAD_GRAD", "_SHARED"):  # that many share a row of 4096 or 8190
        monkeypatch.setattr(plan, f"ROWS_WARPS{kind}", 8)
    case = Case("steps", rows, classes, dtype=dtype, logits="nan_row", ignored="some")
    assert_step(case, LossOptions(), "score_rows")


@EACH_DTYPE
@pytest.mark.parametrize("row_kernels", triton.TritonBackend.row_kernel_names)
def test_each_choice_of_row_kernels_takes_its_own(
    row_kernels: str, dtype: torch.dtype, filled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "STEP_UPDATE_ROWS", 0)
    for backend in (TRITON, load("triton")):
        monkeypatch.setattr(backend, "row_kernels", row_kernels)
    case = Case("chosen", 35, 100, dtype=dtype, logits="nan_row", ignored="some")
    logits, target, _ = make(case)
    in_steps = row_kernels != "plain"
    launches = launched(lambda: test_functional.cross_entropy(logits, target))
    assert launches == ["score_rows" if in_steps else "score_tile"]
    test_functional.assert_fields(case)
    in_steps = row_kernels == "stepped" or (row_kernels == "auto" and dtype != torch.float32)
    assert_step(case, LossOptions(), "score_rows" if in_steps else "score_tile")


def test_by_default_short_rows_options_and_small_steps_are_not_taken_in_steps(
    filled: None,
) -> None:
    def scored(classes: int, **options: object) -> list[str]:
        logits, target, _ = make(Case("apart", 35, classes, dtype=torch.bfloat16))
        return launched(lambda: test_functional.cross_entropy(logits, target, **options))

    assert scored(33) == ["score_rows"]
    assert scored(32) == scored(33, label_smoothing=0.1) == ["score_tile"]
    assert scored(33, softcap=5.0) == scored(33, weight=torch.ones(33)) == ["score_tile"]
    logits = torch.randn(9, 37, dtype=torch.bfloat16, requires_grad=True)
    pruner, target = Pruner(9), torch.arange(9)
    assert launched(lambda: pruner.loss(logits, target, target))[0] == "score_tile"


@EACH_DTYPE
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("classes", [37, 1200])
def test_walked_rows_give_scores_and_gradient(
    classes: int, softcap: float, dtype: torch.dtype, walked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "STEP_UPDATE_ROWS", 0)
    case = Case("walked", 9, classes, dtype=dtype, logits="nan_row", ignored="some")
    assert_step(case, LossOptions(softcap=softcap), "score_loop")


def test_an_ignored_row_has_no_gradient_whatever_the_class_weights(walked: None) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.ones(40)
    weight[1] = torch.inf
    stats = test_functional.cross_entropy(
        logits, torch.tensor([-100, 0, 2]), weight=weight, label_smoothing=0.1
    )
    (grad,) = torch.autograd.grad(stats.loss.sum(), logits)
    assert (grad[0] == 0).all()
    assert not grad[1:].isfinite().all(1).any()  # the weight is felt where it should be


@pytest.mark.parametrize("offset", [0.0, 2.0**20, -(2.0**20), 1e30, -1e30, 3.3e38])
@pytest.mark.parametrize("spread", [1.0, 2.0**17, 1e29])
def test_16_bit_logits_of_any_size(offset: float, spread: float, stepped: None) -> None:
    logits, target, _ = make(Case("large", 5, 300))
    large = (logits * spread + offset).bfloat16()
    large = large.clamp(-torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).max)
    launches = launched(lambda: test_functional.cross_entropy(large, target))
    assert launches == ["score_rows"]
    got = test_functional.cross_entropy(large, target)
    test_functional.assert_stats(got, test_functional.oracle(large, target)[0])


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_walked_rows_agree_with_the_oracle(case: Case, walked: None) -> None:
    test_functional.assert_fields(case)
    test_functional.assert_gradient(case)


SPLIT = [case for case in SERVED if case.classes > 1000 and case.target == "ids"]


@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
def test_split_rows_agree_with_the_oracle(case: Case, split: None) -> None:
    logits, target, options = make(case)
    assert launched(lambda: test_functional.cross_entropy(logits, target, **options)) == [
        "part_sums",
        "merge_parts",
    ]
    test_functional.assert_fields(case)
    test_functional.assert_gradient(case)


@pytest.mark.parametrize("classes", [2, 17, 100, 513, 4096, 4097])
@pytest.mark.parametrize("rows", [1, 67, 131])
def test_tiles_of_any_number_of_rows(classes: int, rows: int) -> None:
    samples = min(rows, 3) if classes > 4000 else rows
    case = Case(f"tiles_{classes}", samples, classes, dtype=torch.bfloat16)
    test_functional.assert_fields(case)
    test_functional.assert_gradient(case)


# ---- the step -----------------------------------------------------------------------------------

RULES = {
    "ema": Recurrence("ema", "entropy", 0.9, "loss", direct_scale=1.0, memory_scale=0.3),
    "mean": Recurrence("mean", "margin", memory_scale=-1.0),
    "variance": Recurrence("variance", "loss", 0.8, "el2n", 0.5, 1.0, 0.25),
}
#: Each path by the fixtures and the limit that lead there, and by what it launches.
PATHS = {
    "one launch": (None, 1024, ["score_tile"]),
    "state apart": (None, 4, ["score_tile", "update_state"]),
    "walked": ("walked", 1024, ["score_loop"]),
    "walked, state apart": ("walked", 4, ["score_loop", "update_state"]),
    "split": ("split", 1024, ["part_sums", "merge_parts", "gradient_loop", "update_state"]),
}


def make_state(num_samples: int) -> State:
    return State(
        scores=torch.full((num_samples,), torch.inf),
        memory=torch.zeros(num_samples),
        visits=torch.zeros(num_samples, dtype=torch.int32),
        variance=torch.zeros(num_samples),
        claims=torch.zeros(num_samples, dtype=torch.int32),
        counters=torch.zeros(2, dtype=torch.int64),
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", RULES)
def test_every_path_takes_the_step_of_the_reference(
    path: str, rule: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    fixture, most_rows, kernels = PATHS[path]
    if fixture is not None:
        request.getfixturevalue(fixture)
    monkeypatch.setattr(plan, "STEP_UPDATE_ROWS", most_rows)
    classes = 1200 if path == "split" else 37
    logits, target, _ = make(Case(f"step_{classes}", 9, classes, logits="nan_row", ignored="some"))
    indices = torch.tensor([3, 1, 3, 11, 4, 7, 7, 7, 3])
    options = LossOptions(label_smoothing=0.1, softcap=30.0)
    weight = torch.linspace(0.5, 1.5, classes)
    results = []

    def step(backend: Backend) -> None:
        state = make_state(12)
        for row_scale, scale in ((None, 0.125), (torch.linspace(0.1, 1.0, 9), 1.0)):
            arguments = (logits, target, weight, options, row_scale, scale, indices, state)
            scores, grad = backend.cross_entropy_step(*arguments, RULES[rule])
        made = backend.mean_step(
            logits, target, weight, options, row_scale, indices, state, RULES[rule]
        )
        assert made.factor is not None
        backend.scale_(made.grad, made.factor, None)
        results.append((*scores, grad, made.mean, made.grad, *state))

    step(ReferenceBackend())
    assert launched(lambda: step(TRITON)) == [*kernels, "mean_loss", "scale_gradient"]
    wanted, got = results
    if rule != "variance":
        wanted, got = ([*r[:-3], *r[-2:]] for r in (wanted, got))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_an_update_interrupted_between_its_launches_leaves_no_claims(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C while the second kernel is being compiled; a later update would lose to the claims."""
    monkeypatch.setattr(plan, "ONE_PROGRAM_ROWS", 2)
    state, values = make_state(6), torch.linspace(1, 2, 5)

    def interrupted(*arguments: object) -> None:
        if arguments[4][0] == state_kernels.APPLY.value:  # type: ignore[index]
            raise KeyboardInterrupt
        launch(*arguments)  # type: ignore[arg-type]

    launch = triton.launch
    update = (torch.tensor([5, 1, 2, 1, 4]), values, values, None, state, RULES["ema"])
    with monkeypatch.context() as during:
        during.setattr(triton, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            TRITON.update_state(*update)
    assert not state.claims.any()
    TRITON.update_state(torch.tensor([4, 5, 0]), *(values[:3],) * 2, None, state, RULES["ema"])
    assert state.visits.tolist() == [1, 0, 0, 0, 1, 1]


def test_a_training_step_is_three_launches() -> None:
    logits = torch.randn(9, 37, dtype=torch.bfloat16, requires_grad=True)
    pruner, target = Pruner(9), torch.arange(9)
    loss_and_gradient = launched(lambda: pruner.loss(logits, target, target).backward())
    assert loss_and_gradient == ["score_tile", "mean_loss", "scale_gradient"]


@pytest.mark.parametrize("counted", ["all", "some", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("programs", [2, 256])
def test_several_programs_share_many_rows(
    counted: str, weighted: bool, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MEAN_PROGRAMS", programs)
    rows = plan.MEAN_ROWS + 1
    share = launched(lambda: test_fused_step.assert_mean(TRITON, rows, counted, weighted))
    assert share == ["sum_losses", "mean_loss"]
    alone = launched(lambda: test_fused_step.assert_mean(TRITON, rows - 1, counted, weighted))
    assert alone == ["mean_loss"]


def test_a_program_scales_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SCALE_PROGRAMS", 2)
    test_fused_step.assert_scaled(TRITON, torch.bfloat16, 4 * plan.SCALE_BLOCK + 3, -1.5)


# ---- selection ----------------------------------------------------------------------------------


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are sampled from 4096 of them on."""
    monkeypatch.setattr(plan, "SAMPLE_FROM", 4096)
    monkeypatch.setattr(plan, "SAMPLES", 1024)


@pytest.mark.parametrize("distribution", test_selection.DISTRIBUTIONS)
def test_sampled_selection_is_the_stable_sort(distribution: str, sampled: None) -> None:
    scores = test_selection.make(distribution, 20_001)  # three blocks of a bitmap
    for k in (1, 6000, 20_000):
        wanted = test_selection.oracle(scores, k)
        got = TRITON.topk_indices(torch.from_numpy(scores), k).numpy()
        np.testing.assert_array_equal(got, wanted, err_msg=f"{k=}")


MARKED = ["philox", "mark_scores"]
SOLVED = [*MARKED, "histogram", "mark_candidates", "expand_marked"]
READ_AGAIN = [*MARKED, "histogram", "expand_marked"]


@pytest.mark.parametrize(
    ("distribution", "k", "share", "kernels"),
    [
        ("normal", 1, 32, SOLVED),  # in no sample: the bracket ends above all scores
        ("normal", 100, 32, SOLVED),
        ("normal", 40_020, 32, SOLVED),  # nor are the last two: here it ends below all
        ("normal", 100, 10**6, READ_AGAIN),  # the candidates overflow
        ("constant", 100, 32, [*MARKED, "expand_marked"]),  # too many, but all alike
    ],
)
def test_candidates_are_solved_or_read_again(
    distribution: str,
    k: int,
    share: int,
    kernels: list[str],
    sampled: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "CANDIDATE_SHARE", share)
    # Samples enough for a bracket of less than one score in 32.
    monkeypatch.setattr(plan, "SAMPLES", 16_384)
    scores = test_selection.make(distribution, 40_021)
    got = []
    assert launched(lambda: got.append(TRITON.topk_indices(torch.from_numpy(scores), k))) == kernels
    np.testing.assert_array_equal(got[0].numpy(), test_selection.oracle(scores, k))


def test_candidates_are_solved_in_any_order(sampled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device the programs of `mark_scores` collect them in the order in which they end."""

    def turned(*arguments: object, **options: object) -> tuple[object, ...]:
        marks, *counts = mark(*arguments, **options)  # type: ignore[arg-type]
        return marks._replace(keys=marks.keys.flip(0), indices=marks.indices.flip(0)), *counts

    mark = _triton_selection._mark
    monkeypatch.setattr(_triton_selection, "_mark", turned)
    monkeypatch.setattr(plan, "CANDIDATE_SHARE", 1)
    scores = test_selection.make("few values", 9001)
    above, ties = int((scores > 1).sum()), int((scores == 1).sum())
    for k in (above + 1, above + ties // 2, above + ties):
        got = TRITON.topk_indices(torch.from_numpy(scores), k).numpy()
        np.testing.assert_array_equal(got, test_selection.oracle(scores, k), err_msg=f"{k=}")


def test_the_sample_reaches_the_last_scores(sampled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strata of equal length would leave out up to a fifth of the scores, all at the end."""
    monkeypatch.setattr(plan, "CANDIDATE_SHARE", 4)
    scores = test_selection.make("normal", 5 * plan.SAMPLES - 1)
    scores[4 * plan.SAMPLES :] += 10
    got = []
    kernels = launched(lambda: got.append(TRITON.topk_indices(torch.from_numpy(scores), 2000)))
    assert kernels == SOLVED
    np.testing.assert_array_equal(got[0].numpy(), test_selection.oracle(scores, 2000))


@pytest.mark.parametrize("ranks", [(-1, 3), (1000, 1024)])
def test_a_sample_that_missed_costs_another_read(
    ranks: tuple[int, int], sampled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bracket, "sample_ranks", lambda *_: ranks)
    scores = test_selection.make("normal", 9001)
    got = []
    kernels = launched(lambda: got.append(TRITON.topk_indices(torch.from_numpy(scores), 4000)))
    assert kernels == READ_AGAIN
    np.testing.assert_array_equal(got[0].numpy(), test_selection.oracle(scores, 4000))


def test_a_bracket_just_below_the_kth_score_has_missed_it(
    sampled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bracket, "sample_ranks", lambda *_: (1000, 1024))
    scores = test_selection.make("two values", 9001)
    k = int(scores.sum())
    got = []
    kernels = launched(lambda: got.append(TRITON.topk_indices(torch.from_numpy(scores), k)))
    assert kernels == READ_AGAIN
    np.testing.assert_array_equal(got[0].numpy(), test_selection.oracle(scores, k))


@pytest.mark.parametrize(("distribution", "reads"), [("normal", 1), ("few values", 2)])
def test_scores_are_marked_again_only_for_ties_beyond_the_kth(
    distribution: str, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = mock.Mock(wraps=_triton_selection._mark)
    monkeypatch.setattr(_triton_selection, "_mark", mark)
    TRITON.topk_indices(torch.from_numpy(test_selection.make(distribution, 300)), 100)
    assert mark.call_count == reads


def test_all_scores_and_none_are_selected_without_a_launch() -> None:
    scores, groups = torch.arange(6.0), torch.tensor([1, 0, 1, 2, 1, 0])
    for quotas in ([0, 0, 0], [2, 3, 1]):
        group_k, every = torch.tensor(quotas), torch.arange(sum(quotas))
        for select in (
            lambda k=group_k: TRITON.topk_indices(scores, int(k.sum())),
            lambda k=group_k: TRITON.grouped_topk_indices(scores, groups, k),
        ):
            got: list[torch.Tensor] = []
            assert launched(lambda got=got, select=select: got.append(select())) == []
            assert torch.equal(got[0], every)


def test_a_selection_that_would_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton_selection, "is_capturing", lambda _: True)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture a selection by the triton"):
        TRITON.topk_indices(torch.randn(5), 2)


@pytest.mark.parametrize(
    ("num_groups", "kernels"),
    [
        (4, ["group_histogram", "mark_grouped", "expand_marked"]),
        (5, []),
        (20, []),
    ],
)
def test_many_groups_of_few_scores_are_sorted(
    num_groups: int, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_GROUPS", 4)
    rng = np.random.default_rng(0)
    scores, groups = test_selection.make("few values", 200), rng.integers(0, num_groups, 200)
    quotas = test_selection.quotas_of(groups, num_groups, rng)
    got = []
    assert (
        launched(lambda: got.append(test_selection.grouped("triton", scores, groups, quotas)))
        == kernels
    )
    np.testing.assert_array_equal(got[0], test_selection.grouped_oracle(scores, groups, quotas))


def test_many_groups_of_many_scores_have_histograms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_GROUPS", 4)
    groups = np.arange(5 * plan.SORTED_PER_GROUP) % 5
    scores = test_selection.make("normal", len(groups))
    kernels = launched(lambda: test_selection.grouped("triton", scores, groups, [7] * 5))
    assert "group_histogram" in kernels


def test_groups_of_more_scores_than_their_keys_can_number_are_refused() -> None:
    scores = torch.empty(1, device="meta").expand(2**32 + 1)
    with pytest.raises(ValueError, match=r"at most 2\*\*32 elements with groups, got 4294967297"):
        grouped_topk_indices(scores, scores, torch.tensor([1]))
