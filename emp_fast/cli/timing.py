"""Times contenders in turn on one machine, so that its load affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

__all__ = ["interleaved_medians"]

_MIN_SAMPLE = 2e-3  # seconds; shorter samples would measure the clock and its overhead
_MIN_ROUNDS = 9


def interleaved_medians(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, float]:
    """Median seconds per call of each contender; every round times each of them once, in turn.

    Args:
        contenders: functions to time, by name.
        device: synchronised around a sample if it is a GPU.
        seconds: how long to measure all of them together, beyond the fewest rounds of a median.
    """
    calls = {name: _calls(run, device) for name, run in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    until = time.perf_counter() + seconds
    while len(next(iter(samples.values()))) < _MIN_ROUNDS or time.perf_counter() < until:
        for name, run in contenders.items():
            samples[name].append(_sample(run, calls[name], device))
    return {name: median(times) for name, times in samples.items()}


def _calls(run: Callable[[], object], device: torch.device) -> int:
    """How many calls make a sample long enough; also warms up."""
    run()
    calls = 1
    while (elapsed := _sample(run, calls, device) * calls) < _MIN_SAMPLE:
        calls = max(2 * calls, int(calls * _MIN_SAMPLE / max(elapsed, 1e-9)))
    return calls


def _sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean seconds per call over that many calls."""
    _synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronise(device)
    return (time.perf_counter() - started) / calls


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
