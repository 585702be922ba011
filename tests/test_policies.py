"""Policies against plain Python models of them; every selection alike on every backend."""

import copy
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import emp_fast
from emp_fast import Policy, Pruner, ScoreStore
from emp_fast.policies import (
    BelowMean,
    Candidates,
    EpsilonGreedy,
    GumbelTopK,
    Random,
    Stratified,
    TopK,
    Window,
    class_quotas,
)
from emp_fast.quotas import fair_shares
from emp_fast.rules import Loss

BUDGETED = [TopK(), Random(), EpsilonGreedy(0.3), GumbelTopK(0.5), Stratified(7, 0.1), Window(0, 1)]
ALL = [*BUDGETED, BelowMean(0.4)]

scores_of = st.lists(
    st.one_of(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, -0.0, 1.0])),
    min_size=1,
    max_size=40,
)


def visited_store(scores, visited=None) -> ScoreStore:
    scores = torch.as_tensor(scores, dtype=torch.float32)
    store = ScoreStore(len(scores), Loss())
    rows = (
        torch.arange(len(scores)) if visited is None else torch.as_tensor(visited).nonzero()[:, 0]
    )
    store.update(rows, {"loss": scores[rows]})
    return store


def kept(selection) -> set[int]:
    return set(selection.indices.tolist())


@given(scores=scores_of, data=st.data())
def test_top_k_is_a_stable_sort_with_the_never_visited_first(scores, data):
    n = len(scores)
    visited = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    fresh = [i for i in range(n) if not visited[i]]
    old = sorted((i for i in range(n) if visited[i]), key=lambda i: (-scores[i], i))
    chosen = kept(visited_store(scores, visited).select(k))
    assert len(chosen) == k
    if k >= len(fresh):
        assert chosen == {*fresh, *old[: k - len(fresh)]}
    else:
        assert chosen < set(fresh)


def test_never_visited_samples_are_drawn_at_random_by_seed_and_epoch():
    store = ScoreStore(1000, Loss())
    first = kept(store.select(100))
    assert first == kept(store.select(100))
    assert len(first & kept(store.select(100, epoch=1))) < 40
    assert len(first & kept(store.select(100, seed=1))) < 40
    # Uniform: over many draws every sample comes up about as often.
    counts = Counter(i for epoch in range(300) for i in kept(store.select(100, epoch=epoch)))
    assert min(counts[i] for i in range(1000)) > 10
    assert max(counts.values()) < 60


@pytest.mark.parametrize("policy", BUDGETED, ids=repr)
@given(
    scores=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60),
    classes=st.integers(1, 4),
    data=st.data(),
)
def test_every_budget_is_exact(policy, scores, classes, data):
    n = len(scores)
    k = data.draw(st.integers(1, n))
    visited = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    store = visited_store(scores, visited)
    labels = torch.tensor([i * 7919 % classes for i in range(n)])
    for selection in (
        store.select(k, policy),
        store.select(k, policy, labels=labels),
        store.select(k, policy, labels=labels, balance="proportional"),
    ):
        indices = selection.indices.tolist()
        assert indices == sorted(set(indices))
        assert len(indices) == k
        assert 0 <= indices[0] <= indices[-1] < n
    sizes = torch.bincount(labels, minlength=classes).tolist()
    quotas = torch.bincount(labels[store.select(k, policy, labels=labels).indices])
    assert quotas.tolist() + [0] * (classes - len(quotas)) == class_quotas(sizes, k)


