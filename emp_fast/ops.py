"""The operations as torch.library ops: the schema, kernel, fake and autograd of each.

Nothing else dispatches. If nothing observes an op (`_watched`), it bypasses the dispatcher: scoring
a small batch takes a few microseconds, and the dispatcher would double that. ``Library.define``
costs a third of ``torch.library.custom_op`` per call, which matters in training steps on small
batches. The autograd functions are outside the ops, so that ``torch.compile`` traces through them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from emp_fast._torch_internals import (
    apply_past_transforms,
    count_dispatch_modes,
    innermost_transform,
    is_batched_gradient,
    is_profiled,
    tracing_state,
)
from emp_fast.backends import resolve
from emp_fast.backends.base import (
    ROW_FIELDS,
    SCORE_FIELDS,
    LossOptions,
    MeanStep,
    Recurrence,
    State,
)
from emp_fast.backends.checks import check_offsets, check_quotas
from emp_fast.backends.winners import Winners
from emp_fast.backends.winners import winners as find_winners

_library = torch.library.Library("emp_fast", "DEF")
_STATE = (
    "Tensor(a!) scores, Tensor(b!) memory, Tensor(c!) visits, Tensor(d!)? variance, "
    "Tensor(e!) claims, Tensor(f!) counters"
)
_RECURRENCE = (
    "str kind, str signal, float decay, str? direct, float direct_scale, float memory_scale, "
    "float variance_scale"
)
_LOSS_OPTIONS = "int ignore_index, float label_smoothing, float softcap"


def _define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers an op; returns a function that calls it, if its first argument is a tensor.

    Without ``vmap``, `torch.vmap` calls the op once per example.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    # Without gradients, as in calls that bypass the dispatcher: autograd must not record the tensor
    # code of a backend.
    _library.impl(name, torch.no_grad()(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"emp_fast::{name}", fake, lib=_library)
    if vmap is not None:
        torch.library.register_vmap(f"emp_fast::{name}", vmap, lib=_library)
    op = getattr(torch.ops.emp_fast, name)

    def call(tensor: Tensor, *arguments: Any) -> Any:
        return (op if _watched(tensor) else kernel)(tensor, *arguments)

    return call


#: `LossOptions`, cached because a run uses the same few settings again and again.
loss_options = functools.lru_cache(maxsize=64)(LossOptions)


def is_traced(tensor: Tensor) -> bool:
    """Whether ``tensor`` may stand for other tensors, so that no decision may depend on its values.

    That is so under a compiler, tracer, transform or mode, and for subclasses and meta tensors.
    """
    return bool(
        is_compiling()
        or type(tensor) is not Tensor
        or tensor.is_meta
        or count_dispatch_modes()
        or innermost_transform()
        or is_batched_gradient(tensor)
        or tracing_state()
    )


def _watched(tensor: Tensor) -> bool:
    """Whether something must see the ops on ``tensor``: a tracer (`is_traced`) or a profiler."""
    return is_traced(tensor) or bool(is_profiled())


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disables autocast, so that ops compute in the dtypes of their tensors."""
    if device.type == "meta":  # torch.autocast does not support it
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _state_and_recurrence(*arguments: Any) -> tuple[State, Recurrence]:
    """The arguments of an op that _STATE and _RECURRENCE declare."""
    fields = len(State._fields)
    return State(*arguments[:fields]), Recurrence(*arguments[fields:])


# ---- scoring ------------------------------------------------------------------------------------


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = loss_options(ignore_index, label_smoothing, softcap)
    return resolve(logits.device, logits.dtype).cross_entropy(logits, target, weight, options)


def _cross_entropy_fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty((len(ROW_FIELDS), rows), dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.bool),
        logits.new_empty(rows, dtype=torch.int32),
    )


def _as_rows(x: Tensor, batch: int, dim: int | None, rows_dim: int = 0) -> Tensor:
    """Makes the rows of all examples of `torch.vmap` the rows of one call.

    ``dim`` is the dimension of the examples; None: all examples share ``x``.
    """
    if dim is None:
        x = x.unsqueeze(rows_dim)
        x = x.expand(*x.shape[:rows_dim], batch, *x.shape[rows_dim + 1 :])
    else:
        x = x.movedim(dim, rows_dim)
    return x.flatten(rows_dim, rows_dim + 1).contiguous()


