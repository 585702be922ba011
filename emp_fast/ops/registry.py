"""Registers the ops with torch.library, and decides which calls may bypass the dispatcher.

A call does unless something observes it (`must_dispatch`): scoring a small batch takes a few
microseconds, and the dispatcher would double that. ``Library.define`` costs a third of
``torch.library.custom_op`` per call, which matters in training steps on small batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from emp_fast._torch_internals import (
    count_dispatch_modes,
    innermost_transform,
    is_batched_gradient,
    is_profiled,
    tracing_state,
)

_library = torch.library.Library("emp_fast", "DEF")
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def define(
    schema: str,
    kernel: _Kernel,
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
) -> _Kernel:
    """Registers an op; returns a function that calls it like ``kernel``.

    The function takes positional arguments, of which the first must be a tensor. A kernel that
    takes or returns named tuples, which no schema has, is called by a function of its own, so that
    they are taken apart only where something watches. Without ``vmap``, `torch.vmap` calls the op
    once per example.
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
        return (op if must_dispatch(tensor) else kernel)(tensor, *arguments)

    return cast(_Kernel, call)


def per_example_arguments(
    batch: int, dims: tuple[int | None, ...], *arguments: Any
) -> list[list[Any]]:
    """The arguments of an op for each example of `torch.vmap`, for vmap rules."""
    return [
        [x if d is None else x.select(d, i) for x, d in zip(arguments, dims, strict=True)]
        for i in range(batch)
    ]


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


def must_dispatch(tensor: Tensor) -> bool:
    """Whether an op on ``tensor`` must not bypass the dispatcher.

    That is so where something watches: a tracer (`is_traced`) or a profiler.
    """
    return is_traced(tensor) or bool(is_profiled())