@pytest.mark.parametrize("policy", ALL, ids=repr)
@pytest.mark.parametrize("labelled", [False, True])
def test_every_backend_selects_the_same(policy, labelled):
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(5000, generator=generator).round(decimals=2)  # with many ties
    visited = torch.rand(5000, generator=generator) < 0.9
    labels = torch.randint(6, (5000,), generator=generator) if labelled else None
    k = 1700 if policy.budget != "none" else None
    selections = []
    for backend in ("reference", "cpu"):
        with emp_fast.use_backend(backend):
            store = visited_store(scores, visited)
            selections.append(store.select(k, policy, labels=labels, epoch=2, seed=9))
    assert torch.equal(selections[0].indices, selections[1].indices)
    if selections[0].weights is not None:
        assert torch.equal(selections[0].weights, selections[1].weights)


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_every_thread_count_selects_the_same(policy):
    """Large enough for torch and for native code to share the work out."""
    generator = torch.Generator().manual_seed(4)
    n = 150_007
    store = visited_store(
        torch.randn(n, generator=generator), torch.rand(n, generator=generator) < 0.9
    )
    labels = torch.randint(6, (n,), generator=generator)
    before, selections = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        k = 50_000 if policy.budget != "none" else None
        selections.append(store.select(k, policy, labels=labels, epoch=2, seed=9))
    torch.set_num_threads(before)
    for selection in selections[1:]:
        assert torch.equal(selection.indices, selections[0].indices)
        if selection.weights is not None:
            assert torch.equal(selection.weights, selections[0].weights)


def test_random_does_not_look_at_the_scores():
    low = visited_store(torch.arange(100.0)).select(30, Random(), seed=4)
    high = visited_store(-torch.arange(100.0)).select(30, Random(), seed=4)
    assert torch.equal(low.indices, high.indices)
    assert kept(low) != kept(visited_store(torch.arange(100.0)).select(30, Random(), seed=5))


@pytest.mark.parametrize(("eps", "greedy"), [(0.0, 20), (0.25, 15), (1.0, 0)])
def test_epsilon_greedy_spends_its_share_at_random(eps, greedy):
    store = visited_store(torch.arange(1000.0))
    chosen = kept(store.select(20, EpsilonGreedy(eps)))
    assert set(range(1000 - greedy, 1000)) <= chosen
    assert len(chosen & set(range(900))) >= 0.5 * (20 - greedy)


def test_epsilon_greedy_explores_visited_and_never_visited_alike():
    store = ScoreStore(1000, Loss())
    store.update(torch.arange(500), {"loss": torch.arange(500.0)})
    fresh, explored = set(range(500, 1000)), Counter()
    for epoch in range(40):
        chosen = kept(store.select(200, EpsilonGreedy(0.5), epoch=epoch))
        assert len(chosen & fresh) >= 100  # the greedy half: all never visited
        explored.update(visited=len(chosen - fresh), fresh=len(chosen & fresh) - 100)
    # Of the 900 samples that the greedy half leaves, 500 are visited.
    assert explored["visited"] / 4000 == pytest.approx(5 / 9, abs=0.04)
    # Once the greedy part has all that are never visited, it goes on with the highest scores.
    store.update(torch.arange(500, 970), {"loss": torch.arange(500.0, 970.0)})
    chosen = kept(store.select(100, EpsilonGreedy(0.4)))
    assert set(range(940, 1000)) <= chosen
    assert len(chosen & set(range(940))) == 40