def _cross_entropy_vmap(
    info: Any, dims: tuple[int | None, ...], logits: Tensor, target: Tensor, *others: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    batch = info.batch_size
    if dims[2] is not None:  # every example has its own class weights
        calls = [
            cross_entropy(*example) for example in _examples(batch, dims, logits, target, *others)
        ]
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0, 0, 0, 0)
    loss, rows, correct, count = cross_entropy(
        _as_rows(logits, batch, dims[0]), _as_rows(target, batch, dims[1]), *others
    )
    made = loss, rows, correct, count
    return tuple(x.unflatten(-1, (batch, -1)) for x in made), (0, 1, 0, 0)


def _examples(batch: int, dims: tuple[int | None, ...], *arguments: Any) -> list[list[Any]]:
    """The arguments of each example of `torch.vmap`."""
    return [
        [x if d is None else x.select(d, i) for x, d in zip(arguments, dims, strict=True)]
        for i in range(batch)
    ]


cross_entropy = _define(
    f"cross_entropy(Tensor logits, Tensor target, Tensor? weight, {_LOSS_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
    _cross_entropy_vmap,
)


def scores(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    """`Backend.scores`: the fields of SampleStats for rows whose gradient is not wanted."""
    if _watched(logits):
        loss, rows, correct, count = torch.ops.emp_fast.cross_entropy(
            logits, target, weight, ignore_index, label_smoothing, softcap
        )
        return (loss, *rows[: len(SCORE_FIELDS)].unbind(0), correct, count)
    options = loss_options(ignore_index, label_smoothing, softcap)
    return resolve(logits.device, logits.dtype).scores(logits, target, weight, options)


def _cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    rows: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> Tensor:
    options = loss_options(ignore_index, label_smoothing, softcap)
    backend = resolve(logits.device, logits.dtype)
    return backend.cross_entropy_backward(grad_loss, logits, target, weight, rows, options)


def _cross_entropy_backward_vmap(
    info: Any,
    dims: tuple[int | None, ...],
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    rows: Tensor,
    *options: Any,
) -> tuple[Tensor, int]:
    batch = info.batch_size
    if dims[3] is not None:
        arguments = grad_loss, logits, target, weight, rows, *options
        calls = [cross_entropy_backward(*example) for example in _examples(batch, dims, *arguments)]
        return torch.stack(calls), 0
    grad = cross_entropy_backward(
        _as_rows(grad_loss, batch, dims[0]),
        _as_rows(logits, batch, dims[1]),
        _as_rows(target, batch, dims[2]),
        weight,
        _as_rows(rows, batch, dims[4], rows_dim=1),
        *options,
    )
    return grad.unflatten(0, (batch, -1)), 0


cross_entropy_backward = _define(
    "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
    f"Tensor rows, {_LOSS_OPTIONS}) -> Tensor",
    _cross_entropy_backward,
    lambda grad_loss, logits, *_: logits.new_empty(logits.shape),
    _cross_entropy_backward_vmap,
)


class _Once(torch.autograd.Function):
    """Passes a gradient on. Differentiating it raises, instead of treating it as a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "the gradient of an emp_fast loss cannot be differentiated again; "
            "torch.nn.functional.cross_entropy can"
        )


def _once(grad: Tensor, *inputs: Tensor | None) -> Tensor:
    """Guards ``grad``, computed from ``inputs``, if the caller asked for ``create_graph``."""
    if torch.is_grad_enabled() and not is_compiling():
        guarded: Tensor = _Once.apply(  # type: ignore[no-untyped-call]
            grad.detach(), *(x for x in inputs if x is not None)
        )
        return guarded
    return grad


def _applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, without torch's search for transforms if nothing observes the tensor.

    The first argument is the tensor.
    """
    directly = apply_past_transforms(function)

    def call(tensor: Tensor, *arguments: Any) -> Any:
        apply: Callable[..., Any] = function.apply if _watched(tensor) else directly
        return apply(tensor, *arguments)

    return call


def _only_loss_carries_gradient(ctx: Any, *others: Tensor) -> None:
    """Marks the other outputs, for which autograd would otherwise make gradients of zeros."""
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


class CrossEntropy(torch.autograd.Function):
    """Row scores with a differentiable loss: (loss [R], rows [7, R], correct [R], count [R])."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return cross_entropy(logits, *arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, weight, *ctx.options = inputs
        _, rows, correct, count = output
        ctx.save_for_backward(logits, target, weight, rows)
        _only_loss_carries_gradient(ctx, rows, correct, count)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 6
        logits, target, weight, rows = ctx.saved_tensors
        grad = cross_entropy_backward(
            grad_loss.contiguous(), logits, target, weight, rows, *ctx.options
        )
        return _once(grad, grad_loss, logits), None, None, None, None, None


#: `CrossEntropy` of rows whose gradient is wanted.
cross_entropy_for_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
cross_entropy_for_backward = _applied(CrossEntropy)


class WithGaps(torch.autograd.Function):
    """Views the positions [S, T, C] of sequences and the rows between them in memory as [S, P, C].

    The P rows of a sequence have no gaps; the positions start at row ``front``. Nothing is copied.
    The gradient of the rows in between is dropped, so their values must not matter. As with any
    view, autograd refuses the backward pass if the logits were written to after the loss.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, front: int) -> Tensor:
        samples, ctx.positions, classes = logits.shape
        ctx.front = front
        sequence, row, column = logits.stride()
        start = logits.storage_offset() - front * row
        shape = samples, sequence // row, classes
        return logits.as_strided(shape, (sequence, row, column), start)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(1, ctx.front, ctx.positions), None


