"""ScoreStore against a plain Python model of it, on every backend that serves the CPU."""

import io
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import emp_fast
from emp_fast import EmpFastWarning, ScoreStore
from emp_fast.backends.base import OUT_OF_RANGE
from emp_fast.candidates import groups_of
from emp_fast.functional import cross_entropy
from emp_fast.policies import BelowMean, EpsilonGreedy, TopK
from emp_fast.rules import (
    AUM,
    EL2N,
    EMP,
    RHO,
    UCB,
    DynUnc,
    Entropy,
    Forgetting,
    GraNd,
    Loss,
    Margin,
    Recurrence,
    Rule,
)


def stats_of(samples: int, seed: int = 0, classes: int = 5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator)
    return cross_entropy(logits, torch.randint(classes, (samples,), generator=generator))


class Model:
    """What a store does, one sample at a time, in float64."""

    def __init__(self, samples: int, decay: float, beta: float) -> None:
        self.decay, self.beta = decay, beta
        self.scores = [math.inf] * samples
        self.memory = [0.0] * samples
        self.visits = [0] * samples
        self.nonfinite = 0

    def update(self, indices, loss, entropy, count) -> None:
        if any(not 0 <= i < len(self.scores) for i in indices):
            raise IndexError
        last = {}
        for i, row_loss, row_entropy, valid in zip(indices, loss, entropy, count, strict=True):
            if valid == 0:
                continue
            if not (math.isfinite(row_loss) and math.isfinite(row_entropy)):
                self.nonfinite += 1
                continue
            last[i] = row_loss, row_entropy
        for i, (row_loss, row_entropy) in last.items():
            kept = self.decay * self.memory[i] + (1 - self.decay) * row_entropy
            self.memory[i] = kept if self.visits[i] else row_entropy
            self.scores[i] = row_loss + self.beta * self.memory[i]
            self.visits[i] += 1


values = st.one_of(st.floats(-100, 100, width=32), st.sampled_from([math.nan, math.inf, -math.inf]))
rows = st.tuples(st.integers(-1, 6), values, values, st.integers(0, 2))


# The fixture only names the backend: nothing of it changes between examples.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    updates=st.lists(st.lists(rows, max_size=12), max_size=5),
    decay=st.sampled_from([0.0, 0.5, 0.9]),
    beta=st.sampled_from([0.0, 0.3, -2.0]),
)
def test_a_store_does_what_the_model_does(backend, updates, decay, beta):
    store = ScoreStore(6, EMP(beta, decay))
    model = Model(6, decay, beta)
    for update in updates:
        indices, loss, entropy, count = ([row[c] for row in update] for c in range(4))
        given_stats = {
            "loss": torch.tensor(loss, dtype=torch.float32),
            "entropy": torch.tensor(entropy, dtype=torch.float32),
            "count": torch.tensor(count, dtype=torch.int32),
        }
        try:
            model.update(indices, loss, entropy, count)
        except IndexError:
            before = store.state_dict()["tensors"]
            with pytest.raises(IndexError, match=r"indices must lie in \[0, 6\), got"):
                store.update(torch.tensor(indices, dtype=torch.int64), given_stats)
            after = store.state_dict()["tensors"]
            assert all(torch.equal(before[name], after[name]) for name in before)
        else:
            store.update(torch.tensor(indices, dtype=torch.int64), given_stats)
    assert store.visits.tolist() == model.visits
    assert store.num_nonfinite == model.nonfinite
    torch.testing.assert_close(
        store.scores.double(), torch.tensor(model.scores).double(), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        store.memory.double(), torch.tensor(model.memory).double(), rtol=1e-5, atol=1e-4
    )


def test_a_new_store_has_visited_nothing():
    store = ScoreStore(3)
    assert store.scores.tolist() == [math.inf] * 3
    assert store.memory.tolist() == [0.0] * 3
    assert store.visits.tolist() == [0] * 3
    assert store.scores.dtype == store.memory.dtype == torch.float32
    assert store.visits.dtype == torch.int32
    assert store.rule == EMP()


