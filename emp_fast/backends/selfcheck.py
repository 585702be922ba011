"""Checks a kernel backend against the reference on a tiny case, once per process and device."""

from __future__ import annotations

import torch
from torch import Tensor

from emp_fast.backends.base import SCORE_FIELDS, Backend, LossOptions, Recurrence, State
from emp_fast.backends.reference import ReferenceBackend

#: Of five rows of logits: class ids, one of them ignored; of two rows of sample 4 the last counts.
_TARGET = (3, 36, -100, 0, 17)
_INDICES = (4, 1, 2, 3, 4)
_OPTIONS = LossOptions(label_smoothing=0.1)
_RECURRENCE = Recurrence("ema", "entropy", 0.5, "loss", direct_scale=1.0, memory_scale=0.3)


def self_check(backend: Backend, device: torch.device) -> str | None:
    """Runs every operation of ``backend`` that the package calls on a few samples.

    Returns:
        None if all agree with the reference, otherwise what differed or failed; the backend is then
        refused.

    Raises:
        torch.OutOfMemoryError: the device has not enough memory left for the check.
    """
    reference = ReferenceBackend()
    try:
        steps = [_mean_step] if backend.fuses_step else []
        operations = (
            *(_cross_entropy, _scores, *steps, _update_state, _find_winners),
            *(_topk, _grouped_topk, _philox),
        )
        for operation in operations:
            got = operation(backend, device)
            wanted = operation(reference, device)
            for name in wanted:
                if not _agree(got[name], wanted[name]):
                    return f"{operation.__name__[1:]} output {name} differs"
    except torch.OutOfMemoryError:
        raise  # says nothing about the backend; at its next use there may be memory
    except Exception as error:  # a driver, a compiler or a launch may raise anything
        return f"{type(error).__name__}: {error}"
    return None


def _agree(got: Tensor, wanted: Tensor) -> bool:
    if got.shape != wanted.shape:
        return False
    if not wanted.is_floating_point():
        return torch.equal(got, wanted)
    return torch.allclose(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def _logits(device: torch.device) -> Tensor:
    # 5 rows of 37 classes: neither is a multiple of any vector width. The allocation is, because
    # kernels read whole vectors, and compute-sanitizer reports reads beyond the requested size.
    values = (torch.arange(188, dtype=torch.float32, device=device) * 0.7).sin() * 4
    return values[:185].view(5, 37)


def _cross_entropy(backend: Backend, device: torch.device) -> dict[str, Tensor]:
    logits = _logits(device)
    target = torch.tensor(_TARGET, device=device)
    scores = backend.cross_entropy(logits, target, None, _OPTIONS)
    grad_loss = torch.linspace(0.5, 1.5, 5, dtype=torch.float32, device=device)
    grad = backend.cross_entropy_backward(grad_loss, logits, target, None, scores.fields, _OPTIONS)
    return {**scores._asdict(), "fields": scores.fields[: len(SCORE_FIELDS)], "gradient": grad}


def _scores(backend: Backend, device: torch.device) -> dict[str, Tensor]:
    target = torch.tensor(_TARGET, device=device)
    scores = backend.scores(_logits(device), target, None, _OPTIONS)
    return {str(position): field for position, field in enumerate(scores)}


def _mean_step(backend: Backend, device: torch.device) -> dict[str, Tensor]:
    logits, state = _logits(device), _state(device)
    target = torch.tensor(_TARGET, device=device)
    row_scale = torch.linspace(0.5, 1.5, 5, dtype=torch.float32, device=device)
    indices = torch.tensor(_INDICES, device=device)
    step = logits, target, None, _OPTIONS, row_scale, indices, state
    mean, grad, factor = backend.mean_step(*step, _RECURRENCE)
    backend.scale_(grad, torch.full_like(mean, -3.0), factor)
    return {"mean": mean, "gradient": grad, **_tensors(state)}


def _update_state(backend: Backend, device: torch.device) -> dict[str, Tensor]:
    state = _state(device)
    signal = torch.tensor([0.5, 1.5, torch.nan, 2.5, 3.5], dtype=torch.float32, device=device)
    direct = signal.nan_to_num(1.0) * 2
    count = torch.tensor([1, 1, 1, 0, 1], dtype=torch.int32, device=device)
    indices = torch.tensor(_INDICES, device=device)
    for _ in range(2):
        backend.update_state(indices, signal, direct, count, state, _RECURRENCE)
    return _tensors(state)


def _find_winners(backend: Backend, device: torch.device) -> dict[str, Tensor]:
    """What is written by the winners: the rows that they repeat or leave out are the backend's."""
    state, written = _state(device), torch.zeros(6, dtype=torch.float32, device=device)
    indices = torch.tensor(_INDICES, device=device)
    usable = torch.tensor([True, True, False, True, True], device=device)
    count = torch.tensor([1, 1, 1, 0, 1], dtype=torch.int32, device=device)
    chosen = backend.find_winners(indices, usable, count, state)
    rows = torch.arange(1, 6, dtype=torch.float32, device=device)[chosen.rows]
    chosen.write(written, rows, written[chosen.indices])
    return {"written": written, "counters": state.counters}


def _state(device: torch.device) -> State:
    return State(
        scores=torch.full((6,), torch.inf, dtype=torch.float32, device=device),
        memory=torch.zeros(6, dtype=torch.float32, device=device),
        visits=torch.zeros(6, dtype=torch.int32, device=device),
        variance=None,
        claims=torch.zeros(6, dtype=torch.int32, device=device),
        counters=torch.zeros(2, dtype=torch.int64, device=device),
    )


def _tensors(state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state._asdict().items() if tensor is not None}


def _to_select_from(device: torch.device) -> Tensor:
    values = [0.5, -0.0, torch.nan, 0.0, torch.inf, -1.0, 0.5, -torch.inf, 0.5]
    values += [0.0, 0.0, 0.0]  # not selected from: they fill the last vector, as in `_logits`
    return torch.tensor(values, dtype=torch.float32, device=device)[:9]


def _topk(backend: Backend, device: torch.device) -> dict[str, Tensor]:
    few = {f"k={k}": backend.topk_indices(_to_select_from(device), k) for k in (0, 2, 5, 9)}
    many = _to_select_from(device).repeat(2000)  # for which CUDA has other kernels
    return {**few, "k=7000 of 18000": backend.topk_indices(many, 7000)}


def _grouped_topk(backend: Backend, device: torch.device) -> dict[str, Tensor]:
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2], device=device)
    quotas = torch.tensor([2, 1, 2], device="cpu")
    return {"indices": backend.grouped_topk_indices(_to_select_from(device), groups, quotas)}


def _philox(backend: Backend, device: torch.device) -> dict[str, Tensor]:
    return {"words": backend.philox(7, 2**40 + 5, 3, 1, 2**32 - 3, device)}
