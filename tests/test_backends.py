"""Which backend runs: the order, the overrides, refusals and their reasons; what importing is."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from serving import CPU, require
from torch import Tensor

import emp_fast
from emp_fast import backends
from emp_fast.backends import BackendError, backend_status, load, resolve, use_backend
from emp_fast.backends.base import LossOptions, MeanStep, Recurrence, RowScores, State
from emp_fast.backends.reference import ReferenceBackend
from emp_fast.backends.selfcheck import self_check
from emp_fast.backends.winners import Winners
from emp_fast.functional import cross_entropy, topk_indices


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The choice of a new process: nothing loaded, checked or chosen yet; undone afterwards."""
    monkeypatch.delenv("EMP_FAST_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_explicit", None)
    for name in ("_load", "_status", "_choose"):
        remembers = getattr(backends, name)
        monkeypatch.setattr(backends, name, functools.cache(remembers.__wrapped__))
    return monkeypatch


class Fake(ReferenceBackend):
    """Serves the CPU rightly; the tests spoil one operation of it."""

    name = "cpu"


def install(monkeypatch: pytest.MonkeyPatch, fake: type[ReferenceBackend]) -> None:
    """Makes ``fake`` the C++ backend."""
    module = type(sys)("fake_backend")
    module.Fake = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_backend", module)
    monkeypatch.setitem(backends._CLASSES, "cpu", ("fake_backend", "Fake"))


# ---- the choice ---------------------------------------------------------------------------------


def test_the_cpu_is_served_by_native_code_first(fresh: pytest.MonkeyPatch) -> None:
    require("cpu")
    assert resolve(CPU).name == "cpu"
    assert resolve(CPU, torch.bfloat16).name == "cpu"


@pytest.mark.parametrize("chosen", ["auto", "cpu", "reference"])
def test_float64_is_the_reference_s_whatever_was_chosen(
    chosen: str, fresh: pytest.MonkeyPatch
) -> None:
    with use_backend(chosen):
        assert resolve(CPU, torch.float64).name == "reference"


def test_a_device_that_nothing_is_written_for_gets_the_reference(
    fresh: pytest.MonkeyPatch,
) -> None:
    assert resolve(torch.device("meta")).name == "reference"


def test_the_order_on_a_gpu() -> None:
    assert backends._AUTOMATIC["cuda"] == ("cuda", "triton", "reference")