def visit_one(rule: Rule, history: list[dict[str, float]]) -> ScoreStore:
    """Sample 1 of 3 sees ``history``; the others see nothing."""
    store = ScoreStore(3, rule)
    for seen in history:
        store.update(torch.tensor([1]), {name: torch.tensor([x]) for name, x in seen.items()})
    assert store.visits.tolist() == [0, len(history), 0]
    assert store.scores[0] == store.scores[2] == math.inf
    return store


def test_emp_adds_the_memory_term(backend):
    history = [{"loss": 1.0, "entropy": 2.0}, {"loss": 3.0, "entropy": 1.0}]
    store = visit_one(EMP(beta=0.5, decay=0.75), history)
    assert store.memory[1].item() == pytest.approx(0.75 * 2 + 0.25 * 1)
    assert store.scores[1].item() == pytest.approx(3 + 0.5 * 1.75)


@pytest.mark.parametrize(
    ("rule", "stat", "sign"),
    [(Loss, "loss", 1), (Entropy, "entropy", 1), (EL2N, "el2n", 1), (Margin, "margin", -1)],
)
@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_one_stat_and_its_moving_average(backend, rule, stat, sign, decay):
    store = visit_one(rule(decay), [{stat: 2.0}, {stat: -1.0}])
    assert store.scores[1].item() == pytest.approx(sign * (decay * 2 + (1 - decay) * -1))


def test_aum_is_the_mean_margin_over_all_visits(backend):
    store = visit_one(AUM(), [{"margin": m} for m in (3.0, -1.0, 7.0, 4.0)])
    assert store.memory[1].item() == pytest.approx(3.25)
    assert store.scores[1].item() == pytest.approx(-3.25)


def test_ucb_is_mean_plus_variance(backend):
    a, mean, variance = 0.3, 2.0, 0.0
    for loss in (5.0, 1.0):
        variance = (1 - a) * variance + a * (loss - mean) ** 2
        mean = (1 - a) * mean + a * loss
    store = visit_one(UCB(c=0.5, decay=0.7), [{"loss": x} for x in (2.0, 5.0, 1.0)])
    assert store.scores[1].item() == pytest.approx(mean + 0.5 * variance, rel=1e-5)


def test_forgetting_counts_falls_from_right_to_wrong():
    def score(*history):
        store = ScoreStore(1, Forgetting())
        for correct in history:
            store.update(torch.tensor([0]), {"correct": torch.tensor([correct])})
        return store.scores.item()

    assert score(False, False) == math.inf  # never learned
    assert score(True, True) == 0
    assert score(False, True, False, True, False) == 2


class Learned(Rule):
    """A recurrence of the bool."""

    reads = ("correct",)

    def recurrence(self):
        return Recurrence("mean", "correct")


@pytest.mark.parametrize("rule", [Forgetting(), Learned()])
def test_a_row_of_nan_is_neither_right_nor_wrong(rule):
    logits = torch.tensor([[5.0, 0.0], [5.0, 0.0]])
    target = torch.tensor([0, 0])
    store = ScoreStore(2, rule)
    store.update(torch.arange(2), cross_entropy(logits, target))
    before = store.scores.clone()
    logits[1] = torch.nan
    store.update(torch.arange(2), cross_entropy(logits, target))
    assert torch.equal(store.scores, before)
    assert store.visits.tolist() == [2, 1]
    assert store.num_nonfinite == 1


def test_a_sample_never_learned_ranks_below_one_never_visited():
    store = ScoreStore(3, Forgetting())
    store.update(torch.tensor([0, 1]), {"correct": torch.tensor([False, True])})
    assert store.select(1).indices.tolist() == [2]
    assert store.select(2).indices.tolist() == [0, 2]


def test_grand_is_el2n_times_the_norm_of_the_features():
    store = ScoreStore(2, GraNd())
    hidden = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    store.update(torch.tensor([1, 0]), {"el2n": torch.tensor([0.5, 1.0])}, hidden=hidden)
    assert store.scores.tolist() == pytest.approx([1.0, 0.5 * math.sqrt(26)])


