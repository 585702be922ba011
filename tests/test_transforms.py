"""The losses under the transforms of torch.func, against torch's own losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap
from torch.nn import functional as F

import emp_fast
from emp_fast import functional
from emp_fast.functional import cross_entropy, info_nce, linear_cross_entropy

B, S, T, C, E = 3, 6, 4, 5, 7  # examples of a vmap, samples, positions, classes, features

Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _one_call_for_all_examples() -> Iterator[None]:
    """torch warns if it has to call an op once per example."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, C, shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids_with_gaps(*shape: int) -> Tensor:
    target = ids(*shape)
    target[..., 0, 1] = target[..., 1, :] = -100
    return target


CLASSIFIER, BIAS = normal(C, E), normal(C)


def rows(x: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(x, target, weight=torch.arange(1.0, C + 1), label_smoothing=0.1).loss.sum()


def torch_rows(x: Tensor, target: Tensor) -> Tensor:
    weight = torch.arange(1.0, C + 1)
    return F.cross_entropy(x, target, weight, label_smoothing=0.1, reduction="sum")


def sequences(x: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(x, target).loss.sum()


def torch_sequences(x: Tensor, target: Tensor) -> Tensor:
    each = F.cross_entropy(x.flatten(0, 1), target.flatten(), reduction="none")
    return (each.view(S, T).sum(1) / (target != -100).sum(1).clamp_min(1)).sum()


def linear(hidden: Tensor, target: Tensor) -> Tensor:
    options = {"bias": BIAS, "weight": torch.arange(1.0, C + 1)}
    return linear_cross_entropy(hidden, CLASSIFIER, target, **options).loss.sum()


def torch_linear(hidden: Tensor, target: Tensor) -> Tensor:
    logits, weight = F.linear(hidden, CLASSIFIER, BIAS), torch.arange(1.0, C + 1)
    return F.cross_entropy(logits, target, weight, reduction="sum")


def packed(x: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(x, target, offsets=torch.tensor([0, 2, 2, S])).loss.sum()


def torch_packed(x: Tensor, target: Tensor) -> Tensor:
    each = F.cross_entropy(x, target, reduction="none")
    return each[:2].mean() + each[2:].mean()


def contrastive(query: Tensor, key: Tensor) -> Tensor:
    return info_nce(query, key).loss.sum()


def torch_contrastive(query: Tensor, key: Tensor) -> Tensor:
    similarity = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.1
    positives = torch.arange(S)
    both = [F.cross_entropy(x, positives, reduction="sum") for x in (similarity, similarity.T)]
    return (both[0] + both[1]) / 2


#: Ours, torch's, and the arguments of B examples.
LOSSES: dict[str, tuple[Loss, Loss, tuple[Tensor, Tensor]]] = {
    "rows": (rows, torch_rows, (normal(B, S, C), ids(B, S))),
    "soft": (rows, torch_rows, (normal(B, S, C), normal(B, S, C).softmax(-1))),
    "sequences": (sequences, torch_sequences, (normal(B, S, T, C), ids_with_gaps(B, S, T))),
    "linear": (linear, torch_linear, (normal(B, S, E), ids(B, S))),
    "packed": (packed, torch_packed, (normal(B, S, C), ids(B, S))),
    "contrastive": (
        contrastive,
        torch_contrastive,
        (normal(B, S, E), -normal(B, S, E).flip(1)),
    ),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


@each_loss
def test_grad(name: str, backend: str) -> None:
    ours, torchs, (x, y) = LOSSES[name]
    torch.testing.assert_close(grad(ours)(x[0], y[0]), grad(torchs)(x[0], y[0]))


@each_loss
@pytest.mark.parametrize("dims", ["first", "last", "shared"])
def test_vmap_of_grad(name: str, dims: str, backend: str) -> None:
    ours, torchs, (x, y) = LOSSES[name]
    in_dims: tuple[int, int | None] = 0, 0
    if dims == "last":
        x, y, in_dims = x.movedim(0, -1), y.movedim(0, 1).contiguous(), (x.dim() - 1, 1)
    elif dims == "shared":
        y, in_dims = y[1], (0, None)
    made = vmap(grad(ours), in_dims)(x, y)
    torch.testing.assert_close(made, vmap(grad(torchs), in_dims)(x, y))


def test_linear_in_several_blocks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_BLOCK_LOGITS", 2 * C)
    _, _, (x, y) = LOSSES["linear"]
    for transformed in (lambda loss: loss, grad):
        made = vmap(transformed(linear))(x, y)
        torch.testing.assert_close(made, vmap(transformed(torch_linear))(x, y))
    torch.testing.assert_close(
        grad(lambda w: linear_cross_entropy(x[0], w, y[0]).loss.sum())(CLASSIFIER),
        grad(lambda w: F.cross_entropy(F.linear(x[0], w), y[0], reduction="sum"))(CLASSIFIER),
    )


def test_gradients_of_single_samples(backend: str) -> None:
    """As the GraNd score of the whole network needs them: the gradients of its parameters."""
    x, target = normal(S, E), ids(S)
    parameters = {"weight": normal(C, E), "bias": normal(C)}

    def gradients(loss: Loss) -> dict[str, Tensor]:
        def of_one(p: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
            return loss(F.linear(x[None], p["weight"], p["bias"]), target[None])

        made: dict[str, Tensor] = vmap(grad(of_one), (None, 0, 0))(parameters, x, target)
        return made

    torch.testing.assert_close(gradients(rows), gradients(torch_rows))


def test_vmap_over_class_weights(backend: str) -> None:
    x, target, weight = normal(S, C), ids(S), normal(B, C).abs()

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(x, target, weight=weight).loss.sum()

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(x, target, weight, reduction="sum")

    for transformed in (lambda loss: loss, grad):
        made = vmap(transformed(ours), (None, 0))(x, weight)
        torch.testing.assert_close(made, vmap(transformed(torchs), (None, 0))(x, weight))


def test_vmap_over_segments_and_offsets_in_any_dimension() -> None:
    op, values, offsets = torch.ops.emp_fast.segment_sum, normal(2, S), torch.zeros(B, 3).long()
    offsets[:, 1], offsets[:, 2] = torch.arange(B) % S, S
    wanted = torch.stack([op(values, of_one) for of_one in offsets])
    assert torch.equal(vmap(op, (None, 0))(values, offsets), wanted)
    assert torch.equal(vmap(op, (None, 1))(values, offsets.T.contiguous()), wanted)
    of_each = normal(B, 2, S)
    wanted = torch.stack([op(*of_one) for of_one in zip(of_each, offsets, strict=True)])
    assert torch.equal(vmap(op)(of_each, offsets), wanted)
    wanted = torch.stack([op(of_one, offsets[0]) for of_one in of_each])
    assert torch.equal(vmap(op, (1, None))(of_each.movedim(0, 1), offsets[0]), wanted)


def test_sequences_with_rows_between(backend: str) -> None:
    x, target = normal(B, S, 17, C), ids(B, S, 16)

    def where_they_lie(x: Tensor, target: Tensor) -> Tensor:
        return sequences(x[:, :-1], target)

    def copied(x: Tensor, target: Tensor) -> Tensor:
        return sequences(x[:, :-1].contiguous(), target)

    for transformed in (lambda loss: loss, grad):
        made = vmap(transformed(where_they_lie))(x, target)
        torch.testing.assert_close(made, vmap(transformed(copied))(x, target))


def test_examples_of_one_row_that_share_their_target(backend: str) -> None:
    x, target = normal(B, 1, C), ids(1)
    for transformed in (lambda loss: loss, grad):
        made = vmap(transformed(rows), (0, None))(x, target)
        torch.testing.assert_close(made, vmap(transformed(torch_rows), (0, None))(x, target))


def test_every_field_under_vmap(backend: str) -> None:
    x, target = normal(B, S, C), ids(B, S)
    made = vmap(lambda x, t: tuple(cross_entropy(x, t)))(x, target)
    for b in range(B):
        for got, wanted in zip(made, cross_entropy(x[b], target[b]), strict=True):
            assert torch.equal(got[b], wanted)


@each_loss
def test_vjp(name: str, backend: str) -> None:
    """Its gradient is made after the transform has ended."""
    ours, torchs, (x, y) = LOSSES[name]
    made, wanted = (vjp(lambda x, loss=loss: loss(x, y[0]), x[0]) for loss in (ours, torchs))
    torch.testing.assert_close(made[0], wanted[0])
    torch.testing.assert_close(made[1](torch.tensor(2.0)), wanted[1](torch.tensor(2.0)))
    incoming = torch.tensor([1.0, -3.0])
    torch.testing.assert_close(vmap(made[1])(incoming), vmap(wanted[1])(incoming))


def test_jacobians(backend: str) -> None:
    x, target = normal(S, C), ids(S)
    wanted = jacrev(lambda x: F.cross_entropy(x, target, reduction="none"))(x)
    torch.testing.assert_close(jacrev(lambda x: cross_entropy(x, target).loss)(x), wanted)
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf, target).loss
    (batched,) = torch.autograd.grad(loss, leaf, torch.eye(S), is_grads_batched=True)
    torch.testing.assert_close(batched, wanted)


def test_a_second_derivative_is_refused(backend: str) -> None:
    def slope(x: Tensor) -> Tensor:
        made: Tensor = grad(lambda x: cross_entropy(x, ids(S)).loss.sum())(x).square().sum()
        return made

    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad(slope)(normal(S, C))


def test_a_pruners_loss_under_grad_updates_the_state_once(backend: str) -> None:
    x, target, indices = normal(S, C), ids(S), torch.arange(S)
    pruners = [emp_fast.Pruner(2 * S) for _ in range(2)]
    made = grad(lambda x: pruners[0].loss(x, target, indices))(x)
    leaf = x.clone().requires_grad_()
    pruners[1].loss(leaf, target, indices).backward()
    torch.testing.assert_close(made, leaf.grad)
    _, pull = vjp(lambda x: emp_fast.Pruner(2 * S).loss(x, target, indices), x)
    torch.testing.assert_close(pull(torch.tensor(1.0))[0], leaf.grad)
    assert torch.equal(pruners[0].store.visits, pruners[1].store.visits)
    torch.testing.assert_close(pruners[0].store.scores, pruners[1].store.scores)


def test_many_gradients_of_a_pruners_loss(backend: str) -> None:
    leaf = normal(S, C).requires_grad_()
    loss = emp_fast.Pruner(S).loss(leaf, ids(S), torch.arange(S))
    incoming = torch.tensor([1.0, -2.0])
    (made,) = torch.autograd.grad(loss, leaf, incoming, is_grads_batched=True, retain_graph=True)
    loss.backward()
    torch.testing.assert_close(made, incoming[:, None, None] * leaf.grad)
