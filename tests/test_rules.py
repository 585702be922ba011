"""Every rule against a plain Python model of its paper's formula, over random histories of visits.

The models see one sample's visits at once and know nothing of recurrences, buffers or batches.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import statistics
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emp_fast import Policy, Pruner, Rule, ScoreStore, rules
from emp_fast.policies import BelowMean, EpsilonGreedy, GumbelTopK, Stratified, Window
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
    Mean,
    Recurrence,
)

N = 5
IRREDUCIBLE = [0.5, -1.0, 0.0, 3.0, 0.25]

Visit = dict[str, Any]
Model = Callable[[int, list[Visit]], float]  # of a sample and its visits


def average(values: list[float], decay: float) -> float:
    """The exponential moving average that starts at the first value, as a weighted sum."""
    last = len(values) - 1
    weights = [
        decay**last if t == 0 else (1 - decay) * decay ** (last - t) for t in range(last + 1)
    ]
    return math.fsum(w * x for w, x in zip(weights, values, strict=True))


def of(name: str, visits: list[Visit]) -> list[float]:
    return [visit[name] for visit in visits]


def emp(beta: float, decay: float) -> Model:
    return lambda i, visits: visits[-1]["loss"] + beta * average(of("entropy", visits), decay)


def moving(name: str, decay: float, sign: float = 1.0) -> Model:
    return lambda i, visits: sign * average(of(name, visits), decay)


def ucb(c: float, decay: float) -> Model:
    def model(i: int, visits: list[Visit]) -> float:
        losses = of("loss", visits)
        squares = [0.0] + [
            (losses[t] - average(losses[:t], decay)) ** 2 for t in range(1, len(losses))
        ]
        return average(losses, decay) + c * average(squares, decay)

    return model


def forgetting(i: int, visits: list[Visit]) -> float:
    correct = of("correct", visits)
    if not any(correct):
        return math.inf
    return sum(a and not b for a, b in itertools.pairwise(correct))


def grand(decay: float) -> Model:
    def model(i: int, visits: list[Visit]) -> float:
        norms = [v["el2n"] * math.sqrt(1 + math.fsum(h * h for h in v["hidden"])) for v in visits]
        return average(norms, decay)

    return model


def dyn_unc(window: int) -> Model:
    def model(i: int, visits: list[Visit]) -> float:
        p = of("confidence", visits)
        if len(p) < window:
            return statistics.stdev(p) if len(p) > 1 else 0.0
        spans = [p[t : t + window] for t in range(len(p) - window + 1)]
        return statistics.fmean(statistics.stdev(span) for span in spans)

    return model


def rho(decay: float) -> Model:
    return lambda i, visits: average([loss - IRREDUCIBLE[i] for loss in of("loss", visits)], decay)


CASES: list[tuple[Rule, Model]] = [
    (EMP(), emp(1.0, 0.0)),
    (EMP(beta=0.3), emp(0.3, 0.0)),
    (EMP(beta=-2.0, decay=0.9), emp(-2.0, 0.9)),
    (Loss(), moving("loss", 0.0)),
    (Loss(0.7), moving("loss", 0.7)),
    (Entropy(0.7), moving("entropy", 0.7)),
    (EL2N(), moving("el2n", 0.0)),
    (EL2N(0.2), moving("el2n", 0.2)),
    (Margin(0.5), moving("margin", 0.5, -1.0)),
    (AUM(), lambda i, visits: -statistics.fmean(of("margin", visits))),
    (Mean(), lambda i, visits: statistics.fmean(of("loss", visits))),
    (Mean("el2n"), lambda i, visits: statistics.fmean(of("el2n", visits))),
    (Mean("confidence"), lambda i, visits: -statistics.fmean(of("confidence", visits))),
    (UCB(), ucb(1.0, 0.8)),
    (UCB(c=0.5, decay=0.0), ucb(0.5, 0.0)),
    (Forgetting(), forgetting),
    (GraNd(), grand(0.0)),
    (GraNd(0.6), grand(0.6)),
    (DynUnc(2), dyn_unc(2)),
    (DynUnc(4), dyn_unc(4)),
    (DynUnc(), dyn_unc(10)),
    (RHO(torch.tensor(IRREDUCIBLE)), rho(0.0)),
    (RHO(torch.tensor(IRREDUCIBLE), decay=0.4), rho(0.4)),
]

number = st.floats(-20, 20, width=32)
visit = st.fixed_dictionaries(
    {
        "loss": st.floats(0, 20, width=32),
        "entropy": st.floats(0, 8, width=32),
        "el2n": st.floats(0, 1.5, width=32),
        "margin": number,
        "confidence": st.floats(0, 1, width=32),
        "correct": st.booleans(),
        "hidden": st.lists(number, min_size=3, max_size=3),
    }
)


# The fixture only names the backend: nothing of it changes between examples.
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, N - 1), visit), min_size=1, max_size=6), max_size=14
    )
)
@pytest.mark.parametrize(("rule", "model"), CASES, ids=[repr(rule) for rule, _ in CASES])
def test_a_rule_follows_its_formula(backend, rule, model, batches):
    store = ScoreStore(N, rule)
    histories: list[list[Visit]] = [[] for _ in range(N)]
    for batch in batches:
        for i, seen in dict(batch).items():  # of a sample that is there twice the last row counts
            histories[i].append(seen)
        stats = {name: torch.tensor([seen[name] for _, seen in batch]) for name in batch[0][1]}
        store.update(torch.tensor([i for i, _ in batch]), stats)
    wanted = [model(i, visits) if visits else math.inf for i, visits in enumerate(histories)]
    assert store.visits.tolist() == [len(visits) for visits in histories]
    # Relative to the largest stat: sums of 14 float32 terms of it.
    torch.testing.assert_close(
        store.scores.double(), torch.tensor(wanted).double(), rtol=2e-5, atol=1e-4
    )


def test_every_rule_is_here():
    tested = {type(rule) for rule, _ in CASES}
    shipped = {getattr(rules, name) for name in rules.__all__} - {Recurrence, Rule}
    assert tested == shipped


@pytest.mark.parametrize("rule", [rule for rule, _ in CASES], ids=repr)
def test_every_rule_states_what_it_reads_and_survives_a_checkpoint(rule):
    generator = torch.Generator().manual_seed(9)

    def update(store: ScoreStore, seed: int) -> None:
        generator.manual_seed(seed)
        stats = {name: torch.rand(4, generator=generator) for name in rule.reads}
        stats |= {"correct": torch.rand(4, generator=generator) < 0.5}
        stats |= {"hidden": torch.rand(4, 3, generator=generator)}
        store.update(torch.tensor([0, 2, 3, 2]), {name: stats[name] for name in rule.reads})

    whole, first = ScoreStore(N, rule), ScoreStore(N, rule)
    for seed in range(3):
        update(whole, seed)
        update(first, seed)
    second = ScoreStore(N, rule)
    second.load_state_dict(first.state_dict())
    for seed in range(3, 8):
        update(whole, seed)
        update(second, seed)
    assert torch.equal(whole.scores, second.scores)
    for missing in rule.reads:
        stats = {name: torch.rand(1) for name in rule.reads if name != missing}
        with pytest.raises(ValueError, match=f"stats must have '{missing}'"):
            whole.update(torch.tensor([1]), stats)


class Pair(NamedTuple):
    weights: Any
    names: set[str]


class Weighted(Rule):
    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def step(self, stats: Any, state: Any) -> Any:
        return {"score": stats["loss"] * self.weights[0]}


@dataclass(frozen=True)
class WeightedData(Rule):
    weights: Any


class WeightedPolicy(Policy):
    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def choose(self, candidates: Any, quotas: Any) -> Any:
        return candidates.top(self.weights, None, quotas), None


@pytest.mark.parametrize("kind", [Weighted, WeightedData, WeightedPolicy])
@pytest.mark.parametrize(
    "holds",
    [
        lambda weights: weights,
        lambda weights: weights.double().requires_grad_(),
        lambda weights: weights.numpy(),
        lambda weights: weights.view(torch.int32).numpy().astype(">i8"),
        lambda weights: weights.view(40, 100).t(),
        lambda weights: [weights[:100], {"rest": (weights[100:].numpy(), 7)}],
        lambda weights: OrderedDict(pair=Pair(weights, {"b", "a"})),
        lambda weights: torch.complex(weights, -weights).conj(),
    ],
    ids=["tensor", "requires grad", "array", "big-endian", "transposed", "nested", "named", "conj"],
)
def test_the_repr_tells_tensors_and_arrays_apart(kind: Any, holds: Callable[..., Any]) -> None:
    """Where their own reprs do not: in the middle of a long one, and in the last bit."""
    weights = torch.linspace(0, 1, 4000)
    others = weights.clone()
    others[2000] = others[2000].nextafter(torch.tensor(2.0))
    assert repr(kind(holds(weights))) == repr(kind(holds(weights.clone())))
    assert repr(kind(holds(weights))) != repr(kind(holds(others)))
    assert len(repr(kind(holds(weights)))) < 150


def test_the_repr_of_settings() -> None:
    assert repr(Weighted(torch.empty(2, device="meta"))) == "Weighted(weights=<float32 [2], meta>)"
    assert repr(Weighted({"b", "a", "c"})) == "Weighted(weights={'a', 'b', 'c'})"
    told = repr(Weighted([torch.ones(2, 3), {"a": (np.zeros(0),)}, "b", 0.5]))
    assert re.fullmatch(
        r"Weighted\(weights=\[<float32 \[2, 3\], [0-9a-f]{16}>, "
        r"\{'a': \(<float64 \[0\], [0-9a-f]{16}>,\)\}, 'b', 0\.5\]\)",
        told,
    )
    assert repr(Weighted(torch.tensor(0.5))).startswith("Weighted(weights=<float32 [], ")
    assert repr(RHO(torch.arange(5) / 5)) == (
        "RHO(irreducible=<float32 [5], afb40e90ab96ace0>, decay=0.0)"
    )


@pytest.mark.parametrize(
    ("numpys", "plain"),
    [
        (EMP(np.float32(0.5), decay=np.float64(0.25)), EMP(0.5, 0.25)),
        (EMP(np.int64(2)), EMP(2)),
        (Loss(np.float16(0.5)), Loss(0.5)),
        (UCB(c=np.float32(2), decay=np.float32(0.5)), UCB(2.0, 0.5)),
        (DynUnc(np.uint8(3)), DynUnc(3)),
        (RHO(torch.zeros(4), np.float32(0.5)), RHO(torch.zeros(4), 0.5)),
        (Window(np.float32(0.25), high=np.float64(0.75)), Window(0.25, 0.75)),
        (Stratified(np.int32(7), np.float32(0.5)), Stratified(7, 0.5)),
        (GumbelTopK(np.float64(2)), GumbelTopK(2.0)),
        (EpsilonGreedy(np.float32(0.5)), EpsilonGreedy(0.5)),
        (BelowMean(np.float32(0.5)), BelowMean(0.5)),
    ],
    ids=repr,
)
def test_numpys_numbers_become_pythons(numpys: Rule | Policy, plain: Rule | Policy) -> None:
    """The repr, by which checkpoints and ranks tell them apart, has no trace of NumPy."""
    assert repr(numpys) == repr(plain)
    settings = [value for value in vars(numpys).values() if not isinstance(value, torch.Tensor)]
    assert {type(value) for value in settings} <= {int, float}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMP(np.float32("nan")), r"beta must be a finite number in float32, got .*nan"),
        (lambda: EMP(1e300), r"beta must be a finite number in float32, got 1e\+300"),
        (lambda: Loss(np.bool_(False)), r"decay must lie in \[0, 1\), got .*False"),
        (lambda: Loss(np.zeros(1)), r"decay must lie in \[0, 1\), got array"),
        (lambda: DynUnc(np.float64(3)), r"window must be an int of at least 2, got .*3\.0"),
        (lambda: DynUnc(np.int64(1)), r"window must be an int of at least 2, got .*1"),
    ],
)
def test_other_values_of_numpy_are_refused(make: Callable[[], Rule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_number_is_the_same_setting_as_int_and_as_float() -> None:
    assert repr(EMP(1, 0)) == repr(EMP(1.0, 0.0))
    store, other = ScoreStore(3, EMP(beta=1)), ScoreStore(3, EMP())
    store.load_state_dict(other.state_dict())


def test_slots_are_settings() -> None:
    class Scaled(Rule):
        __slots__ = ("__private", "bias", "scale")

        def __init__(self, scale: float) -> None:
            self.scale = scale  # and no bias

        def step(self, stats: Any, state: Any) -> dict[str, torch.Tensor]:
            return {"score": self.scale * stats["loss"]}

    class Shifted(Scaled):
        __slots__ = "shift"

    shifted = Shifted(2.0)
    shifted.shift = 1
    assert repr(Scaled(2.0)) == "Scaled(scale=2.0)"
    assert repr(shifted) == "Shifted(scale=2.0, shift=1)"


def test_a_step_that_would_never_run_is_refused() -> None:
    def step(self: Rule, stats: Any, state: Any) -> dict[str, torch.Tensor]:
        return {"score": -stats["loss"]}

    turned = type("Turned", (Loss,), {"step": step})
    mixed = type("Mixed", (type("Mixin", (Rule,), {"step": step}), Loss), {})
    for rule in (turned, mixed):
        with pytest.raises(TypeError, match=r"^step\(\) of (Turned|Mixed) would never run"):
            ScoreStore(3, rule())
    alone = type("Alone", (Loss,), {"step": step, "recurrence": lambda self: None})
    store = ScoreStore(3, alone())
    store.update(torch.arange(3), {"loss": torch.arange(3.0)})
    assert store.scores.tolist() == [0, -1, -2]
    both = type("Both", (RHO,), {"recurrence": Loss.recurrence})  # the newer one runs
    store = ScoreStore(3, both(torch.zeros(3)))
    store.update(torch.arange(3), {"loss": torch.arange(3.0)})
    assert store.scores.tolist() == [0, 1, 2]


def test_a_dataclass_keeps_a_repr_of_its_own() -> None:
    class Short(Rule):
        def __repr__(self) -> str:
            return "short"

    @dataclass
    class Long(Short):
        weights: int = 3

    assert repr(Short()) == "short"
    assert repr(Long()).endswith("Long(weights=3)")


def test_a_checkpoint_of_a_rule_with_other_weights_is_refused() -> None:
    one, other = (ScoreStore(3, Weighted(torch.arange(4000.0) == at)) for at in (2000, 2001))
    with pytest.raises(ValueError, match=r"state\['rule'\] must be 'Weighted\(weights=<bool"):
        other.load_state_dict(one.state_dict())
    pruners = [Pruner(3, policy=WeightedPolicy(torch.arange(4000.0) == at)) for at in (5, 2000)]
    with pytest.raises(ValueError, match=r"policy.*WeightedPolicy\(weights=<bool"):
        pruners[1].load_state_dict(pruners[0].state_dict())


def test_a_step_with_weights_that_learn_leaves_no_graph_in_the_state(backend: str) -> None:
    class Learnt(Rule):
        reads = ("loss", "hidden")

        def __init__(self) -> None:
            self.weight = torch.ones(2, requires_grad=True)

        def buffers(self, num_samples: int, device: torch.device) -> dict[str, torch.Tensor]:
            return {"last": torch.zeros(num_samples, device=device)}

        def step(self, stats: Any, state: Any) -> Any:
            assert not torch.is_grad_enabled()
            with torch.enable_grad():
                score = stats["loss"] + stats["hidden"] @ self.weight
            return {"score": score, "memory": score, "last": score}

    pruner = Pruner(4, rule=Learnt())
    for rows in ([0, 1], [1, 1]):  # each once, and a sample twice
        logits = torch.randn(2, 3, requires_grad=True)
        pruner.loss(
            logits, torch.tensor([0, 2]), torch.tensor(rows), hidden=torch.ones(2, 2)
        ).backward()
    tensors = pruner.store.state_dict()["tensors"]
    assert not [name for name, tensor in tensors.items() if tensor.requires_grad]
    copy.deepcopy(pruner.store)  # torch refuses to copy what has a graph


@pytest.mark.parametrize(
    "held",
    [
        torch.zeros(4),
        torch.zeros(1).expand(4),
        torch.nn.Parameter(torch.zeros(4)),
        torch.zeros(2, 4).T,
    ],
    ids=["tensor", "expanded", "parameter", "transposed"],
)
def test_a_store_leaves_the_tensors_of_its_rule_alone(backend: str, held: torch.Tensor) -> None:
    class Counting(Rule):
        def __init__(self) -> None:
            self.start = held

        def buffers(self, num_samples: int, device: torch.device) -> dict[str, torch.Tensor]:
            return {"count": self.start}

        def step(self, stats: Any, state: Any) -> Any:
            count = state["count"] + 1
            return {"score": stats["loss"] + count.view(len(count), -1)[:, 0], "count": count}

    rule = Counting()
    before = repr(rule)
    for _ in range(2):
        store = ScoreStore(4, rule)
        for _ in range(2):
            store.update(torch.tensor([0, 2]), {"loss": torch.zeros(2)})
        assert store.scores.tolist() == [2, math.inf, 2, math.inf]
    assert repr(rule) == before
    assert not held.any()
    store.load_state_dict(ScoreStore(4, Counting()).state_dict())
    assert not store._samples.buffers["count"].any()


def test_the_mean_margin_is_aum_and_other_names_are_refused():
    assert Mean("margin").recurrence() == AUM().recurrence()
    assert repr(Mean("el2n")) == "Mean(stat='el2n')"
    for stat in ("correct", "hidden", ""):
        with pytest.raises(ValueError, match=f"stat must be one of loss, .*got '{stat}'"):
            Mean(stat)