def test_grand_is_the_norm_of_the_last_layers_gradient():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 6, generator=generator)
    layer = torch.nn.Linear(6, 3)
    target = torch.tensor([0, 2, 1, 1])
    store = ScoreStore(4, GraNd())
    store.update(torch.arange(4), cross_entropy(layer(hidden), target), hidden=hidden)
    for i in range(4):
        loss = torch.nn.functional.cross_entropy(layer(hidden[i : i + 1]), target[i : i + 1])
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert store.scores[i].item() == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("window", [2, 3])
def test_dyn_unc_is_the_mean_deviation_of_sliding_windows(window):
    history = [0.1, 0.5, 0.2, 0.9, 0.4]
    store = visit_one(DynUnc(window), [{"confidence": p} for p in history])
    spans = [torch.tensor(history[i : i + window]) for i in range(len(history) - window + 1)]
    wanted = torch.stack([span.std() for span in spans]).mean()
    assert store.scores[1].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_rho_subtracts_the_irreducible_loss():
    store = ScoreStore(2, RHO(torch.tensor([0.5, 2.0])))
    store.update(torch.tensor([0, 1]), {"loss": torch.tensor([3.0, 1.0])})
    assert store.scores.tolist() == [2.5, -1.0]


class Focal(Rule):
    reads = ("loss", "confidence")

    def buffers(self, num_samples, device):
        return {"last": torch.zeros(num_samples, 2, device=device)}

    def step(self, stats, state):
        last = torch.stack([stats["loss"], stats["confidence"]], 1)
        return {"score": (1 - stats["confidence"]) ** 2 * stats["loss"], "last": last}

    def __repr__(self):
        return "Focal()"


def test_a_users_own_rule():
    store = ScoreStore(5, Focal())
    stats = stats_of(3)
    store.update(torch.tensor([4, 0, 4]), stats)
    wanted = (1 - stats.confidence) ** 2 * stats.loss
    assert store.scores[[0, 4]].tolist() == wanted[1:].tolist()
    assert store.visits.tolist() == [1, 0, 0, 0, 1]


def test_a_rule_whose_score_is_nan_is_refused_and_counted():
    class Broken(Focal):
        def step(self, stats, state):
            return {"score": torch.where(stats["loss"] > 1, torch.nan, stats["loss"])}

    store = ScoreStore(3, Broken())
    confidence = torch.zeros(4)
    loss = torch.tensor([0.5, 2.0, 3.0, 4.0])
    store.update(torch.tensor([0, 1, 2, 2]), {"loss": loss, "confidence": confidence})
    assert store.scores.tolist() == [0.5, math.inf, math.inf]
    assert store.visits.tolist() == [1, 0, 0]
    assert store.num_nonfinite == 2  # a sample each: of sample 2 only its last row was tried