def test_gumbel_top_k_follows_the_softmax_of_the_scores():
    store = visited_store(torch.log(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    counts = Counter(
        int(store.select(1, GumbelTopK(1.0), epoch=epoch).indices) for epoch in range(2000)
    )
    for i in range(4):
        assert counts[i] / 2000 == pytest.approx((i + 1) / 10, abs=0.035)


def test_gumbel_top_k_draws_one_after_the_other_without_replacement():
    """Plackett-Luce: the probability of a pair is the sum over its two orders."""
    masses = [1.0, 2.0, 3.0, 4.0]
    total = sum(masses)
    store = visited_store(torch.log(torch.tensor(masses)))
    draws = 1500
    counts = Counter(
        tuple(store.select(2, GumbelTopK(1.0), epoch=epoch).indices.tolist())
        for epoch in range(draws)
    )
    for i, a in enumerate(masses):
        for j, b in enumerate(masses[:i]):
            p = a / total * b / (total - a) + b / total * a / (total - b)
            assert counts[j, i] / draws == pytest.approx(
                p, abs=4.5 * math.sqrt(p * (1 - p) / draws)
            )


def test_gumbel_top_k_tends_to_top_k_and_to_random():
    store = visited_store(torch.arange(100.0) / 100)
    assert kept(store.select(10, GumbelTopK(1e-6))) == set(range(90, 100))
    assert len(kept(store.select(50, GumbelTopK(1e6))) & set(range(50))) in range(10, 40)


@given(scores=scores_of, keep=st.sampled_from([0.1, 0.5, 0.7, 1.0]))
def test_below_mean_keeps_what_infobatch_promises(scores, keep):
    mean = Fraction(0)
    for score in scores:
        mean += Fraction(score)
    mean /= len(scores)
    above = {i for i, score in enumerate(scores) if Fraction(score) >= mean}
    selection = visited_store(scores).select(None, BelowMean(keep))
    chosen = kept(selection)
    assert above <= chosen
    below = len(scores) - len(above)
    assert len(chosen - above) == int(keep * below)
    for index, weight in zip(selection.indices.tolist(), selection.weights.tolist(), strict=True):
        assert weight == (1.0 if index in above else torch.tensor(1 / keep).item())


def test_below_mean_decides_by_the_exact_mean():
    # Summed in float32 this mean comes out above every score, and nothing would be kept for sure.
    scores = torch.full((1001,), 0.1)
    assert len(visited_store(scores).select(None, BelowMean(0.5)).indices) == 1001


def test_below_mean_is_unbiased_where_the_counts_divide():
    scores = torch.cat([torch.zeros(100), torch.full((100,), 2.0)])
    gradient = torch.arange(200.0)
    store = visited_store(scores)
    total = 0.0
    for epoch in range(400):
        selection = store.select(None, BelowMean(0.5), epoch=epoch)
        total += float((gradient[selection.indices] * selection.weights).sum())
    assert total / 400 == pytest.approx(float(gradient.sum()), rel=0.01)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.6])
def test_below_mean_weights_make_the_expected_gradient_that_of_all_data(keep, labelled):
    """Each sample below the mean is kept as often as any other, with a weight of 1 / keep."""
    generator = torch.Generator().manual_seed(7)
    n, epochs = 120, 600
    above = torch.arange(n) % 2 == 1  # of each class a half: keep * (its number) is whole
    scores = torch.where(above, 1.0, -1.0) + torch.rand(n, generator=generator) / 10
    labels = torch.arange(n) // 40 if labelled else None
    store = visited_store(scores)
    weighted = torch.zeros(n, dtype=torch.float64)
    for epoch in range(epochs):
        selection = store.select(None, BelowMean(keep), labels=labels, epoch=epoch)
        weighted[selection.indices] += selection.weights.double()
        assert selection.weights.double().sum().item() == pytest.approx(n, rel=1e-6)
    means = weighted / epochs
    assert (means[above] == 1).all()
    spread = math.sqrt(keep * (1 - keep) / epochs) / keep
    assert (means[~above] - 1).abs().max() < 4.5 * spread
    assert (means[~above] - 1).abs().max() > 0  # it is random


def test_below_mean_takes_the_mean_of_each_class():
    scores = torch.tensor([1.0, 3.0, 10.0, 30.0])
    labels = torch.tensor([0, 0, 1, 1])
    assert kept(visited_store(scores).select(None, BelowMean(0.1))) == {3}
    assert kept(visited_store(scores).select(None, BelowMean(0.1), labels=labels)) == {1, 3}


def test_below_mean_keeps_the_never_visited():
    store = visited_store([1.0, 2.0, 9.0, 0.0], [True, True, True, False])
    selection = store.select(None, BelowMean(0.1))
    assert kept(selection) == {2, 3}
    assert selection.weights.tolist() == [1.0, 1.0]


