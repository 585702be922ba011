"""Interleaved timing of all contenders of a case; only a passed check makes a speed valid.

One round times each contender once, in a new random order, so that a slow period of the machine
affects all of them alike. The clock times a burst of calls on rotating inputs, which together
exceed the caches if the inputs are large enough.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Arguments = tuple[Any, ...]

#: Rounds are repeated at least so often, whatever the time budget.
MIN_ROUNDS = 7
MAX_ROUNDS = 400
MAX_BURST = 256
MAX_FLUSHES = 256
MAX_ROTATIONS = 16
#: Seconds from which a call needs no warm-up besides the check.
_SLOW = 0.05


class CheckFailed(AssertionError):
    """A contender's result differs from the reference, so its speed is meaningless."""


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


class Bound(NamedTuple):
    """How far from the reference a result may be: |got - want| <= absolute + relative * |want|."""

    relative: float
    absolute: float


PEER_BOUND = Bound(1e-3, 1e-4)


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case."""

    name: str
    call: Callable[..., Any]
    #: Maps the result of `call` to the tensors that are compared with the reference.
    outputs: Callable[[Any], Mapping[str, Tensor]]
    bound: Bound = PEER_BOUND
    #: What it omits, or computes differently from the others.
    note: str = ""
    #: Entered around every burst, outside the timing.
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    #: Whether it is ours; a failed check then fails the test, instead of refusing the contender.
    ours: bool = False


class Sample(NamedTuple):
    """Seconds per call in one burst."""

    #: Wall time on the CPU; time of the kernels on a GPU.
    seconds: float
    #: On a GPU, the time until the call returned and until its result was ready. None on the CPU.
    host: float | None = None
    latency: float | None = None


class Clock(Protocol):
    """How one kind of device is timed."""

    def burst(self, call: Callable[..., Any], inputs: Sequence[Arguments]) -> Sample:
        """Calls once for every element of ``inputs``."""


class WallClock:
    """Wall time until all enqueued work has ended: for the CPU, and for whole steps anywhere."""

    def __init__(self, synchronize: Callable[[], object] = lambda: None) -> None:
        self._synchronize = synchronize

    def burst(self, call: Callable[..., Any], inputs: Sequence[Arguments]) -> Sample:
        """Calls once for every element of ``inputs``."""
        self._synchronize()
        start = time.perf_counter()
        for arguments in inputs:
            call(*arguments)
        self._synchronize()
        return Sample((time.perf_counter() - start) / len(inputs))


class CudaClock:
    """Kernel time from events after a flush of the L2 cache; host time and latency separately.

    The flush only reads, because written lines would be evicted during the timed call. It also
    keeps the device busy while the host launches, so that the events include no time in which the
    device waits for the host. The tests replace `torch.cuda`.
    """

    def __init__(self, flush: Tensor, cuda: Any = torch.cuda) -> None:
        self._flush, self._cuda = flush, cuda
        self._flush_seconds = self._time_flush()

    def _time_flush(self) -> float:
        repeats = 10
        self._flush.sum()
        self._cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            self._flush.sum()
        self._cuda.synchronize()
        return max((time.perf_counter() - start) / repeats, 1e-7)

    def burst(self, call: Callable[..., Any], inputs: Sequence[Arguments]) -> Sample:
        """Calls twice for each of ``inputs``: for the host's time, then for the kernels'."""
        hosts, latencies = [], []
        for arguments in inputs:
            self._cuda.synchronize()
            start = time.perf_counter()
            call(*arguments)
            returned = time.perf_counter()
            self._cuda.synchronize()
            hosts.append(returned - start)
            latencies.append(time.perf_counter() - start)
        host = statistics.median(hosts)
        # Much longer than the host takes, so that the device need not wait if the host pauses.
        flushes = 1 + math.ceil(4 * host / self._flush_seconds)
        pairs = []
        for arguments in inputs:
            for _ in range(min(flushes, MAX_FLUSHES)):
                self._flush.sum()
            begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call(*arguments)
            end.record()
            pairs.append((begin, end))
        self._cuda.synchronize()
        kernels = [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]
        return Sample(statistics.median(kernels), host, statistics.median(latencies))


def clock_of(device: torch.device) -> Clock:
    """The clock for single calls on ``device``."""
    if device.type == "cpu":
        return WallClock()
    return CudaClock(torch.ones(cache_bytes(device), device=device))  # four times the cache


def _whole(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class BenchmarkCase:
    """What is measured: the work, its inputs and the right result."""

    suite: str
    name: str
    inputs: Sequence[Arguments]
    expected: Callable[[Arguments], Mapping[str, Tensor]]
    #: Least traffic of the work in bytes: every input read once, every output written once.
    floor_bytes: int | None = None
    #: Narrows an output to the part that `expected` returns, if the whole would not fit.
    narrow: Callable[[Tensor], Tensor] = _whole
    facts: dict[str, Any] = field(default_factory=dict)


class Standing(NamedTuple):
    """The outcome for one contender of a case."""

    contender: Contender
    samples: list[Sample]
    refused: str | None  # why it has no samples


class Contest:
    """A case with its contenders: checks each, then times them round by round."""

    def __init__(
        self,
        case: BenchmarkCase,
        contenders: Sequence[Contender],
        clock: Clock,
        *,
        burst_seconds: float = 1e-3,
        seed: int = 0,
    ) -> None:
        """Contest of ``contenders``.

        Args:
            case: the work.
            contenders: the ways to do it.
            clock: how to time it.
            burst_seconds: approximate length of a burst, which makes timer overhead negligible.
            seed: of the order in the rounds.
        """
        self.case = case
        self.standings = [Standing(contender, [], None) for contender in contenders]
        self._clock, self._burst_seconds = clock, burst_seconds
        self._order = random.Random(seed)
        self._calls: dict[str, int] = {}
        self._turn: dict[str, int] = {contender.name: 0 for contender in contenders}
        self.round_seconds = 0.0

    def check(self) -> None:
        """Compares all contenders with the reference; refuses those that differ or cannot run.

        Raises:
            CheckFailed: one of ours differs.
        """
        arguments = self.case.inputs[0]
        expected = self.case.expected(arguments)
        for place, standing in enumerate(self.standings):
            contender = standing.contender
            try:
                with contender.context():
                    self._compare(contender, contender.call(*arguments), expected)
            except CheckFailed as error:
                if contender.ours:
                    raise
                self.standings[place] = standing._replace(refused=str(error))
            except Unavailable as error:
                self.standings[place] = standing._replace(refused=str(error))
            except Exception as error:
                if contender.ours:
                    raise
                first_line = (str(error).strip().splitlines() or [""])[0]
                reason = f"{type(error).__name__}: {first_line}"
                self.standings[place] = standing._replace(refused=reason)

    def _compare(self, contender: Contender, result: Any, expected: Mapping[str, Tensor]) -> None:
        for name, tensor in contender.outputs(result).items():
            got, want = self.case.narrow(tensor.detach()).double(), expected[name].double()
            where = f"{contender.name} differs from the reference in {name} of "
            where += f"{self.case.suite} {self.case.name}"
            if got.shape != want.shape:
                raise CheckFailed(f"{where}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
            bound = contender.bound
            relative = max(bound.relative, _precision(tensor.dtype))
            if not torch.allclose(got, want, rtol=relative, atol=bound.absolute, equal_nan=True):
                # Of infinities and NaN that agree, the difference is NaN.
                agree = torch.isclose(got, want, rtol=0.0, atol=0.0, equal_nan=True)
                worst = float((got - want)[~agree].abs().nan_to_num(math.inf).max())
                raise CheckFailed(f"{where}: by up to {worst:.3g}")

    def calibrate(self) -> None:
        """Warms up every contender and finds how many calls make a burst."""
        for standing in self._running():
            contender = standing.contender
            with contender.context():
                single = self._timed(contender, calls=1)
                if single < _SLOW:  # the check alone does not warm up a quick call
                    single = min(single, *(self._timed(contender, calls=1) for _ in range(3)))
                calls = min(MAX_BURST, max(1, math.ceil(self._burst_seconds / max(single, 1e-9))))
                self._calls[contender.name] = calls
                self.round_seconds += single if calls == 1 else self._timed(contender, calls)

    def _timed(self, contender: Contender, calls: int) -> float:
        """Seconds that a burst takes, including the clock's own work."""
        start = time.perf_counter()
        self._clock.burst(contender.call, self._next(contender, calls))
        return time.perf_counter() - start

    def round(self) -> None:
        """Times every contender once, in a new order."""
        running = self._running()
        self._order.shuffle(running)
        gc_was_on = gc.isenabled()
        gc.disable()
        try:
            for standing in running:
                contender = standing.contender
                inputs = self._next(contender, self._calls[contender.name])
                with contender.context():
                    standing.samples.append(self._clock.burst(contender.call, inputs))
        finally:
            if gc_was_on:
                gc.enable()

    def rounds(self, budget: float) -> int:
        """How many rounds fit in ``budget`` seconds, within the limits."""
        fitting = int(budget / max(self.round_seconds, 1e-9))
        return max(MIN_ROUNDS, min(MAX_ROUNDS, fitting))

    def _running(self) -> list[Standing]:
        return [standing for standing in self.standings if standing.refused is None]

    def _next(self, contender: Contender, calls: int) -> list[Arguments]:
        inputs = self.case.inputs
        start = self._turn[contender.name]
        self._turn[contender.name] = (start + calls) % len(inputs)
        return list(itertools.islice(itertools.cycle(inputs), start, start + calls))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the 20th and 80th percentiles."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "median", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": fifths[0], "median": statistics.median(values), "p80": fifths[3]}


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache of ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [path.read_text().strip() for path in sizes]
    return max((int(size[:-1]) * units[size[-1]] for size in found if size), default=32 * 2**20)


def copy_bandwidth(device: torch.device, nbytes: int) -> dict[str, float]:
    """Bytes per second of ``tensor.copy_``: ``nbytes`` read and ``nbytes`` written.

    The clock is the one that times kernels, because their traffic is compared with this.

    Returns:
        "median", "p20" and "p80", the percentiles.
    """
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    clock = clock_of(device)
    seconds = [clock.burst(target.copy_, [(source,)]).seconds for _ in range(13)]
    del seconds[:2]  # the first copies fault in the pages
    return percentiles([2 * source.nbytes / one for one in seconds])


def rotations(nbytes: int, cache: int) -> int:
    """How many inputs of ``nbytes`` to rotate over, so that together they exceed the cache."""
    return max(2, min(MAX_ROTATIONS, math.ceil(2 * cache / max(nbytes, 1))))


def _precision(dtype: torch.dtype) -> float:
    """Error of half precision, which rounds twice: the exponential's argument and the result."""
    if dtype in (torch.float16, torch.bfloat16):
        return 2 * torch.finfo(dtype).eps
    return 0.0