def test_a_rule_that_returns_an_unknown_name_changes_nothing():
    class Unknown(Focal):
        def step(self, stats, state):
            return {"score": stats["loss"], "momentum": stats["loss"]}

    store = ScoreStore(2, Unknown())
    with pytest.raises(ValueError, match="'momentum'"):
        store.update(torch.tensor([0]), {"loss": torch.ones(1), "confidence": torch.ones(1)})
    assert store.visits.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda loss: loss, TypeError, "must return a dict of tensors, got Tensor"),
        (lambda loss: {"score": loss.mean()}, ValueError, r"'score'\] must have shape \(2,\)"),
        (lambda loss: {"score": loss[:1]}, ValueError, r"must have shape \(2,\), got \(1,\)"),
        (lambda loss: {"score": 1.0}, TypeError, r"'score'\] must be a torch.Tensor, got float"),
    ],
)
def test_a_rule_that_returns_no_row_for_each_sample_changes_nothing(returned, error, message):
    class Broken(Focal):
        def step(self, stats, state):
            return returned(stats["loss"])

    store = ScoreStore(2, Broken())
    with pytest.raises(error, match=message):
        store.update([0, 1], {"loss": torch.ones(2), "confidence": torch.ones(2)})
    assert store.scores.tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"reads": "loss"}, TypeError, "rule.reads must be a tuple of names, got 'loss'"),
        ({"reads": None}, TypeError, "rule.reads must be a tuple of names, got None"),
        (
            {"recurrence": lambda self: Recurrence("ema", "margin", direct="loss")},
            ValueError,
            r"rule.reads must name what rule.recurrence\(\) reads, \['margin'\]",
        ),
        (
            {"recurrence": lambda self: Recurrence("median", "loss")},
            ValueError,
            "kind of a Recurrence must be one of 'ema', 'mean', 'variance', got .*'median'",
        ),
        (
            {"recurrence": lambda self: Recurrence("ema", "loss", decay=2.0)},
            ValueError,
            r"decay of a Recurrence must lie in \[0, 1\), got .*decay=2.0",
        ),
        (
            {"recurrence": lambda self: Recurrence("ema", "loss", memory_scale=1e39)},
            ValueError,
            r"scales of a Recurrence must be finite numbers, got .*1e\+39",
        ),
        (
            {"step": Rule.step},
            TypeError,
            r"rule must override step\(\) or recurrence\(\), got Focal",
        ),
        ({"buffers": lambda *_: [torch.zeros(2)]}, TypeError, "must return a dict, got list"),
        ({"buffers": lambda *_: {"a": 1}}, TypeError, r"buffers\(\)\['a'\] must be a torch.Tensor"),
        ({"buffers": lambda *_: {"a": torch.zeros(3)}}, ValueError, "must have 2 rows"),
        ({"buffers": lambda *_: {"score": torch.zeros(2)}}, ValueError, "must not have 'score'"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_at_once(named, error, message):
    rule = type("Broken", (Focal,), named)()
    with pytest.raises(error, match=message):
        ScoreStore(2, rule)


def test_tensor_code_and_kernels_resolve_repeats_alike(backend):
    class Plain(Rule):
        def step(self, stats, state):
            return {"score": stats["loss"]}

    indices = torch.tensor([3, 1, 3, 2, 1, 0])
    loss = torch.tensor([1.0, 2.0, 3.0, 4.0, math.nan, 6.0])
    count = torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.int32)
    stores = []
    for rule in (Plain(), Loss()):
        store = ScoreStore(5, rule)
        store.update(indices, {"loss": loss, "count": count})
        stores.append(store)
    assert stores[0].scores.tolist() == [6.0, 2.0, math.inf, 3.0, math.inf]
    assert torch.equal(stores[0].scores, stores[1].scores)
    assert torch.equal(stores[0].visits, stores[1].visits)
    assert stores[0].num_nonfinite == stores[1].num_nonfinite == 1


