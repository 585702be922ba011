"""`info_nce` against the float64 oracle of similarities composed in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_functional import FLOAT_FIELDS, incoming
from torch import Tensor
from watching import LargestTensor

from emp_fast import SampleStats, functional
from emp_fast.functional import cross_entropy, info_nce
from emp_fast.testing import ATOL, RTOL, OracleStats, oracle


def embeddings(samples: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views that resemble each other, of no common length."""
    generator = torch.Generator().manual_seed(seed)
    query, noise = torch.randn((2, samples, width), generator=generator)
    scale = torch.rand((samples, 1), generator=generator) * 5 + 0.1
    return (query * scale).requires_grad_(), (query + 0.7 * noise).requires_grad_()


def direction(query: Tensor, key: Tensor, temperature: float) -> OracleStats:
    unit = torch.nn.functional.normalize
    similarity = unit(query.double(), dim=1) @ unit(key.double(), dim=1).T / temperature
    return oracle(similarity, torch.arange(query.shape[0]))[0]


def wanted(query: Tensor, key: Tensor, temperature: float, symmetric: bool) -> OracleStats:
    there = direction(query, key, temperature)
    if not symmetric:
        return there
    back = direction(key, query, temperature)
    fields = {name: (getattr(there, name) + getattr(back, name)) / 2 for name in FLOAT_FIELDS}
    return OracleStats(**fields, correct=there.correct & back.correct, count=there.count)


def composed_loss(query: Tensor, key: Tensor, temperature: float, symmetric: bool) -> Tensor:
    """[S], differentiable, in the type of its arguments."""
    unit = torch.nn.functional.normalize
    similarity = unit(query, dim=1) @ unit(key, dim=1).T / temperature
    own = torch.arange(query.shape[0])
    loss = torch.nn.functional.cross_entropy(similarity, own, reduction="none")
    if not symmetric:
        return loss
    return (loss + torch.nn.functional.cross_entropy(similarity.T, own, reduction="none")) / 2


def assert_stats(got: SampleStats, expected: Any, temperature: float) -> None:
    """Within the tolerance that float32 leaves to similarities of up to 1 / temperature."""
    for name in FLOAT_FIELDS:
        field = getattr(got, name)
        assert field.dtype == torch.float32, name
        atol = ATOL + 4 * torch.finfo(torch.float32).eps / temperature
        np.testing.assert_allclose(
            field.detach().double().numpy(), getattr(expected, name), RTOL, atol, err_msg=name
        )
    np.testing.assert_array_equal(got.correct.numpy(), expected.correct)
    np.testing.assert_array_equal(got.count.numpy(), expected.count)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "one way"])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0, 3.0])
@pytest.mark.parametrize(("samples", "width"), [(1, 3), (2, 1), (9, 4), (37, 16)])
def test_values_and_gradients(
    samples: int, width: int, temperature: float, symmetric: bool, backend: str, poison: None
) -> None:
    query, key = embeddings(samples, width)
    got = info_nce(query, key, temperature=temperature, symmetric=symmetric)
    assert_stats(got, wanted(query.detach(), key.detach(), temperature, symmetric), temperature)
    grad_loss = incoming(samples)
    found = torch.autograd.grad(got.loss, (query, key), grad_loss)
    q, k = (x.detach().double().requires_grad_() for x in (query, key))
    exact = torch.autograd.grad(
        composed_loss(q, k, temperature, symmetric), (q, k), grad_loss.double()
    )
    own = torch.autograd.grad(
        composed_loss(query, key, temperature, symmetric), (query, key), grad_loss
    )
    for a, b, torchs in zip(found, exact, own, strict=True):
        assert a.dtype == torch.float32
        error, allowed = ((x.double() - b).abs().max() for x in (a, torchs))
        assert error <= 2 * allowed + 4e-7 * b.abs().max() + 1e-7


def test_both_directions_are_the_mean_of_each(backend: str) -> None:
    query, key = embeddings(9, 4)
    both = info_nce(query, key)
    there, back = info_nce(query, key, symmetric=False), info_nce(key, query, symmetric=False)
    for name in FLOAT_FIELDS:
        mean = (getattr(there, name) + getattr(back, name)) / 2
        torch.testing.assert_close(getattr(both, name), mean)
    assert torch.equal(both.correct, there.correct & back.correct)
    assert both.count.tolist() == [1] * 9
    assert there.count.tolist() == [1] * 9
    swapped = info_nce(key, query)
    for name in FLOAT_FIELDS:
        torch.testing.assert_close(getattr(both, name), getattr(swapped, name))


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_temperature_may_be_learnt(symmetric: bool, backend: str) -> None:
    """As CLIP's: the logarithm of its inverse is a parameter."""
    generator = torch.Generator().manual_seed(4)
    query, key = (torch.randn(9, 6, generator=generator) for _ in range(2))
    log_scale = torch.tensor([1.5], requires_grad=True)
    loss = info_nce(query, key, temperature=(-log_scale).exp(), symmetric=symmetric).loss
    (grad,) = torch.autograd.grad(loss.sum(), log_scale)

    q, k = (torch.nn.functional.normalize(x.double(), dim=1) for x in (query, key))
    exact = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    similarity, target = exact.exp() * (q @ k.T), torch.arange(9)
    wanted = torch.nn.functional.cross_entropy(similarity, target, reduction="none")
    if symmetric:
        back = torch.nn.functional.cross_entropy(similarity.T, target, reduction="none")
        wanted = (wanted + back) / 2
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), exact)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-6)