def test_stratified_gives_every_bin_the_same():
    scores = torch.cat(
        [torch.linspace(0, 0.9, 900), torch.linspace(1.1, 1.9, 90), torch.linspace(2.1, 3, 10)]
    )  # from 0 to 3: the bins end at 1 and 2
    store = visited_store(scores)
    chosen = scores[store.select(60, Stratified(bins=3)).indices]
    counts = torch.bincount(torch.bucketize(chosen, torch.tensor([1.0, 2.0])), minlength=3)
    assert counts.tolist() == [25, 25, 10]


def test_stratified_drops_the_hardest_first():
    store = visited_store(torch.arange(100.0))
    assert kept(store.select(90, Stratified(bins=5, cutoff=0.1))) == set(range(90))
    # A budget beyond what is left spares the least hard of the hardest.
    assert kept(store.select(95, Stratified(bins=5, cutoff=0.1))) == set(range(95))


def test_a_cutoff_is_the_decimal_that_was_written():
    """0.29 * 100 is 28.999... in binary."""
    store = ScoreStore(100, Loss())
    store.update(torch.arange(100), {"loss": torch.arange(100.0)})
    assert kept(store.select(71, Stratified(cutoff=0.29))) == set(range(71))


def plain_coverage(scores, k, bins, cutoff):
    """How many samples of each bin coverage-centric selection takes, straight from the paper.

    Algorithm 1 of arXiv 2210.15809: drop the hardest, cut the range into bins of equal width, and
    give from the smallest bin on each an equal share of what is left of the budget.
    """
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    dropped = min(int(cutoff * len(scores)), len(scores) - k)
    rest = [scores[i] for i in ranked[dropped:]]
    low, high = min(rest), max(rest)
    members = [0] * bins
    for score in rest:
        members[min(int((score - low) / (high - low) * bins), bins - 1)] += 1
    taken, left = [0] * bins, k
    for place, b in enumerate(sorted(range(bins), key=lambda b: members[b])):
        taken[b] = min(members[b], left // (bins - place))
        left -= taken[b]
    return set(ranked[:dropped]), taken


@pytest.mark.parametrize("k", [7, 60, 200, 333])
@pytest.mark.parametrize("cutoff", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("bins", [1, 4, 10])
def test_stratified_is_coverage_centric_selection(k, cutoff, bins):
    # Far apart: rounding at an edge moves no sample to another bin.
    generator = torch.Generator().manual_seed(8)
    scores = (torch.randn(400, generator=generator) * 1000).round() + 0.3
    store = visited_store(scores)
    dropped, taken = plain_coverage(scores.tolist(), k, bins, cutoff)
    chosen = kept(store.select(k, Stratified(bins, cutoff)))
    assert len(chosen) == k
    assert not chosen & dropped
    rest = [score for i, score in enumerate(scores.tolist()) if i not in dropped]
    low, high = min(rest), max(rest)
    counts = [0] * bins
    for i in chosen:
        counts[min(int((scores[i].item() - low) / (high - low) * bins), bins - 1)] += 1
    assert counts == taken


def test_window_lies_between_its_quantiles():
    store = visited_store(torch.arange(100.0))
    assert kept(store.select(None, Window(0.2, 0.5))) == set(range(20, 50))
    chosen = kept(store.select(10, Window(0.2, 0.5)))
    assert len(chosen) == 10
    assert chosen < set(range(20, 50))
    with pytest.raises(ValueError, match=r"at most 30, the samples in Window\(.*0.5\), got 31"):
        store.select(31, Window(0.2, 0.5))
    few = visited_store(torch.arange(100.0), torch.arange(100) < 90)
    with pytest.raises(ValueError, match=r"Window\(.*\) and never visited, got 99"):
        few.select(99, Window(0.2, 0.5))


def test_window_means_the_quantiles_that_were_written():
    assert Fraction(0.07) > Fraction(7, 100)
    assert Fraction(0.29) < Fraction(29, 100)
    store = visited_store(torch.arange(100.0))
    assert kept(store.select(None, Window(0.0, 0.07))) == set(range(7))
    assert kept(store.select(None, Window(0.29, 1.0))) == set(range(29, 100))


@pytest.mark.parametrize("seen", [0.0, 0.4, 1.0])
def test_window_always_holds_its_share(seen):
    """The prune rate that fits the window fits it in every epoch, whatever has been visited."""
    for n in range(1, 121):
        candidates = Candidates(torch.zeros(n), torch.arange(n) < seen * n)
        for low, high in ((0, 50), (20, 50), (29, 57), (33, 66), (7, 100), (10, 11)):
            k = round((high - low) / 100 * n)
            assert Window(low / 100, high / 100).quotas(candidates, k, "equal") == [k]
    store = visited_store(torch.rand(105))
    assert len(kept(store.select(32, Window(0.2, 0.5)))) == 32


def test_a_class_with_a_small_window_gives_the_rest_of_its_quota_away():
    scores = torch.cat([torch.arange(100.0), torch.arange(20.0)])
    labels = torch.tensor([0] * 100 + [1] * 20)
    store = visited_store(scores)
    chosen = store.select(30, Window(0.5, 0.75), labels=labels).indices
    assert torch.bincount(labels[chosen]).tolist() == [25, 5]
    assert set(chosen.tolist()) == {*range(50, 75), *range(110, 115)}
    with pytest.raises(ValueError, match=r"at most 30, the samples in .*, got 31"):
        store.select(31, Window(0.5, 0.75), labels=labels)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_quotas_sum_exactly_and_are_fair(sizes, data):
    k = data.draw(st.integers(0, sum(sizes)))
    for quotas in (class_quotas(sizes, k), class_quotas(sizes, k, "proportional")):
        assert sum(quotas) == k
        assert all(0 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))
    equal = fair_shares(sizes, k)
    unfilled = [share for share, size in zip(equal, sizes, strict=True) if share < size]
    if unfilled:  # who could take more has at most one less than anybody
        assert min(unfilled) >= max(equal) - 1
    for quota, size in zip(class_quotas(sizes, k, "proportional"), sizes, strict=True):
        assert abs(quota - Fraction(k * size, max(sum(sizes), 1))) < 1


def test_a_small_class_gives_the_rest_of_its_quota_away():
    assert class_quotas([5, 500, 500], 300) == [5, 147, 148]


def test_proportional_quotas_round_up_the_largest_remainders():
    assert class_quotas([10, 13, 17], 7, "proportional") == [2, 2, 3]  # of 1.75, 2.275 and 2.975
    assert class_quotas([3, 3, 4], 5, "proportional") == [2, 1, 2]


@pytest.mark.parametrize("k", [-1, 4])
def test_quotas_of_more_than_there_is_are_refused(k):
    with pytest.raises(ValueError, match=rf"k must lie in \[0, 3\], .* got {k}"):
        class_quotas([1, 2], k)


def test_quotas_of_an_unknown_balance_are_refused():
    with pytest.raises(ValueError, match="balance must be 'equal' or 'proportional', got 'even'"):
        class_quotas([1, 2], 2, "even")


def test_labels_may_be_any_integers():
    store = visited_store(torch.arange(6.0))
    labels = torch.tensor([-7, 40, -7, 40, -7, 40])
    assert kept(store.select(2, labels=labels)) == {4, 5}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EpsilonGreedy(1.5), r"eps must lie in \[0, 1\], got 1.5"),
        (lambda: GumbelTopK(0.0), "temperature must be a positive finite number, got 0.0"),
        (lambda: GumbelTopK(math.inf), "temperature must be.*got inf"),
        (lambda: GumbelTopK(10**400), "temperature must be.*got "),
        (lambda: BelowMean(0.0), r"keep must lie in \(0, 1\], got 0.0"),
        (lambda: Stratified(0), r"bins must be an int in \[1, 1048576\], got 0"),
        (lambda: Stratified(5, 1.0), r"cutoff must lie in \[0, 1\), got 1.0"),
        (lambda: Window(0.5, 0.5), "low must be below high, got low=0.5 and high=0.5"),
        (lambda: Window(-0.1, 0.5), r"low must lie in \[0, 1\], got -0.1"),
        (lambda: EpsilonGreedy(True), r"eps must lie in \[0, 1\], got True"),
    ],
)
def test_bad_policies_name_the_argument_and_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (torch.ones(4, dtype=torch.bool), "must return a mask, and weights or None"),
        (
            (torch.arange(2), None),
            r"mask, must be torch.bool of shape \[4\], got torch.int64 \(2,\)",
        ),
        ((None, None), "mask, must be a tensor, got None"),
        ((torch.ones(4, dtype=torch.bool), torch.ones(2)), r"weights, must be.*got torch.float32"),
        (
            (torch.tensor([True, True, False, False]), torch.tensor([1.0, math.nan, 1.0, 1.0])),
            "weights, must be finite for chosen samples, got nan",
        ),
        ((torch.ones(4, dtype=torch.bool), None), r"must choose 2 samples, but .* chose 4"),
        ((torch.zeros(4, dtype=torch.bool), None), r"must choose 2 samples, but .* chose 0"),
    ],
)
def test_what_a_users_own_policy_chose_is_checked(chosen, message):
    class Own(Policy):
        def choose(self, candidates, quotas):
            return chosen

    with pytest.raises(ValueError, match=message):
        ScoreStore(4).select(2, Own())