def test_infinite_margin_of_a_single_class_is_refused_only_by_rules_that_read_it():
    stats = cross_entropy(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    emp, margin = ScoreStore(2, EMP()), ScoreStore(2, Margin())
    emp.update(torch.arange(2), stats)
    margin.update(torch.arange(2), stats)
    assert emp.visits.tolist() == [1, 1]
    assert margin.visits.tolist() == [0, 0]
    assert margin.num_nonfinite == 2


def test_non_finite_values_warn_once_at_the_next_selection():
    store = ScoreStore(3, Loss())
    store.update(torch.tensor([0, 1]), {"loss": torch.tensor([math.nan, math.inf])})
    with pytest.warns(EmpFastWarning, match="^2 rows with non-finite stats were refused since"):
        store.select(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.select(1)
        store.update(torch.tensor([0]), {"loss": torch.tensor([1.0])})
        store.select(1)
    store.update(torch.tensor([0]), {"loss": torch.tensor([math.nan])})
    with pytest.warns(EmpFastWarning, match="^1 row with non-finite stats was refused since"):
        store.select(1)


def test_rows_refused_before_a_snapshot_are_not_warned_of_after_it():
    bad = {"loss": torch.tensor([math.nan, 1.0])}
    store, other = ScoreStore(2, Loss()), ScoreStore(2, Loss())
    store.update(torch.arange(2), bad)
    other.load_state_dict(store.state_dict())
    other.select(1)
    other.update(torch.arange(2), bad)
    with pytest.warns(EmpFastWarning, match="^1 row"):
        other.select(1)
    other.load_state_dict(ScoreStore(2, Loss()).state_dict())
    other.update(torch.arange(2), bad)
    with pytest.warns(EmpFastWarning, match="^1 row"):
        other.select(1)


def test_rows_that_a_device_refused_as_out_of_range_raise_at_the_next_selection():
    store = ScoreStore(3, Loss())
    store._samples.state.counters[OUT_OF_RANGE] = 2  # as a kernel on a GPU leaves it
    with pytest.raises(IndexError, match=r"\[0, 3\): 2 rows of earlier updates"):
        store.select(1)
    assert len(store.select(1).indices) == 1


@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
def test_a_rule_may_write_to_its_rows_in_place(backend_name):
    class InPlace(Rule):
        reads = ("loss",)

        def step(self, stats, state):
            state["memory"].add_(stats["loss"])
            state["visits"].add_(1)
            score = torch.where(stats["loss"] == 9, math.nan, 2 * state["memory"])
            return {"score": score, "memory": state["memory"]}

    with emp_fast.use_backend(backend_name):
        store = ScoreStore(3, InPlace())
        store.update(torch.tensor([0, 1]), {"loss": torch.tensor([1.0, math.nan])})
        store.update(torch.tensor([0, 2, 0]), {"loss": torch.tensor([2.0, 5.0, 4.0])})
        store.update(torch.tensor([1]), {"loss": torch.tensor([9.0])})
    assert store.memory.tolist() == [5.0, 0.0, 5.0]
    assert store.scores.tolist() == [10.0, math.inf, 10.0]
    assert store.visits.tolist() == [2, 0, 1]


def test_the_visits_of_a_rule_of_tensor_code_saturate():
    store = ScoreStore(2, Forgetting())
    store.visits[:] = torch.tensor([2**31 - 1, 3])
    store.update(torch.arange(2), {"correct": torch.tensor([True, True])})
    assert store.visits.tolist() == [2**31 - 1, 4]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_any_integer_indices(dtype):
    store = ScoreStore(4, Loss())
    store.update(torch.tensor([2, 3], dtype=dtype), {"loss": torch.tensor([1.0, 2.0])})
    assert store.visits.tolist() == [0, 0, 1, 1]


def test_numbers_may_be_numpys():
    stats = stats_of(9)
    plain, numpys = ScoreStore(9), ScoreStore(np.int64(9))
    for store in (plain, numpys):
        store.update(torch.arange(9), stats)
    wanted = plain.select(4, EpsilonGreedy(0.5), epoch=2, seed=3).indices
    selected = numpys.select(np.int64(4), EpsilonGreedy(0.5), epoch=np.uint8(2), seed=np.int16(3))
    assert torch.equal(selected.indices, wanted)
    assert type(numpys.state_dict()["num_samples"]) is int


def test_strided_stats_and_indices():
    store = ScoreStore(4, Loss())
    loss = torch.tensor([[1.0, 9.0], [2.0, 9.0]])[:, 0]
    store.update(torch.tensor([3, 0, 1, 0])[::2], {"loss": loss})
    assert store.scores.tolist() == [math.inf, 2.0, math.inf, 1.0]


def test_an_empty_update_changes_nothing(backend):
    store = ScoreStore(2, EMP())
    store.update(torch.empty(0, dtype=torch.int64), stats_of(0))
    assert store.visits.tolist() == [0, 0]


ONE = {"loss": torch.ones(1), "entropy": torch.ones(1)}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ScoreStore(0), ValueError, "num_samples must be at least 1, got 0"),
        (lambda: ScoreStore(2.5), TypeError, "num_samples must be an int, got 2.5"),
        (lambda: ScoreStore(2, "emp"), TypeError, "rule must be an emp_fast.Rule, got 'emp'"),
        (lambda: ScoreStore(3, RHO(torch.ones(2))), ValueError, "3 samples, got 2"),
        (
            lambda: EMP(beta=math.nan),
            ValueError,
            "beta must be a finite number in float32, got nan",
        ),
        (lambda: EMP(decay=1.0), ValueError, r"decay must lie in \[0, 1\), got 1.0"),
        (lambda: Loss(-0.1), ValueError, r"decay must lie in \[0, 1\), got -0.1"),
        (lambda: DynUnc(1), ValueError, "window must be an int of at least 2, got 1"),
        (lambda: RHO(torch.tensor([1.0, math.inf])), ValueError, "got inf for sample 1"),
        (
            lambda: RHO(torch.tensor([1.0, 1e300], dtype=torch.float64)),
            ValueError,
            r"must be finite float32, got 1e\+300 for sample 1",
        ),
        (lambda: RHO([1.0]), TypeError, "irreducible must be a tensor, got list"),
        (
            lambda: ScoreStore(2).update(torch.tensor([0.0]), ONE),
            TypeError,
            "indices must be integers, got torch.float32",
        ),
        (
            lambda: ScoreStore(2).update(None, ONE),
            TypeError,
            "indices must be integers, got None",
        ),
        (
            lambda: ScoreStore(2).update([0], ONE, hidden=torch.ones(1)),
            TypeError,
            r"unexpected argument 'hidden': EMP.* reads the stats \['loss', 'entropy'\]",
        ),
        (
            lambda: ScoreStore(2).update([0], 0.5),
            TypeError,
            "stats must be SampleStats or a mapping of stats, got 0.5",
        ),
        (
            lambda: ScoreStore(2).update(torch.tensor([[0]]), ONE),
            ValueError,
            r"indices must have shape \[S\], got \(1, 1\)",
        ),
        (
            lambda: ScoreStore(2).update(torch.tensor([0, 1]), ONE),
            ValueError,
            r"stats\['loss'\] must have 2 rows.*got shape \(1,\)",
        ),
        (
            lambda: ScoreStore(2, Loss()).update(torch.tensor([0, 1]), {"loss": torch.ones(2, 3)}),
            ValueError,
            r"stats\['loss'\] must have shape \[2\], one value for each sample.*got \(2, 3\)",
        ),
        (
            lambda: ScoreStore(2, Focal()).update(
                [0], {"loss": torch.ones(1), "confidence": torch.ones(1, 1)}
            ),
            ValueError,
            r"stats\['confidence'\] must have shape \[1\]",
        ),
        (
            lambda: ScoreStore(2, Loss()).update([0], {"loss": torch.ones(1) * 1j}),
            TypeError,
            r"stats\['loss'\] must be real, got torch.complex64",
        ),
        (
            lambda: ScoreStore(2).update(torch.tensor([0]), {"loss": torch.ones(1)}),
            ValueError,
            r"stats must have 'entropy'.*got \['loss'\]",
        ),
        (
            lambda: ScoreStore(2).update(torch.tensor([2]), ONE),
            IndexError,
            r"indices must lie in \[0, 2\), got 2 at position 0",
        ),
        (lambda: ScoreStore(2).select(0), ValueError, r"k must lie in \[1, 2\], got 0"),
        (lambda: ScoreStore(2).select(3), ValueError, r"k must lie in \[1, 2\], got 3"),
        (lambda: ScoreStore(2).select(1.0), TypeError, "k must be an int, got 1.0"),
        (lambda: ScoreStore(2).select(None), ValueError, r"k must be an int for TopK\(\)"),
        (lambda: ScoreStore(2).select(1, BelowMean()), ValueError, "k must be None.*got 1"),
        (lambda: ScoreStore(2).select(1, "top"), TypeError, "policy must be.*got 'top'"),
        (lambda: ScoreStore(2).select(1, epoch=-1), ValueError, "epoch must be.*got -1"),
        (lambda: ScoreStore(2).select(1, seed=0.5), TypeError, "seed must be an int, got 0.5"),
        (
            lambda: ScoreStore(2).select(1, labels=torch.tensor([0])),
            ValueError,
            r"labels must have shape \[2\], got \(1,\)",
        ),
        (
            lambda: ScoreStore(2).select(1, labels=torch.tensor([0.0, 1.0])),
            TypeError,
            "labels must be integers, got torch.float32",
        ),
        (
            lambda: ScoreStore(2).select(1, labels=torch.tensor([0, 1]), balance="even"),
            ValueError,
            "balance must be 'equal' or 'proportional', got 'even'",
        ),
        (lambda: ScoreStore(2).select(1, balance="even"), ValueError, "balance must be"),
        (lambda: ScoreStore(2, device="gpu"), ValueError, "device must be.*got 'gpu'"),
        (lambda: ScoreStore(2).load_state_dict([]), TypeError, r"state must be.*got \[\]"),
    ],
)
def test_bad_input_names_the_argument_and_the_value(make, error, message):
    with pytest.raises(error, match=message):
        make()