def test_the_length_of_an_embedding_does_not_matter(backend: str) -> None:
    query, key = (x.detach() for x in embeddings(9, 4))
    scale = torch.logspace(-3, 3, 9)[:, None]
    for a, b in zip(info_nce(query, key), info_nce(query * scale, key / scale), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_sample_has_nothing_to_be_told_from(backend: str) -> None:
    query, key = embeddings(1, 4)
    got = info_nce(query, key)
    assert got.loss.item() == got.entropy.item() == got.el2n.item() == 0
    assert got.margin.item() == math.inf
    assert got.confidence.item() == 1
    assert got.correct.item()
    for grad in torch.autograd.grad(got.loss.sum(), (query, key)):
        assert (grad == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_samples(symmetric: bool, backend: str) -> None:
    query, key = (torch.empty((0, 4), requires_grad=True) for _ in range(2))
    got = info_nce(query, key, symmetric=symmetric, hidden=torch.empty(0, 3))
    for field, dtype in zip(got, (*[torch.float32] * 5, torch.bool, torch.int32), strict=True):
        assert field.shape == (0,)
        assert field.dtype == dtype
    for grad in torch.autograd.grad(got.loss.sum(), (query, key)):
        assert grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_memory_term_is_the_entropy_of_the_hidden_features(
    dtype: torch.dtype, backend: str
) -> None:
    query, key = embeddings(9, 4)
    hidden = (torch.randn((9, 33), generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    hidden.requires_grad_()
    got, plain = info_nce(query, key, hidden=hidden), info_nce(query, key)
    p = hidden.detach().double().softmax(1)
    entropy = torch.special.entr(p).sum(1)
    np.testing.assert_allclose(got.entropy.double().numpy(), entropy.numpy(), RTOL, ATOL)
    assert not got.entropy.requires_grad
    for name in set(SampleStats._fields) - {"entropy"}:
        assert torch.equal(getattr(got, name), getattr(plain, name)), name
    got.loss.sum().backward()
    assert hidden.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_scored_without_rounding_the_similarities(
    dtype: torch.dtype, backend: str
) -> None:
    """At temperature 0.07 a similarity rounded to bfloat16 errs by 0.03 in the loss."""
    query, key = (x.detach().to(dtype).requires_grad_() for x in embeddings(19, 8))
    got = info_nce(query, key, temperature=0.07)
    assert_stats(got, wanted(query.detach(), key.detach(), 0.07, True), 0.07)
    for grad in torch.autograd.grad(got.loss.sum(), (query, key)):
        assert grad.dtype == dtype
        assert torch.isfinite(grad).all()


def test_autocast_does_not_round_them_either(backend: str) -> None:
    query, key = embeddings(19, 8)
    plain = info_nce(query, key, temperature=0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = info_nce(query, key, temperature=0.07)
        grads = torch.autograd.grad(got.loss.sum(), (query, key))
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(grads, torch.autograd.grad(plain.loss.sum(), (query, key)), strict=True):
        assert torch.equal(a, b)


def test_a_nan_query_leaves_the_others_their_own_scores(backend: str) -> None:
    query, key = (x.detach() for x in embeddings(9, 4))
    clean = info_nce(query, key, symmetric=False)
    query[3, 1] = torch.nan
    got = info_nce(query, key, symmetric=False)
    others = torch.arange(9) != 3
    for name in FLOAT_FIELDS:
        assert torch.isnan(getattr(got, name)[3]), name
        assert torch.equal(getattr(got, name)[others], getattr(clean, name)[others]), name


def test_a_batch_of_equal_pairs_is_uniform(backend: str) -> None:
    query = torch.ones(8, 4)
    got = info_nce(query, query)
    torch.testing.assert_close(got.loss, torch.full((8,), math.log(8)))
    torch.testing.assert_close(got.entropy, torch.full((8,), math.log(8)))
    assert (got.margin == 0).all()


def test_the_similarity_is_never_stored(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, width, block = 60, 4, 8
    monkeypatch.setattr(functional, "_BLOCK_LOGITS", block * samples)
    query, key = embeddings(samples, width)
    with LargestTensor() as seen:
        loss = info_nce(query, key).loss.sum()
        torch.autograd.grad(loss, (query, key))
    assert seen.elements == block * samples


def test_it_is_the_cross_entropy_of_the_similarities(backend: str) -> None:
    query, key = (x.detach() for x in embeddings(9, 4))
    unit = torch.nn.functional.normalize
    similarity = unit(query, dim=1) @ unit(key, dim=1).T / 0.1
    plain = cross_entropy(similarity, torch.arange(9))
    for a, b in zip(info_nce(query, key, symmetric=False), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