def test_the_environment_chooses(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("EMP_FAST_BACKEND", "reference")
    assert resolve(CPU).name == "reference"
    fresh.setenv("EMP_FAST_BACKEND", "auto")
    assert resolve(CPU).name in ("cpu", "reference")
    fresh.setenv("EMP_FAST_BACKEND", "")
    assert resolve(CPU).name in ("cpu", "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unknown_name_in_the_environment_is_said(
    dtype: torch.dtype, fresh: pytest.MonkeyPatch
) -> None:
    fresh.setenv("EMP_FAST_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"EMP_FAST_BACKEND must be one of .*got 'cudnn'"):
        topk_indices(torch.ones(3, dtype=dtype), 1)


def test_use_backend_goes_before_the_environment(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("EMP_FAST_BACKEND", "cuda")
    with use_backend("reference"):
        assert resolve(CPU).name == "reference"
    with pytest.raises(BackendError, match="cuda"):
        resolve(CPU)


def test_use_backend_nests_and_survives_exceptions(fresh: pytest.MonkeyPatch) -> None:
    install(fresh, Fake)
    with use_backend("reference"):
        with use_backend("cpu"):
            assert resolve(CPU).name == "cpu"
            with use_backend("auto"):
                assert resolve(CPU).name == "cpu"
        assert resolve(CPU).name == "reference"
        with pytest.raises(RuntimeError, match="inside"), use_backend("cpu"):
            raise RuntimeError("inside")
        assert resolve(CPU).name == "reference"
    assert backends._explicit is None


@pytest.mark.parametrize("name", ["cudnn", "", "CPU", "Reference"])
def test_use_backend_refuses_an_unknown_name(name: str) -> None:
    before = backends._explicit
    with pytest.raises(ValueError, match=f"name must be one of .*got '{name}'"), use_backend(name):
        pass
    assert backends._explicit == before


def test_use_backend_reaches_other_threads() -> None:
    """Autograd runs the backward pass of GPU tensors in threads of its own."""
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(resolve(CPU).name))
        thread.start()
        thread.join()
    assert seen == ["reference"]


# ---- refusals -----------------------------------------------------------------------------------


def test_an_explicit_backend_raises_with_the_reason(fresh: pytest.MonkeyPatch) -> None:
    with use_backend("cuda"):
        for call in (
            lambda: cross_entropy(torch.ones(2, 3), torch.tensor([0, 1])),
            lambda: topk_indices(torch.ones(3), 1),
        ):
            with pytest.raises(BackendError, match=r"the cuda backend cannot serve cpu: .+"):
                call()


@pytest.mark.parametrize("rate", [0.0, 0.5], ids=["full epochs", "pruned"])
def test_a_run_begins_on_the_host_whatever_serves_its_batches(
    rate: float, fresh: pytest.MonkeyPatch
) -> None:
    """EMP_FAST_BACKEND=cuda is about batches on a GPU: until the first one the state is here."""

    def plans(device: str | None) -> list[list[int]]:
        pruner = emp_fast.Pruner(12, rate, policy=emp_fast.policies.BelowMean(0.5), device=device)
        return [list(pruner.sampler) for _ in range(2)]

    chosen = plans(None)
    with use_backend("cuda"):
        assert plans(None) == chosen
        with pytest.raises(BackendError, match="the cuda backend cannot serve cpu"):
            resolve(CPU)
    fresh.setenv("EMP_FAST_BACKEND", "cuda")
    assert plans(None) == chosen
    if rate > 0:
        with pytest.raises(BackendError, match="the cuda backend cannot serve cpu"):
            plans("cpu")
    fresh.setenv("EMP_FAST_BACKEND", "cada")
    with pytest.raises(ValueError, match="cada"):
        plans(None)


def test_only_a_backend_that_cannot_serve_the_host_is_replaced_there(
    fresh: pytest.MonkeyPatch,
) -> None:
    with use_backend("reference"), backends.any_backend_on_the_host():
        assert resolve(CPU).name == "reference"
    with use_backend("cuda"):
        with backends.any_backend_on_the_host():
            assert resolve(CPU).name in ("cpu", "reference")
            with pytest.raises(BackendError, match="the cuda backend cannot serve meta"):
                resolve(torch.device("meta"))
        with pytest.raises(BackendError, match="the cuda backend cannot serve cpu"):
            resolve(CPU)


def test_a_backend_that_cannot_be_imported_says_why(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(backends._CLASSES, "cpu", ("emp_fast.backends.no_such_module", "Backend"))
    with pytest.raises(BackendError, match=r"cpu backend cannot be loaded: .*no_such_module"):
        load("cpu")
    with use_backend("cpu"), pytest.raises(BackendError, match="no_such_module"):
        resolve(CPU)
    with pytest.warns(emp_fast.EmpFastWarning, match=r"reference backend on cpu \(cpu: .*no_such"):
        assert resolve(CPU).name == "reference"


def test_falling_back_warns_once(fresh: pytest.MonkeyPatch) -> None:
    class Unwilling(Fake):
        def why_not(self, device: torch.device) -> str | None:
            return "it is Sunday"

    install(fresh, Unwilling)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            topk_indices(torch.ones(3), 1)
            cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]))
    assert [str(w.message) for w in caught if w.category is emp_fast.EmpFastWarning] == [
        "emp_fast uses its reference backend on cpu (cpu: it is Sunday)"
    ]
    assert {w.filename for w in caught if w.category is emp_fast.EmpFastWarning} == {__file__}
    with use_backend("cpu"), pytest.raises(BackendError, match="it is Sunday"):
        resolve(CPU)
    reasons = {status.name: status for status in backend_status(CPU)}
    assert reasons["cpu"].reason == "it is Sunday"
    assert not reasons["cpu"].available
    assert reasons["reference"] == ("reference", True, None, None)


# ---- the self-check -----------------------------------------------------------------------------


class WrongLoss(Fake):
    def cross_entropy(self, *arguments: Any) -> RowScores:
        scores = super().cross_entropy(*arguments)
        return scores._replace(loss=scores.loss * 1.01)


class WrongScores(Fake):
    def cross_entropy(self, *arguments: Any) -> RowScores:
        scores = super().cross_entropy(*arguments)
        scores.fields[2, 1] += 0.1  # one margin of one row
        return scores


class WrongCorrect(Fake):
    def cross_entropy(self, *arguments: Any) -> RowScores:
        scores = super().cross_entropy(*arguments)
        return scores._replace(correct=~scores.correct)