RULES = [EMP(0.3, 0.5), AUM(), UCB(), Forgetting(), DynUnc(3), RHO(torch.ones(8)), Focal()]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_checkpoint_restores_every_bit_and_goes_on_alike(rule):
    stores = [ScoreStore(8, rule), ScoreStore(8, rule)]
    stores[0].update(torch.arange(6), stats_of(6))
    stores[0].update(torch.arange(6), stats_of(6, seed=1))
    file = io.BytesIO()
    torch.save(stores[0].state_dict(), file)
    file.seek(0)
    stores[1].load_state_dict(torch.load(file, weights_only=True))
    for store in stores:
        store.update(torch.tensor([7, 1, 2]), stats_of(3, seed=2))
    first, second = (store.state_dict() for store in stores)
    assert first["tensors"].keys() == second["tensors"].keys()
    for name, tensor in first["tensors"].items():
        assert torch.equal(tensor, second["tensors"][name]), name
    assert first["rows_seen"] == second["rows_seen"] == 15
    assert torch.equal(stores[0].select(5).indices, stores[1].select(5).indices)


def test_a_checkpoint_is_a_snapshot():
    store = ScoreStore(2, Loss())
    state = store.state_dict()
    store.update(torch.tensor([0]), {"loss": torch.tensor([1.0])})
    assert state["tensors"]["visits"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(num_samples=3), "num_samples.*must be 4, got 3"),
        (lambda s: s.update(rule="Loss(decay=0.5)"), "rule.*got 'Loss"),
        (lambda s: s.update(format=99), "format.*got 99"),
        (lambda s: s.pop("rows_seen"), "rows_seen.*got None"),
        (lambda s: s.update(rows_seen=True), "rows_seen.*must be a count, got True"),
        (lambda s: s["tensors"].pop("visits"), "must hold.*visits"),
        (lambda s: s["tensors"].update(memory=torch.zeros(3)), r"memory.*got torch.float32 \(3,\)"),
        (lambda s: s["tensors"].update(visits=torch.zeros(4)), "visits.*got torch.float32"),
        (lambda s: s["tensors"].update(scores=[1.0] * 4), "scores.*got "),
        (lambda s: s["tensors"]["visits"].fill_(-5), r"\['visits'\] must hold counts, got -5"),
        (lambda s: s["tensors"]["counters"].fill_(-4), r"\['counters'\] must hold counts, got -4"),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_nothing_changes(damage, message):
    store = ScoreStore(4, Loss())
    store.update(torch.arange(4), {"loss": torch.rand(4)})
    state = ScoreStore(4, Loss()).state_dict()
    damage(state)
    before = store.state_dict()
    with pytest.raises(ValueError, match=message):
        store.load_state_dict(state)
    after = store.state_dict()
    assert all(torch.equal(before["tensors"][n], after["tensors"][n]) for n in before["tensors"])