def test_only_the_weights_of_chosen_samples_must_be_finite():
    class Own(Policy):
        def choose(self, candidates, quotas):
            return torch.tensor([True, True, False]), torch.tensor([1.0, 2.0, math.inf])

    assert ScoreStore(3).select(2, Own()).weights.tolist() == [1.0, 2.0]


def test_a_users_own_policy_that_fixes_its_number_must_choose_something():
    class Nothing(Policy):
        budget = "none"

        def choose(self, candidates, quotas):
            return torch.zeros(len(candidates), dtype=torch.bool), None

    with pytest.raises(ValueError, match=r"must choose at least one sample, but .* chose 0"):
        ScoreStore(4).select(None, Nothing())


def test_a_users_own_policy_says_whether_it_takes_a_budget():
    class Half(Policy):
        budget = "optional"

        def choose(self, candidates, quotas):
            quotas = [size // 2 for size in candidates.sizes] if quotas is None else quotas
            return candidates.top(candidates.scores, None, quotas), None

    class Odd(Half):
        budget = "half"

    store = ScoreStore(4)
    assert len(store.select(None, Half()).indices) == 2
    assert len(store.select(3, Half()).indices) == 3
    with pytest.raises(ValueError, match=r"policy\.budget must be one of 'req.*, got 'half'"):
        store.select(3, Odd())


def test_a_users_own_policy_may_write_to_the_scores_in_place():
    class Clipped(TopK):
        def choose(self, candidates, quotas):
            candidates.scores.clamp_(max=5)
            candidates.scores[3] = 9
            return super().choose(candidates, quotas)

    store = ScoreStore(9, Loss())
    store.update(torch.arange(9), {"loss": torch.arange(9.0)})
    assert store.select(3, Clipped()).indices.tolist() == [3, 5, 6]
    assert store.scores.tolist() == list(range(9))


def test_the_weights_of_a_users_own_policy_bring_no_gradient():
    class Learnt(Policy):
        def choose(self, candidates, quotas):
            weights = torch.ones(len(candidates), requires_grad=True)
            return candidates.top(candidates.scores, None, quotas), 2 * weights

    pruner = Pruner(9, policy=Learnt())
    list(pruner.sampler)
    state = copy.deepcopy(pruner.state_dict())
    assert state["weights"].tolist() == 4 * [2]


def test_a_prune_rate_fits_the_largest_fraction_of_the_policy():
    message = r"prune_rate must be at least 0\.6 for Window.*at most 0\.4 .*; got 0\.5"
    with pytest.raises(ValueError, match=message):
        emp_fast.Pruner(10, 0.5, policy=Window(0.3, 0.7))
    assert emp_fast.Pruner(10, 0.6, policy=Window(0.3, 0.7)).schedule.budget(0) == 4


@pytest.mark.parametrize(("score", "temperature"), [(torch.inf, 1.0), (1e7, 1.0), (2.0, 1e-7)])
def test_gumbel_draws_alike_among_equal_scores_of_any_size(score, temperature):
    """The noise must not drown in the score: ties would go to the lowest index."""
    n, k, epochs = 40, 10, 400
    candidates = [
        Candidates(torch.full((n,), score), torch.ones(n, dtype=torch.bool), epoch=epoch)
        for epoch in range(epochs)
    ]
    policy = GumbelTopK(temperature)
    drawn = sum(policy.choose(one, [k])[0].float() for one in candidates)
    # Each is binomial with a deviation of 8.7 around 100; the lowest ten together of 27 or less.
    assert abs(float(drawn[:10].sum()) - epochs * k / 4) < 150
    assert float((drawn - epochs * k / n).abs().max()) < 45


def test_gumbel_draws_alike_in_classes_of_other_scores():
    scores = torch.tensor([1e8, -3e5]).repeat_interleave(20)
    labels = torch.arange(2).repeat_interleave(20)
    visited = torch.ones(40, dtype=torch.bool)
    drawn = sum(
        GumbelTopK().choose(Candidates(scores, visited, labels, 2, epoch=epoch), [5, 5])[0].float()
        for epoch in range(400)
    )
    for group in (drawn[:20], drawn[20:]):
        assert float(group.sum()) == 400 * 5
        assert float((group - 100).abs().max()) < 45


def test_sums_of_scores_are_exact_for_every_group():
    scores = torch.tensor([2.0**60, 1.0, -(2.0**60), 0.25])
    visited, groups = torch.ones(4, dtype=torch.bool), torch.tensor([0, 0, 0, 2])
    candidates = Candidates(scores, visited, groups, 3)
    assert candidates.sums(visited) == [1, 0, Fraction(1, 4)]
    assert candidates.sums(~visited) == [0, 0, 0]


@pytest.mark.parametrize("policy", [TopK(), EpsilonGreedy(0.5), GumbelTopK()])
def test_a_score_of_nan_ranks_last_and_can_be_chosen(policy):
    """As UCB makes one of finite losses whose variance overflows."""
    scores = torch.tensor([0.5, torch.nan, 2.0, -torch.inf])
    visited = torch.tensor([True, True, True, False])
    candidates = Candidates(scores, visited)
    assert policy.choose(candidates, [4])[0].all()
    if not isinstance(policy, EpsilonGreedy):
        assert policy.choose(Candidates(scores, visited), [3])[0].tolist() == [
            True,
            False,
            True,
            True,
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_selection(dtype):
    store = ScoreStore(40, Loss())
    store.update(torch.arange(40), {"loss": torch.rand(40)})
    policies = [
        *(TopK(), Random(), EpsilonGreedy(0.5), GumbelTopK(), BelowMean()),
        *(Stratified(5), Window(0.1, 0.9)),
    ]
    labels = torch.arange(40) % 3

    def chosen():
        return [
            store.select(None if policy.budget == "none" else 12, policy, labels=given).indices
            for policy in policies
            for given in (None, labels)
        ]

    wanted = chosen()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = chosen()
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, got, wanted))