class WrongCount(Fake):
    def cross_entropy(self, *arguments: Any) -> RowScores:
        scores = super().cross_entropy(*arguments)
        return scores._replace(count=scores.count + 1)


class WrongGradient(Fake):
    def cross_entropy_backward(self, grad_loss: Tensor, *arguments: Any) -> Tensor:
        return super().cross_entropy_backward(torch.ones_like(grad_loss), *arguments)


class WrongPlainScores(Fake):
    def scores(self, *arguments: Any) -> tuple[Tensor, ...]:
        loss, *others = super().scores(*arguments)
        return loss.flip(0), *others


class FirstRow(Fake):
    def find_winners(self, indices: Tensor, usable: Tensor, count: Any, state: State) -> Winners:
        flipped = (None if x is None else x.flip(0) for x in (indices, usable, count))
        chosen = super().find_winners(*flipped, state)
        return chosen._replace(rows=indices.shape[0] - 1 - chosen.rows)


class WrongMean(Fake):
    fuses_step = True

    def mean_step(self, *arguments: Any) -> MeanStep:
        made = super().mean_step(*arguments)
        return made._replace(mean=made.mean * 4 / 5)  # as if the ignored row counted


class WrongFactor(Fake):
    fuses_step = True

    def mean_step(self, *arguments: Any) -> MeanStep:
        return super().mean_step(*arguments)._replace(factor=None)


class OneFactor(Fake):
    fuses_step = True

    def scale_(self, grad: Tensor, grad_mean: Tensor, factor: Tensor | None) -> None:
        super().scale_(grad, grad_mean, None)


class FirstWins(Fake):
    def update_state(
        self, indices: Tensor, signal: Tensor, direct: Any, count: Any, *rest: Any
    ) -> None:
        flipped = (None if x is None else x.flip(0) for x in (indices, signal, direct, count))
        super().update_state(*flipped, *rest)


class LastTie(Fake):
    def topk_indices(self, scores: Tensor, k: int) -> Tensor:
        kept = super().topk_indices(scores.flip(0), k)
        return (scores.shape[0] - 1 - kept).flip(0)


class WrongGroups(Fake):
    def grouped_topk_indices(self, scores: Tensor, groups: Tensor, group_k: Tensor) -> Tensor:
        return super().topk_indices(scores, int(group_k.sum()))


class WrongBits(Fake):
    def philox(self, n: int, seed: int, epoch: int, *rest: Any) -> Tensor:
        return super().philox(n, seed & 0xFFFFFFFF, epoch, *rest)  # the high word is lost


class Short(Fake):
    def topk_indices(self, scores: Tensor, k: int) -> Tensor:
        return super().topk_indices(scores, k)[:1]


class Crash(Fake):
    def philox(self, *arguments: Any) -> Tensor:
        raise RuntimeError("illegal memory access")


LIARS = {
    WrongLoss: "cross_entropy output loss differs",
    WrongScores: "cross_entropy output fields differs",
    WrongCorrect: "cross_entropy output correct differs",
    WrongCount: "cross_entropy output count differs",
    WrongGradient: "cross_entropy output gradient differs",
    WrongPlainScores: "scores output 0 differs",
    FirstRow: "find_winners output written differs",
    WrongMean: "mean_step output mean differs",
    WrongFactor: "mean_step output gradient differs",
    OneFactor: "mean_step output gradient differs",
    FirstWins: "update_state output scores differs",
    LastTie: "topk output k=2 differs",
    WrongGroups: "grouped_topk output indices differs",
    WrongBits: "philox output words differs",
    Short: "topk output k=2 differs",
    Crash: "RuntimeError: illegal memory access",
}


@pytest.mark.parametrize("liar", LIARS, ids=lambda liar: liar.__name__)
def test_a_backend_that_lies_is_refused_and_it_is_said_where(
    liar: type[Fake], fresh: pytest.MonkeyPatch
) -> None:
    install(fresh, liar)
    with use_backend("cpu"), pytest.raises(BackendError) as raised:
        resolve(CPU)
    assert "the cpu backend cannot serve cpu: self-check failed: " in str(raised.value)
    assert LIARS[liar] in str(raised.value)
    with pytest.warns(emp_fast.EmpFastWarning, match="self-check failed"):
        assert resolve(CPU).name == "reference"


