"""Private parts of torch that run in every step.

The public equivalents cost about a microsecond each, of about ten that a small batch takes. If a
torch version lacks one, a fallback gives the same answer, or a conservative one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = [
    "apply_past_transforms",
    "count_dispatch_modes",
    "current_device",
    "current_stream",
    "forward_level",
    "in_backward",
    "innermost_transform",
    "is_batched_gradient",
    "is_profiled",
    "tracing_state",
    "unwrap_if_dead",
]


def _torch_or(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """What torch has under ``name``, else ``otherwise``."""
    try:
        found: Callable[..., Any] = operator.attrgetter(name)(torch)
    except AttributeError:
        return otherwise
    return found


def _assume_active() -> bool:
    """The fallback if torch cannot tell: assume it is active, which is always safe."""
    return True


#: The index of the current CUDA device. It does not start CUDA: callers already hold a CUDA tensor.
current_device = _torch_or("_C._cuda_getDevice", torch.cuda.current_device)
#: The handle of the current stream of the CUDA device of that index.
current_stream = _torch_or(
    "_C._cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)
#: True where torch.jit traces.
tracing_state = _torch_or("_C._get_tracing_state", _torch_or("jit.is_tracing", _assume_active))
#: Above 0 within a TorchDispatchMode.
count_dispatch_modes = _torch_or("_C._len_torch_dispatch_stack", _assume_active)
#: True within a transform of torch.func.
innermost_transform = _torch_or("_C._functorch.peek_interpreter_stack", _assume_active)
#: True of the gradients that autograd passes backwards under ``is_grads_batched``.
is_batched_gradient = _torch_or("_C._functorch.is_legacy_batchedtensor", lambda _: True)
#: The tensor inside one that a transform of torch.func has left behind, else the tensor itself.
unwrap_if_dead = _torch_or("_C._functorch.unwrap_if_dead", lambda tensor: tensor)
#: Which backward pass this thread is executing; negative if none. Without it, none is assumed.
_backward_pass = _torch_or("_C._current_graph_task_id", lambda: -1)
#: True while a profiler records.
is_profiled = _torch_or("_C._autograd._profiler_enabled", _assume_active)


def in_backward() -> bool:
    """Whether autograd called the code that runs, such as a checkpointed function once more."""
    return bool(_backward_pass() >= 0)


def forward_level() -> int:
    """At least 0 where forward-mode differentiation may be on."""
    level: int = getattr(forward_ad, "_current_level", 0)
    return level


def apply_past_transforms(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its search for a transform, which takes as long as the rest."""
    plain = getattr(super(torch.autograd.Function, function), "apply", None)
    return function.apply if plain is None else plain
