"""The torch.library ops: opcheck of each, and what torch.compile makes of everything above them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import emp_fast
from emp_fast import ops
from emp_fast.backends.base import LossOptions, Recurrence, State
from emp_fast.functional import cross_entropy, info_nce, linear_cross_entropy, topk_indices
from emp_fast.policies import BelowMean
from emp_fast.row_count import RowCount
from emp_fast.rules import EMP, UCB, Forgetting, Loss
from emp_fast.testing import Case, make

N, R, C = 9, 6, 10
LOSS_OPTIONS = LossOptions(-100, 0.1, 3.0)
RECURRENCE = Recurrence("variance", "entropy", 0.5, "loss", 1.0, 1.0, 0.5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).requires_grad_()


def class_ids(rows: int = R, classes: int = C) -> Tensor:
    ids = torch.arange(rows) * 7 % classes
    ids[1] = -100
    return ids


def state() -> State:
    return State(
        torch.full((N,), torch.inf),
        torch.zeros(N),
        torch.zeros(N, dtype=torch.int32),
        torch.zeros(N),
        torch.zeros(N, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int64),
    )


# ---- opcheck ------------------------------------------------------------------------------------


def scored(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    fields: Tensor = torch.ops.emp_fast.cross_entropy(logits, target, weight, *LOSS_OPTIONS)[1]
    return fields


def cross_entropy_arguments() -> list[tuple[Any, ...]]:
    logits, soft = normal(R, C), normal(R, C, seed=1).softmax(1)
    return [
        (logits, class_ids(), None, *LOSS_OPTIONS),
        (logits, soft, normal(C).abs(), *LOSS_OPTIONS),
        (logits.bfloat16(), class_ids(), normal(C).abs(), *LOSS_OPTIONS),
        (logits.double(), soft.double(), None, *LOSS_OPTIONS),
        (normal(R, C + 3)[:, 1:-2], class_ids(), None, *LOSS_OPTIONS),
        (normal(0, C), class_ids()[:0], None, *LOSS_OPTIONS),
    ]


def backward_arguments() -> list[tuple[Any, ...]]:
    return [
        (normal(a[0].shape[0]), *a[:3], scored(*a[:3]), *a[3:]) for a in cross_entropy_arguments()
    ]


#: Every op with argument lists that between them reach each kind of argument it takes.
ARGUMENTS: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "cross_entropy": cross_entropy_arguments,
    "cross_entropy_backward": backward_arguments,
    "mean_step": lambda: [
        (
            *(normal(R, C), class_ids(), None, *LOSS_OPTIONS, normal(R).abs()),
            *(torch.arange(R), *state(), *RECURRENCE),
        ),
        (
            *(normal(R, C), class_ids(), normal(C).abs(), *LOSS_OPTIONS, None),
            *(torch.arange(R), *state(), *Recurrence("ema", "loss")),
        ),
    ],
    "scale_": lambda: [
        (normal(R, C), torch.tensor(2.0), None),
        (normal(R).half(), torch.tensor(1.0), torch.tensor(0.5)),
    ],
    "update_state": lambda: [
        (
            *(torch.arange(R), normal(R), normal(R), torch.ones(R, dtype=torch.int32)),
            *state(),
            *RECURRENCE,
        ),
        (torch.tensor([3, 3, 0]), normal(3), None, None, *state(), *Recurrence("mean", "loss")),
    ],
    "find_winners": lambda: [
        (torch.tensor([3, 3, 0]), normal(3) > 0, None, N, torch.zeros(2, dtype=torch.int64)),
        (torch.arange(R), normal(R) > 0, torch.arange(R).int(), N, torch.zeros(2).long()),
    ],
    "count_rows": lambda: [(torch.tensor([5, 3]), 4, torch.zeros(2))],
    "segment_sum": lambda: [
        (normal(3, R), torch.tensor([0, 2, 2, R])),
        (normal(1, R).double(), torch.tensor([0, R])),
        (normal(2, 0), torch.tensor([0])),
    ],
    "topk_indices": lambda: [(normal(30), 7), (normal(30).double(), 30), (normal(0), 0)],
    "grouped_topk_indices": lambda: [
        (normal(30), torch.arange(30) % 3, torch.tensor([2, 0, 10]), 12)
    ],
    "philox": lambda: [(7, 2**40 + 5, 2, 0, 3, torch.device("cpu"))],
}


def test_every_op_is_checked() -> None:
    defined = {
        name.removeprefix("emp_fast::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("emp_fast::")
    }
    assert defined == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name: str, backend: str) -> None:
    op = getattr(torch.ops.emp_fast, name).default
    for arguments in ARGUMENTS[name]():
        torch.library.opcheck(op, arguments)


def arguments_of(name: str) -> list[str]:
    schema = getattr(torch.ops.emp_fast, name).default._schema
    return [argument.name for argument in schema.arguments]


def test_state_and_recurrence_are_arguments_in_the_order_of_their_fields() -> None:
    """They are passed as ``*state, *recurrence``, and rebuilt from that."""
    wanted = [*State._fields, *Recurrence._fields]
    for name in ("mean_step", "update_state"):
        assert arguments_of(name)[-len(wanted) :] == wanted


def test_loss_options_are_arguments_in_the_order_of_their_fields() -> None:
    """They are passed as ``*options``."""
    wanted = list(LossOptions._fields)
    for name in ("cross_entropy", "cross_entropy_backward"):
        assert arguments_of(name)[-len(wanted) :] == wanted
    assert arguments_of("mean_step")[3 : 3 + len(wanted)] == wanted


def test_opcheck_of_logits_that_want_a_gradient(backend: str) -> None:
    """That is the autograd functions' business; the ops by themselves record nothing."""
    op = torch.ops.emp_fast.cross_entropy.default
    torch.library.opcheck(op, (leaf(R, C), class_ids(), None, -100, 0.0, 0.0))