def test_updates_need_no_gradient_and_keep_none():
    store = ScoreStore(3)
    logits = torch.randn(3, 4, requires_grad=True)
    store.update(torch.arange(3), cross_entropy(logits, torch.tensor([0, 1, 2])))
    assert not store.scores.requires_grad


@pytest.mark.parametrize("rule", [EMP(), DynUnc()], ids=repr)
def test_a_store_that_began_in_inference_mode_goes_on_outside(backend, rule):
    with torch.inference_mode():
        store = ScoreStore(4, rule)
        store.update(torch.arange(4), stats_of(4))
        moved = ScoreStore(4, rule)
        moved._samples.move(torch.device("meta"))
    store.update(torch.arange(4), stats_of(4))
    store.load_state_dict(store.state_dict())
    assert store.visits.tolist() == [2, 2, 2, 2]
    assert not moved.scores.is_inference()


@pytest.mark.parametrize("rule", [EMP(), UCB(), DynUnc()], ids=repr)
@pytest.mark.parametrize(("saved", "loaded"), [(False, True), (True, False), (True, True)])
def test_a_state_loaded_in_inference_mode_or_from_it_is_updated_outside(
    backend, rule, saved, loaded
):
    with torch.inference_mode(saved):
        source = ScoreStore(4, rule)
        source.update(torch.arange(4), stats_of(4))
        state = source.state_dict()
    with torch.inference_mode(loaded):
        store = ScoreStore(4, rule)
        store.load_state_dict(state)
    assert not any(tensor.is_inference() for tensor in store._samples.tensors().values())
    for each in (store, source):
        each.update(torch.arange(4), stats_of(4))
    assert store.visits.tolist() == [2, 2, 2, 2]
    assert torch.equal(store.scores, source.scores)