# ---- scores, gradient and state update in one ---------------------------------------------------


def _mean_step(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    row_scale: Tensor | None,
    indices: Tensor,
    *state_and_recurrence: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    options = LossOptions(ignore_index, label_smoothing, softcap)
    state, recurrence = _state_and_recurrence(*state_and_recurrence)
    mean, grad, factor = resolve(logits.device, logits.dtype).mean_step(
        logits, target, weight, options, row_scale, indices, state, recurrence
    )
    return mean, grad, torch.ones_like(mean) if factor is None else factor


def _mean_step_fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    mean, factor = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    return mean, logits.new_empty(logits.shape), factor


_define(
    f"mean_step(Tensor logits, Tensor target, Tensor? weight, {_LOSS_OPTIONS}, "
    f"Tensor? row_scale, Tensor indices, {_STATE}, {_RECURRENCE}) -> (Tensor, Tensor, Tensor)",
    _mean_step,
    _mean_step_fake,
)


def mean_step(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    row_scale: Tensor | None,
    indices: Tensor,
    state: State,
    recurrence: Recurrence,
) -> MeanStep:
    """`Backend.mean_step`."""
    if not _watched(logits):
        backend = resolve(logits.device, logits.dtype)
        return backend.mean_step(
            logits, target, weight, options, row_scale, indices, state, recurrence
        )
    return MeanStep(
        *torch.ops.emp_fast.mean_step(
            logits, target, weight, *options, row_scale, indices, *state, *recurrence
        )
    )


_scale_ = _define(
    "scale_(Tensor(a!) grad, Tensor factor, Tensor? also) -> ()",
    lambda grad, *factors: resolve(grad.device, grad.dtype).scale_(grad, *factors),
    lambda *_: None,
)


class MeanCrossEntropy(torch.autograd.Function):
    """Weighted mean loss of a batch, its gradient and the new state from one read of the logits.

    The forward pass computes the gradient. The backward pass scales it by the incoming gradient and
    the factor, usually 1 together, which costs no memory traffic (`scale_`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [S, C]
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        row_scale: Tensor | None,  # [S]
        indices: Tensor,  # [S]
        state: State,
        recurrence: Recurrence,
    ) -> Tensor:
        made = mean_step(logits, target, weight, options, row_scale, indices, state, recurrence)
        ctx.options, ctx.grad, ctx.factor = options, made.grad, made.factor
        ctx.save_for_backward(logits, target, weight, row_scale)
        return made.mean

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
        if is_batched_gradient(grad_mean):  # several gradients, and only one is at hand
            return MeanCrossEntropy._made_again(ctx, grad_mean), *(None,) * 7
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # second pass through a retained graph; the first took the gradient
            grad = MeanCrossEntropy._made_again(ctx, grad_mean)
        else:
            _scale_(grad, grad_mean, ctx.factor)
        if torch.is_grad_enabled():  # unpacking the saved tensors takes as long as the rest
            grad = _once(grad, grad_mean, ctx.saved_tensors[0])
        return grad, *(None,) * 7

    @staticmethod
    def _made_again(ctx: Any, grad_mean: Tensor) -> Tensor:
        logits, target, weight, row_scale = ctx.saved_tensors
        _, rows, _, count = cross_entropy(logits, target, weight, *ctx.options)
        grad_loss = (grad_mean / count.sum().clamp_min(1)).expand(logits.shape[0])
        grad_loss = grad_loss if row_scale is None else grad_loss * row_scale
        grad: Tensor = cross_entropy_backward(
            grad_loss.contiguous(), logits, target, weight, rows, *ctx.options
        )
        return grad


#: `MeanCrossEntropy`, for backends where `fuses_step` says that it reads the logits once.
mean_step_for_backward: Callable[..., Tensor] = _applied(MeanCrossEntropy)


def fuses_step(logits: Tensor) -> bool:
    """`Backend.fuses_step` of the backend that serves these logits."""
    return resolve(logits.device, logits.dtype).fuses_step


# ---- state --------------------------------------------------------------------------------------


def _update_state(
    indices: Tensor,
    signal: Tensor,
    direct: Tensor | None,
    count: Tensor | None,
    *state_and_recurrence: Any,
) -> None:
    state, recurrence = _state_and_recurrence(*state_and_recurrence)
    backend = resolve(state.scores.device)
    backend.update_state(indices, signal, direct, count, state, recurrence)


_define(
    "update_state(Tensor indices, Tensor signal_values, Tensor? direct_values, Tensor? count, "
    f"{_STATE}, {_RECURRENCE}) -> ()",
    _update_state,
    lambda *_: None,
)


def update_state(
    indices: Tensor,
    signal: Tensor,
    direct: Tensor | None,
    count: Tensor | None,
    state: State,
    recurrence: Recurrence,
) -> None:
    """`Backend.update_state`."""
    if not _watched(indices):
        backend = resolve(state.scores.device)
        backend.update_state(indices, signal, direct, count, state, recurrence)
        return
    torch.ops.emp_fast.update_state(indices, signal, direct, count, *state, *recurrence)


def _winners_fake(indices: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    made = indices.new_empty(indices.shape)
    return made, torch.empty_like(made), torch.empty_like(made, dtype=torch.bool)


_define(
    "winners(Tensor indices, Tensor usable, Tensor? count, SymInt num_samples, "
    "Tensor(a!) counters) -> (Tensor, Tensor, Tensor)",
    find_winners,
    _winners_fake,
)


def winners(indices: Tensor, usable: Tensor, count: Tensor | None, state: State) -> Winners:
    """`Backend.winners`; if something observes the op, shapes do not depend on the data."""
    if not _watched(indices):
        return resolve(state.scores.device).winners(indices, usable, count, state)
    num_samples = state.scores.shape[0]
    return Winners(*torch.ops.emp_fast.winners(indices, usable, count, num_samples, state.counters))


def _count_rows(counted: Tensor, rows: int) -> None:
    counted[0] += rows
    counted[1].clamp_(min=rows)


_define("count_rows(Tensor(a!) counted, SymInt rows) -> ()", _count_rows, lambda *_: None)


# ---- packed samples -----------------------------------------------------------------------------


def _segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    rows = values.shape[1]
    if offsets.device.type == "cpu":
        check_offsets(offsets, rows)
    else:  # the host cannot check them without waiting, but they must not leave the rows
        offsets = offsets.clamp(0, rows).cummax(0).values
    # Each segment has its own sum, instead of differences of a running sum, so that a NaN in one
    # sample does not reach another. In float64, because a segment is summed sequentially.
    columns = values.T.double().contiguous()
    summed = torch.segment_reduce(columns, "sum", offsets=offsets, axis=0, unsafe=True)
    return summed.T.to(values.dtype).clone(memory_format=torch.contiguous_format)


_define(
    "segment_sum(Tensor values, Tensor offsets) -> Tensor",
    _segment_sum,
    lambda values, offsets: values.new_empty((values.shape[0], offsets.shape[0] - 1)),
)


class SegmentSum(torch.autograd.Function):
    """Sums over the rows ``offsets[s]:offsets[s + 1]`` of each of S samples, in float64.

    The sums [S] of ``loss`` [R] carry the gradient; the sums [V, S] of ``others`` [V, R] do not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, others: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.cat([loss[None], others]).double()
        summed = torch.ops.emp_fast.segment_sum(values, offsets)
        return summed[0].clone(), summed[1:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        loss, _, offsets = inputs
        ctx.save_for_backward(offsets)
        ctx.rows, ctx.dtype = loss.shape[0], loss.dtype
        _only_loss_carries_gradient(ctx, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        (offsets,) = ctx.saved_tensors
        row = torch.arange(ctx.rows, device=grad.device)
        owner = torch.searchsorted(offsets, row, right=True) - 1
        # Rows before the first offset (owner -1) or after the last one were not summed: they get
        # the zero at the end. On a GPU the host has not checked the offsets.
        of_all = torch.cat([grad, grad.new_zeros(1)])
        return of_all[owner].to(ctx.dtype), None, None


# ---- selection ----------------------------------------------------------------------------------


def _topk_indices(scores: Tensor, k: int) -> Tensor:
    return resolve(scores.device, scores.dtype).topk_indices(scores, k)


topk_indices = _define(
    "topk_indices(Tensor scores, SymInt k) -> Tensor",
    _topk_indices,
    lambda scores, k: scores.new_empty(k, dtype=torch.int64),
)


def _grouped_topk_indices(scores: Tensor, groups: Tensor, group_k: Tensor, k: int) -> Tensor:
    check_quotas(groups, group_k, k)
    return resolve(scores.device, scores.dtype).grouped_topk_indices(scores, groups, group_k)


grouped_topk_indices = _define(
    "grouped_topk_indices(Tensor scores, Tensor groups, Tensor group_k, SymInt k) -> Tensor",
    _grouped_topk_indices,
    lambda scores, groups, group_k, k: scores.new_empty(k, dtype=torch.int64),
)


# ---- random bits --------------------------------------------------------------------------------


def _philox(n: int, seed: int, epoch: int, stream: int, start: int, device: torch.device) -> Tensor:
    return resolve(device).philox(n, seed, epoch, stream, start, device)


_define(
    "philox(SymInt n, int seed, int epoch, int stream, SymInt start, Device device) -> Tensor",
    _philox,
    lambda n, seed, epoch, stream, start, device: torch.empty(n, dtype=torch.int32, device=device),
)


# ---- scoring without the logits -----------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """Row scores of ``hidden @ classifier.T + bias``, computed one block of rows at a time.

    The backward pass recomputes each block: this needs the memory of only one block, at the cost of
    one more product.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor,  # [R, E]
        classifier: Tensor,  # [C, E]
        bias: Tensor | None,  # [C]
        target: Tensor,
        weight: Tensor | None,
        chunk: int,  # rows of a block
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = [
            cross_entropy(_logits(h, classifier, bias), t, weight, *options)
            for h, t in _blocks(chunk, hidden, target)
        ]
        loss, rows, correct, count = (_joined(part, -1) for part in zip(*parts, strict=True))
        return loss, rows, correct, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, classifier, bias, target, weight, ctx.chunk, *ctx.options = inputs
        _, rows, correct, count = output
        ctx.save_for_backward(hidden, classifier, bias, target, weight, rows)
        _only_loss_carries_gradient(ctx, rows, correct, count)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        hidden, classifier, bias = ctx.saved_tensors[:3]
        # The forward pass has made all casts, but backward() may itself run under autocast.
        with torch.no_grad(), without_autocast(hidden.device):
            grads = LinearCrossEntropy._gradients(ctx, grad_loss.detach())
        inputs = (grad_loss, hidden, classifier, bias)
        guarded = [None if grad is None else _once(grad, *inputs) for grad in grads]
        return (*guarded, *(None,) * 6)

    @staticmethod
    def _gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, classifier, bias, target, weight, rows = ctx.saved_tensors
        want_hidden, want_classifier, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = []
        # Sums over many blocks are carried in at least float32, whatever the parameters' dtype.
        wide = torch.promote_types(classifier.dtype, torch.float32)
        grad_classifier: Tensor | None = None
        grad_bias: Tensor | None = None
        for h, t, r, g in _blocks(ctx.chunk, hidden, target, rows.T, grad_loss):
            grad_logits = cross_entropy_backward(
                g.contiguous(),
                _logits(h, classifier, bias),
                t,
                weight,
                r.T.contiguous(),
                *ctx.options,
            )
            if want_hidden:
                grad_hidden.append(grad_logits @ classifier)
            if want_classifier:
                grad_classifier = _added(grad_classifier, grad_logits.T @ h, wide)
            if want_bias:
                grad_bias = _added(grad_bias, grad_logits.sum(0, dtype=wide), wide)
        return (
            _joined(grad_hidden, 0) if want_hidden else None,
            None if grad_classifier is None else grad_classifier.to(classifier.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )


def _added(total: Tensor | None, part: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds a part to the sum, in ``dtype``; the first part needs no zeros to be written before."""
    return part.to(dtype) if total is None else total.add_(part)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenates the rows of all blocks along axis ``dim``; a single block is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _logits(hidden: Tensor, classifier: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, classifier, bias)


def _blocks(chunk: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Splits all tensors along their first axis; one empty block if there are no rows."""
    return list(zip(*(tensor.split(chunk) for tensor in tensors), strict=True))