def test_the_fake_of_every_op_has_the_strides_of_its_result(backend: str) -> None:
    """Compiled code indexes by what the fake says."""
    for name in ("cross_entropy", "cross_entropy_backward", "segment_sum", "topk_indices"):
        op = getattr(torch.ops.emp_fast, name)
        for arguments in ARGUMENTS[name]():
            real = op(*arguments)
            with torch._subclasses.FakeTensorMode() as mode:
                faked = (mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)
                fake = op(*faked)
            pairs = [(real, fake)] if isinstance(real, Tensor) else zip(real, fake, strict=True)
            for a, b in pairs:
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name


# ---- torch.compile: values and gradients --------------------------------------------------------


class Call(NamedTuple):
    """A function of fresh leaves; its result is compared whole, and its loss differentiated."""

    function: Callable[..., Any]
    inputs: Callable[[], tuple[Tensor, ...]]


def scoring(**options: Any) -> Call:
    return Call(lambda x, t: cross_entropy(x, t, **options), lambda: (leaf(R, C), class_ids()))


def of_case(case: Case) -> Call:
    logits, target, options = make(case)
    return Call(
        lambda x, t: cross_entropy(x, t, **options),
        lambda: (logits.clone().requires_grad_(), target),
    )


CALLS = {
    "class ids": scoring(),
    "every option": scoring(weight=torch.rand(C), label_smoothing=0.1, softcap=3.0),
    "ignore_index": of_case(Case("compiled_ignored", R, C, ignored="some", ignore_index=3)),
    "soft": of_case(Case("compiled_soft", R, C, target="soft", weighted=True)),
    "sequences": of_case(Case("compiled_sequences", 3, C, positions=4, ignored="some")),
    "packed": of_case(Case("compiled_packed", 4, C, lengths=(3, 0, 2, 4), ignored="some")),
    "transposed": of_case(Case("compiled_transposed", R, C, layout="transposed")),
    "bfloat16": of_case(Case("compiled_bfloat16", R, C, dtype=torch.bfloat16)),
    "float64": of_case(Case("compiled_float64", R, C, dtype=torch.float64)),
    "linear": Call(
        lambda h, c, b, t: linear_cross_entropy(h, c, t, bias=b, label_smoothing=0.1),
        lambda: (leaf(R, 4), leaf(C, 4, seed=1), leaf(C, seed=2), class_ids()),
    ),
    "linear without bias": Call(
        lambda h, c, t: linear_cross_entropy(h, c, t, weight=torch.ones(C)),
        lambda: (leaf(2, 3, 4), leaf(C, 4, seed=1), class_ids().view(2, 3)),
    ),
    "info_nce": Call(info_nce, lambda: (leaf(R, 4), leaf(R, 4, seed=1))),
    "info_nce one way, hidden": Call(
        lambda q, k, h: info_nce(q, k, symmetric=False, temperature=0.5, hidden=h),
        lambda: (leaf(R, 4), leaf(R, 4, seed=1), normal(R, 3)),
    ),
    "topk": Call(lambda s: topk_indices(s, 5), lambda: (normal(30),)),
    "topk of groups": Call(
        lambda s, g: topk_indices(s, 5, groups=g, group_k=[2, 0, 3]),
        lambda: (normal(30), torch.arange(30) % 3),
    ),
    "topk of groups, quotas a tensor": Call(
        lambda s, g, q: topk_indices(s, 5, groups=g, group_k=q),
        lambda: (normal(30), torch.arange(30) % 3, torch.tensor([2, 0, 3])),
    ),
}