def test_selections_default_to_the_highest_scores():
    store = ScoreStore(4, Loss())
    store.update(torch.arange(4), {"loss": torch.tensor([3.0, 1.0, 4.0, 2.0])})
    selection = store.select(2)
    assert selection.indices.tolist() == [0, 2]
    assert selection.indices.dtype == torch.int64
    assert selection.weights is None
    assert torch.equal(selection.indices, store.select(2, TopK()).indices)


def test_a_users_own_rule_is_named_by_its_settings_and_not_by_its_address():
    class Mine(Rule):
        def __init__(self, power):
            self.power = power

    assert repr(Mine(2)) == repr(Mine(2)) == "Mine(power=2)"
    assert repr(EMP()) == "EMP(beta=1.0, decay=0.0)"


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0, 2, 1, 1, 0]),
        torch.tensor([7, 5, 9, 5, 9], dtype=torch.uint8),  # from 5 on, with gaps
        torch.tensor([-3, 4, -3, 0, 0], dtype=torch.int32),
        torch.tensor([2**62, -(2**62), 2**62, 0, 5]),  # too far apart to be counted
        torch.tensor([4, 4, 4, 4, 4]),
        torch.tensor([-128, 127, 0, 0, 127], dtype=torch.int8),
    ],
)
def test_labels_become_their_ranks(labels):
    groups, num_groups = groups_of(labels)
    classes, inverse = torch.unique(labels, return_inverse=True)
    assert torch.equal(groups, inverse)
    assert groups.dtype == torch.int64
    assert num_groups == len(classes)


class CentredLoss(Rule):
    """Reduces over its rows, of which there must then be one."""

    reads = ("loss",)

    def step(self, stats, state):
        return {"score": stats["loss"] - stats["loss"].max()}


def test_a_batch_of_refused_rows_alone_reaches_no_rule():
    store = ScoreStore(4, CentredLoss())
    stats = {"loss": torch.tensor([torch.nan, 1.0]), "count": torch.tensor([1, 0])}
    store.update(torch.tensor([0, 1]), stats)
    assert store.num_nonfinite == 1
    assert store.visits.sum() == 0
    store.update(torch.tensor([0, 1]), {"loss": torch.tensor([3.0, 1.0])})
    assert store.scores[:2].tolist() == [0.0, -2.0]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.int8, torch.bool])
def test_stats_of_any_integer_type_are_finite(dtype):
    class Count(Rule):
        reads = ("hits",)

        def step(self, stats, state):
            return {"score": stats["hits"].float()}

    store = ScoreStore(3, Count())
    store.update(torch.tensor([2, 0]), {"hits": torch.tensor([1, 0]).to(dtype)})
    assert store.scores.tolist() == [0.0, torch.inf, 1.0]