def test_a_first_use_that_would_be_captured_is_refused_and_not_remembered(
    fresh: pytest.MonkeyPatch,
) -> None:
    class OnCuda(Fake):
        def why_not(self, device: torch.device) -> str | None:
            return None

    install(fresh, OnCuda)
    fresh.setattr("emp_fast.backends.selfcheck.self_check", lambda *_: None)
    device = torch.device("cuda", 0)
    with use_backend("cpu"):
        fresh.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(BackendError, match="take one step before"):
            resolve(device)
        fresh.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert isinstance(resolve(device), OnCuda)


def test_a_device_without_memory_says_nothing_about_a_backend(fresh: pytest.MonkeyPatch) -> None:
    full = [True]

    class Hungry(Fake):
        def philox(self, *arguments: Any) -> Tensor:
            if full.pop():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().philox(*arguments)

    install(fresh, Hungry)
    with pytest.raises(torch.OutOfMemoryError):
        resolve(CPU)
    full.append(False)
    assert isinstance(resolve(CPU), Hungry)


def test_the_self_check_runs_once(fresh: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Counted(Fake):
        def philox(self, *arguments: Any) -> Tensor:
            calls.append("philox")
            return super().philox(*arguments)

    install(fresh, Counted)
    for _ in range(3):
        resolve(CPU)
        with use_backend("cpu"):
            resolve(CPU)
        backend_status(CPU)
    assert calls == ["philox"]


def test_the_backends_of_this_machine_pass(backend: str) -> None:
    if backend != "reference":
        assert self_check(load(backend), CPU) is None


def test_the_self_check_says_nothing_of_an_honest_backend() -> None:
    assert self_check(Fake(), CPU) is None


def test_the_composed_step_is_the_three_in_a_row(backend: str) -> None:
    def state() -> State:
        zeros = torch.zeros(4)
        ints = torch.zeros(4, dtype=torch.int32)
        counters = torch.zeros(2, dtype=torch.int64)
        return State(zeros, zeros.clone(), ints, None, ints.clone(), counters)

    logits, target = torch.linspace(-1, 1, 12).view(3, 4), torch.tensor([0, -100, 3])
    recurrence, options = Recurrence("ema", "entropy", 0.5, "loss", 1.0, 0.3), LossOptions()
    runs = load(backend)
    stepped, composed = state(), state()
    scores, grad = runs.cross_entropy_step(
        *(logits, target, None, options, None, 0.5, torch.tensor([2, 0, 1]), stepped, recurrence)
    )
    wanted = runs.cross_entropy(logits, target, None, options)
    runs.update_state(
        torch.tensor([2, 0, 1]), wanted.fields[0], wanted.loss, wanted.count, composed, recurrence
    )
    for a, b in zip((*scores, *stepped), (*wanted, *composed), strict=True):
        assert a is b is None or torch.equal(a, b)
    half = torch.full((3,), 0.5)
    back = runs.cross_entropy_backward(half, logits, target, None, wanted.fields, options)
    assert torch.equal(grad, back)


# ---- importing ----------------------------------------------------------------------------------


def in_a_new_process(script: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:emp_fast", "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_importing_loads_nothing_native() -> None:
    loaded = in_a_new_process(
        "import sys, json, torch; before = set(sys.modules); import emp_fast;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert "emp_fast.functional" in loaded
    heavy = ("emp_fast._native", "emp_fast.kernels", "emp_fast.cli", "emp_fast.plots")
    others = ("triton", "matplotlib", "typer", "rich", "sklearn", "pyarrow", "torch._dynamo")
    assert [
        name
        for name in loaded
        for bad in (*heavy, *others)
        if name == bad or name.startswith(f"{bad}.")
    ] == []


def test_using_the_cpu_loads_no_gpu_code() -> None:
    require("cpu")
    loaded = in_a_new_process(
        "import sys, json, torch, emp_fast; emp_fast.functional.topk_indices(torch.ones(3), 1);"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert "emp_fast._native" in loaded
    assert "emp_fast.backends.triton" not in loaded
    assert "emp_fast.backends.cuda" not in loaded


def test_importing_loads_no_other_package_than_torch_does() -> None:
    """Of the command line's, the trainers' and the plots' none: they take seconds to import."""
    loaded = in_a_new_process(
        "import json, sys, numpy, torch; before = set(sys.modules); import emp_fast;"
        "packages = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(json.dumps(sorted(packages - set(sys.stdlib_module_names))))"
    )
    # The last is what torch.distributed.nn writes and imports.
    assert set(loaded) <= {"emp_fast", "numpy", "torch", "_remote_module_non_scriptable"}
    assert "emp_fast" in loaded