def run(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Results and, where there is a loss, its gradient to every leaf; twice from one graph."""
    result = function(*inputs)
    if isinstance(result, Tensor):
        return [result]
    leaves = [x for x in inputs if x.requires_grad]
    loss = (result.loss * torch.arange(1.0, result.loss.shape[0] + 1)).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return [*(field.detach() for field in result), *first]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_call_is_the_eager_call(name: str, backend: str) -> None:
    call = CALLS[name]
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    got, wanted = run(compiled, call.inputs()), run(call.function, call.inputs())
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("topk")])
@pytest.mark.parametrize("how", ["no_grad", "detached"])
def test_a_compiled_call_without_a_gradient(name: str, how: str, backend: str) -> None:
    call = CALLS[name]
    inputs = call.inputs()
    if how == "detached":
        inputs = tuple(x.detach() for x in inputs)
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    with torch.no_grad() if how == "no_grad" else nullcontext():
        got, wanted = compiled(*inputs), call.function(*inputs)
    for a, b in zip(got, wanted, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_inductor_gives_the_same() -> None:
    for name in ("packed", "linear"):
        call = CALLS[name]
        got = run(torch.compile(call.function, fullgraph=True), call.inputs())
        for a, b in zip(got, run(call.function, call.inputs()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _two_losses(x: Tensor, k: Tensor) -> Tensor:
    target = torch.tensor([0, 1, 2, 3])
    return cross_entropy(x, target).loss.sum() + cross_entropy(2 * x, target).loss.sum()


@pytest.mark.parametrize("loss", [_two_losses, lambda x, k: info_nce(x, k).loss.sum()])
def test_several_losses_compile_with_dynamic_shapes(loss: Callable[..., Tensor]) -> None:
    """With dynamic=True, Dynamo makes float arguments symbolic, defaults among them."""
    x, k = normal(4, C).requires_grad_(), normal(4, C, seed=1)
    wanted = loss(x, k)
    got = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")(x, k)
    torch.testing.assert_close(got, wanted)
    grads = (torch.autograd.grad(value, x)[0] for value in (got, wanted))
    torch.testing.assert_close(*grads)


def test_compiled_bad_values_raise_as_eager_ones(backend: str) -> None:
    compiled = {
        f: torch.compile(f, fullgraph=True, backend="aot_eager")
        for f in (cross_entropy, topk_indices)
    }
    with pytest.raises(IndexError, match=r"target must lie in \[0, 10\).*got 10 at position 2"):
        compiled[cross_entropy](normal(3, C), torch.tensor([0, 1, 10]))
    with pytest.raises(ValueError, match=r"offsets must not fall, got 2 then 1"):
        compiled[cross_entropy](
            normal(3, C), torch.tensor([0, 1, 2]), offsets=torch.tensor([0, 2, 1, 3])
        )
    with pytest.raises(ValueError, match=r"group_k must sum to k=3, got \[1, 1\]"):
        compiled[topk_indices](
            normal(4), 3, groups=torch.tensor([0, 1, 0, 1]), group_k=torch.tensor([1, 1])
        )


# ---- torch.compile: a training step -------------------------------------------------------------

#: A step as scripts have it, where model and pruner are globals of the module.
MODEL = torch.nn.Linear(5, C)
PRUNER = emp_fast.Pruner(N)


def global_step(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return PRUNER.loss(MODEL(x), y, index)


class Module(torch.nn.Module):
    """A step as trainers have it: the pruner an attribute of the module."""

    def __init__(self, pruner: emp_fast.Pruner) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(5, C)
        self.pruner = pruner

    def forward(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return self.pruner.loss(self.layer(x), y, index)


def batches(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (normal(n, 5, seed=i), class_ids(n), (torch.arange(n) + i) % N) for i, n in enumerate(sizes)
    ]


def train(step: Callable[..., Tensor], parameters: list[Tensor], sizes: tuple[int, ...]) -> None:
    for batch in batches(sizes):
        for parameter, grad in zip(
            parameters, torch.autograd.grad(step(*batch), parameters), strict=True
        ):
            with torch.no_grad():
                parameter -= 0.5 * grad


@pytest.mark.parametrize(
    "rule", [EMP(0.5, 0.9), UCB(), Forgetting()], ids=lambda r: type(r).__name__
)
def test_a_compiled_step_trains_and_scores_as_the_eager_one(rule: emp_fast.Rule) -> None:
    sizes = (8, 8, 5, 7, 3, 9, 4, 6, 2)
    trained = []
    for compiles in (False, True):
        torch.manual_seed(0)
        module = Module(emp_fast.Pruner(N, rule=rule))
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(module, fullgraph=True, backend=counter) if compiles else module
        train(step, list(module.layer.parameters()), sizes)
        trained.append(module)
    eager, compiled = trained
    assert 1 <= counter.frame_count <= 3  # sizes constant, then variable
    torch.testing.assert_close(compiled.layer.weight, eager.layer.weight, rtol=1e-5, atol=1e-6)
    got, wanted = compiled.pruner.store, eager.pruner.store
    torch.testing.assert_close(got.scores, wanted.scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.visits, wanted.visits)
    assert got.rows_seen == wanted.rows_seen == sum(sizes)


@pytest.mark.parametrize("rule", [Loss(), Forgetting()], ids=lambda r: type(r).__name__)
def test_a_compiled_update_that_raises_counts_no_rows(rule: emp_fast.Rule) -> None:
    """Inductor would count them first, and a resumed run would not train on them."""
    module = Module(emp_fast.Pruner(120, 0.5, rule=rule, seed=3))
    step = torch.compile(module, fullgraph=True)
    order = torch.tensor(list(module.pruner.sampler))
    inputs, target = normal(6, 5), torch.arange(6) % C
    step(inputs, target, order[:6]).backward()
    with pytest.raises(IndexError, match="target must lie in"):
        step(inputs, torch.full((6,), C), order[6:12])
    with pytest.raises(IndexError, match="indices must lie in"):
        step(inputs, target, order[6:12] + 120)
    assert module.pruner.store.rows_seen == 6
    resumed = emp_fast.Pruner(120, 0.5, rule=rule, seed=3)
    resumed.load_state_dict(module.pruner.state_dict())
    assert list(resumed.sampler) == order[6:].tolist()


def test_a_compiled_step_counts_its_rows() -> None:
    counted = RowCount()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(scores: Tensor) -> None:
        counted.add(scores.shape[0], scores.zero_())

    for rows in (3, 8, 5):
        update(normal(rows))
    assert (counted.given, counted.largest) == (16, 8)


def test_a_step_of_globals_compiles_twice_at_most() -> None:
    """torch.compile guards on the ints of globals: a count of rows made it compile every step."""
    counter = CompileCounterWithBackend("aot_eager")
    seen = PRUNER.store.rows_seen
    sizes = (8, 8, 5, 7, 3, 9, 4, 6, 2)
    train(
        torch.compile(global_step, fullgraph=True, backend=counter),
        list(MODEL.parameters()),
        sizes,
    )
    assert counter.frame_count <= 2
    assert PRUNER.store.rows_seen == seen + sum(sizes)


def test_the_weights_of_a_policy_enter_a_compiled_step() -> None:
    logits = leaf(N, C)
    losses = []
    for compiles in (False, True):
        pruner = emp_fast.Pruner(N, policy=BelowMean(0.5))
        for _ in range(2):  # the second epoch weighs what it kept of the samples below the mean
            index = torch.tensor(list(pruner.sampler))
            step = torch.compile(pruner.loss, backend="aot_eager") if compiles else pruner.loss
            loss = step(logits[index], class_ids(N)[index], index)
        assert pruner.selection.weights is not None
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "info_nce", "topk"])
def test_sizes_that_vary_compile_twice(name: str) -> None:
    functions: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "cross_entropy": lambda x, t: cross_entropy(x, t).loss,
        "linear_cross_entropy": lambda x, t: linear_cross_entropy(x, x[:C], t % x[:C].shape[0]),
        "info_nce": lambda x, t: info_nce(x, x.flip(0)),
        "topk": lambda x, t: topk_indices(x[:, 0], x.shape[0] - 2),
    }
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functions[name], fullgraph=True, backend=counter)
    for n in (8, 8, 5, 7, 12):
        compiled(leaf(n + C, C), class_ids(n + C))
    assert counter.frame_count <= 2


# ---- twice through one graph --------------------------------------------------------------------


@pytest.mark.parametrize("watched", [False, True], ids=["direct", "op"])
def test_a_fused_step_gives_its_gradient_twice(backend: str, watched: bool) -> None:
    """`MeanCrossEntropy` hands out its buffer in the first pass, the second computes another."""
    logits, target, scale = leaf(R, C), class_ids(), normal(R).abs()
    arguments = (target, None, LossOptions(), scale, torch.arange(R), state())
    with Seen() if watched else nullcontext() as seen:
        mean = ops.mean_step(logits, *arguments, Recurrence("ema", "loss"))
    assert seen is None or seen.names == {"mean_step"}
    first = torch.autograd.grad(3 * mean, logits, retain_graph=True)[0].clone()
    second = torch.autograd.grad(3 * mean, logits)[0]
    x = logits.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, target, reduction="none") * scale
    wanted = torch.autograd.grad(3 * loss.sum() / (R - 1), x)[0]
    for got in (first, second):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


class Nothing(torch.autograd.Function):
    """Passes values on and no gradient back, as the backward pass of an unused branch does."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        return None


def test_no_gradient_of_the_loss_is_none_of_the_logits() -> None:
    logits, classifier = leaf(R, C), leaf(C, C)
    for stats in (
        cross_entropy(logits, class_ids()),
        cross_entropy(logits, class_ids(), offsets=torch.tensor([0, 2, R])),
        linear_cross_entropy(logits, classifier, class_ids()),
    ):
        Nothing.apply(stats.loss).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is None
    assert classifier.grad is None


# ---- past the dispatcher ------------------------------------------------------------------------


class Inputs(NamedTuple):
    logits: Tensor
    target: Tensor
    scores: Tensor
    groups: Tensor
    quotas: Tensor


def inputs() -> Inputs:
    return Inputs(leaf(R, C), class_ids(), normal(N), torch.arange(N) % 2, torch.tensor([1, 3]))


def scored_and_selected(given: Inputs) -> list[Tensor]:
    """What the ops that are called past the dispatcher give."""
    stats = cross_entropy(given.logits, given.target)
    (grad,) = torch.autograd.grad(stats.loss.sum(), given.logits)
    return [
        *(field.detach() for field in stats),
        grad,
        topk_indices(given.scores, 4),
        topk_indices(given.scores, 4, groups=given.groups, group_k=given.quotas),
    ]


class Seen(TorchDispatchMode):
    """The names of the package's ops that pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "emp_fast":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


DIRECT = {
    "cross_entropy",
    "cross_entropy_backward",
    "topk_indices",
    "grouped_topk_indices",
}


def test_who_looks_sees_every_op() -> None:
    with Seen() as seen:
        watched = scored_and_selected(inputs())
    assert seen.names >= DIRECT
    with torch.profiler.profile() as profile:
        profiled = scored_and_selected(inputs())
    assert {event.key for event in profile.key_averages()} >= {
        f"emp_fast::{name}" for name in DIRECT
    }
    for results in (watched, profiled):
        assert all(map(torch.equal, results, scored_and_selected(inputs())))


@pytest.mark.parametrize(
    ("rule", "name"), [(EMP(), "update_state"), (Forgetting(), "find_winners")], ids=repr
)
def test_who_looks_sees_every_update(rule: emp_fast.Rule, name: str, backend: str) -> None:
    stores = [emp_fast.ScoreStore(N, rule=rule) for _ in range(2)]
    indices, stats = torch.tensor([3, 0, 3, 8, 5, 1]), cross_entropy(normal(R, C), class_ids())
    with Seen() as seen:
        stores[0].update(indices, stats)
    stores[1].update(indices, stats)
    assert seen.names == {name}
    assert torch.equal(stores[0].scores, stores[1].scores)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_and_tracers_see_the_ops() -> None:
    given = inputs()

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, given.target).loss

    logits = given.logits.detach()
    traced = torch.jit.trace(loss, logits)
    assert torch.equal(traced(logits + 1), loss(logits + 1))
    assert torch.equal(make_fx(loss)(logits)(logits * 2), loss(logits * 2))
    on_meta = cross_entropy(logits.to("meta"), given.target.to("meta"))
    assert all(field.is_meta for field in on_meta)


TRACEABLE: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda x, key, t: cross_entropy(x, t),
    "linear_cross_entropy": lambda x, key, t: linear_cross_entropy(x, key, t),
    "info_nce": lambda x, key, t: info_nce(x, key, hidden=x),
}


@pytest.mark.parametrize("name", TRACEABLE)
def test_tensors_without_values_have_shapes(name: str) -> None:
    given = normal(R, R), normal(R, R), torch.arange(R)
    real = TRACEABLE[name](*given)
    on_meta = TRACEABLE[name](*(tensor.to("meta") for tensor in given))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = TRACEABLE[name](*map(mode.from_tensor, given))
    for one, other in ((real, on_meta), (real, fake)):
        for a, b in zip(one, other, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    traced = make_fx(lambda *x: TRACEABLE[name](*x).loss, tracing_mode="symbolic")(*given)
    torch.testing.assert_close(traced(*given), real.loss)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [2]])
def test_rows_that_no_segment_holds_get_no_gradient(offsets: list[int]) -> None:
    """On a GPU the offsets are not checked; the forward pass leaves such rows out."""
    context = SimpleNamespace(saved_tensors=(torch.tensor(offsets),), rows=4, dtype=torch.float32)
    grad, *_ = ops.SegmentSum.backward(context, torch.full((len(offsets) - 1,), 3.0), None)
    summed = torch.zeros(4)
    summed[offsets[0] : offsets[-1]] = 3.0
    assert grad is not None
    assert torch.equal(grad, summed)


@pytest.mark.parametrize("name", TRACEABLE)
def test_forward_mode_is_refused_and_not_taken_for_a_constant(name: str, backend: str) -> None:
    given = normal(R, R), normal(R, R), torch.arange(R)

    def loss(x: Tensor) -> Tensor:
        made: Tensor = TRACEABLE[name](x, *given[1:]).loss
        return made

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, given[:1], given[:1])
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="jvp"):
            loss(forward_ad.make_dual(given[0], given[0]))
        assert torch.equal(loss(given[0]), TRACEABLE[name](*given).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_defaults_of_torch_do_not_reach_the_results(dtype: torch.dtype) -> None:
    """Buffers of another type or device than the kernels write to would be overrun."""
    given, expected = inputs(), scored_and_selected(inputs())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = scored_and_selected(given)
        store = emp_fast.ScoreStore(N, UCB())
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, found, expected))
    assert store.scores.dtype == store.memory.dtype == torch.float32
    assert store._samples.state.variance is not None
    assert store._samples.state.variance.dtype == torch.float32
