"""The benchmarks' machinery: who is timed when, what the gate lets through, what is reported."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
sys.path.insert(0, str(ROOT))  # the benchmarks stand beside the tests and are not installed

from benchmarks import committed, contenders, report, sweep  # noqa: E402
from benchmarks.accuracy import accuracy_block  # noqa: E402
from benchmarks.kernel_tables import Shown, floor_bytes, kernel_report  # noqa: E402
from benchmarks.markdown import markdown, readme_block, rewrite  # noqa: E402
from benchmarks.models import ResNet18  # noqa: E402
from benchmarks.peak_memory import PeakMemory  # noqa: E402
from benchmarks.result import SUITES, BadResult, load  # noqa: E402
from emp_fast import ScoreStore, use_backend  # noqa: E402
from emp_fast.backends.base import FLOAT_STATS  # noqa: E402
from emp_fast.cli.bench import bench as bench_command  # noqa: E402
from emp_fast.functional import cross_entropy  # noqa: E402
from emp_fast.rules import EMP  # noqa: E402
from emp_fast.testing import baselines  # noqa: E402
from emp_fast.testing.contest import (  # noqa: E402
    MIN_ROUNDS,
    BenchmarkCase,
    Bound,
    CheckFailed,
    Contender,
    Contest,
    CudaClock,
    Unavailable,
    WallClock,
    percentiles,
    rotations,
)


def outputs(result: Tensor) -> dict[str, Tensor]:
    return {"sum": result}


def adds(name: str, error: float = 0.0, **options: Any) -> Contender:
    return Contender(name, lambda a, b: a + b + error, outputs, **options)


def case(inputs: int = 3) -> BenchmarkCase:
    made = [(torch.full((4,), float(i)), torch.ones(4)) for i in range(inputs)]
    return BenchmarkCase(
        "adding", "four numbers", made, expected=lambda pair: {"sum": pair[0] + pair[1]}
    )


# ---- the contest ---------------------------------------------------------------------------------


def test_a_round_times_each_contender_once_in_changing_order() -> None:
    log: list[str] = []

    class Recorder:
        """A clock that says who ran, and takes no time."""

        def burst(self, call: Any, inputs: Any) -> Any:
            log.append(call(*inputs[0]))
            return WallClock().burst(lambda *_: None, inputs)

    names = ["a", "b", "c", "d"]
    contenders = [Contender(n, lambda *_, n=n: n, lambda _: {}) for n in names]
    contest = Contest(case(), contenders, Recorder())
    contest.check()
    contest.calibrate()
    log.clear()
    for _ in range(20):
        contest.round()
    orders = [tuple(log[start : start + 4]) for start in range(0, len(log), 4)]
    assert len(orders) == 20
    assert all(sorted(order) == names for order in orders)
    assert len(set(orders)) > 5
    assert [len(standing.samples) for standing in contest.standings] == [20] * 4


def test_every_burst_goes_on_where_the_last_one_ended() -> None:
    seen: list[float] = []
    contender = Contender("a", lambda a, b: seen.append(float(a[0])), lambda _: {})
    contest = Contest(case(inputs=3), [contender], WallClock(), burst_seconds=0.0)
    contest.calibrate()
    for _ in range(8):
        contest.round()
    assert seen == [float(turn % 3) for turn in range(len(seen))]


def test_a_burst_lasts_about_as_long_as_asked() -> None:
    calls = 0

    def call(*_: Any) -> None:
        nonlocal calls
        calls += 1
        torch.randn(1000)

    contest = Contest(case(), [Contender("a", call, lambda _: {})], WallClock(), burst_seconds=1.0)
    contest.calibrate()
    calls = 0
    contest.round()
    assert calls == 256, "the longest burst"


def test_a_peer_that_is_wrong_gets_no_speed() -> None:
    contest = Contest(case(), [adds("ours", ours=True), adds("peer", error=1e-2)], WallClock())
    contest.check()
    contest.calibrate()
    contest.round()
    ours, peer = contest.standings
    assert ours.refused is None
    assert len(ours.samples) == 1
    assert (
        peer.refused
        == "peer differs from the reference in sum of adding four numbers: by up to 0.01"
    )
    assert peer.samples == []


def test_a_wrong_result_of_ours_fails() -> None:
    contest = Contest(case(), [adds("ours", error=1e-2, ours=True)], WallClock())
    with pytest.raises(CheckFailed, match="ours differs from the reference in sum"):
        contest.check()


def test_a_difference_is_not_said_to_be_one_of_infinities_that_agree() -> None:
    values = {"sum": torch.tensor([torch.inf, 1.0, torch.nan])}
    work = BenchmarkCase("halving", "three numbers", [()], lambda _: values)
    ours = Contender("ours", lambda: values["sum"] / 2, lambda got: {"sum": got}, ours=True)
    with pytest.raises(CheckFailed, match=r"sum of halving three numbers: by up to 0\.5$"):
        Contest(work, [ours], WallClock()).check()


@pytest.mark.parametrize(
    "wrong", [torch.full((4,), torch.nan), torch.ones(3)], ids=["nan", "shape"]
)
def test_nan_and_another_shape_are_wrong(wrong: Tensor) -> None:
    contender = Contender("ours", lambda *_: wrong, outputs, ours=True)
    with pytest.raises(CheckFailed):
        Contest(case(), [contender], WallClock()).check()


def test_who_cannot_run_is_recorded_with_the_reason() -> None:
    def absent(*_: Tensor) -> Tensor:
        raise Unavailable("no such package")

    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("out of memory\nand a long trace")

    contenders = [Contender("absent", absent, outputs), Contender("broken", broken, outputs)]
    contest = Contest(case(), contenders, WallClock())
    contest.check()
    assert [standing.refused for standing in contest.standings] == [
        "no such package",
        "RuntimeError: out of memory",
    ]


def test_half_precision_is_held_to_its_own_digits() -> None:
    def rounded(error: float) -> Contender:
        bound = Bound(1e-5, 0.0)
        return Contender("half", lambda a, b: ((a + b) * (1 + error)).bfloat16(), outputs, bound)

    for error, fits in ((0.0, True), (0.01, True), (0.05, False)):
        contest = Contest(case(), [rounded(error)], WallClock())
        contest.check()
        assert (contest.standings[0].refused is None) == fits


def test_what_is_checked_can_be_narrowed() -> None:
    narrowed = case()
    narrowed.narrow = lambda tensor: tensor[::2]
    narrowed.expected = lambda pair: {"sum": (pair[0] + pair[1])[::2]}
    Contest(narrowed, [adds("ours", ours=True)], WallClock()).check()


def test_rounds_fit_the_budget() -> None:
    contest = Contest(case(), [adds("a")], WallClock())
    contest.round_seconds = 0.01
    assert contest.rounds(1.0) == 100
    assert contest.rounds(0.0) == MIN_ROUNDS


def test_percentiles() -> None:
    assert percentiles([5.0]) == {"p20": 5.0, "median": 5.0, "p80": 5.0}
    assert percentiles([float(i) for i in range(101)]) == {"p20": 20.0, "median": 50.0, "p80": 80.0}


def test_inputs_rotate_beyond_the_cache() -> None:
    assert rotations(nbytes=10**6, cache=4 * 10**6) == 8
    assert rotations(nbytes=10**9, cache=4 * 10**6) == 2
    assert rotations(nbytes=1, cache=4 * 10**6) == 16


def test_the_gpu_clock_times_kernels_alone_behind_a_flush() -> None:
    """On a device of pretence, whose time moves with what is enqueued on it."""

    class Device:
        now, flushes = 0.0, 0

        def synchronize(self) -> None: ...

        def Event(self, *, enable_timing: bool) -> Any:
            return Event()

    class Event:
        def record(self) -> None:
            self.at = device.now

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at)

    class Flush:
        def sum(self) -> None:
            device.now += 1.0
            device.flushes += 1

    def kernel() -> None:
        device.now += 3.0

    device = Device()
    clock = CudaClock(Flush(), cuda=device)  # type: ignore[arg-type]
    device.flushes = 0
    sample = clock.burst(kernel, [(), (), ()])
    assert sample.seconds == pytest.approx(3e-3)
    assert device.flushes >= 3
    assert sample.host is not None
    assert sample.latency is not None
    assert 0 < sample.host <= sample.latency


def test_peak_memory_is_that_of_the_call() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    mebibyte = 2**20
    with PeakMemory(CPU) as peak:
        held = torch.ones(64 * mebibyte // 4)
        del held
        kept = torch.ones(8 * mebibyte // 4)
    assert peak.nbytes is not None
    assert 60 * mebibyte < peak.nbytes < 80 * mebibyte
    assert kept.numel()


def test_the_network_is_resnet_18() -> None:
    network = ResNet18()
    # The published network has 11.69 million parameters with 1000 classes and a 7 x 7 stem.
    assert sum(p.numel() for p in network.parameters()) == 11_173_962
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_baselines_score_as_the_reference_does(peaked: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(9, 31, generator=generator)
    target = torch.randint(31, (9,), generator=generator)
    if peaked:
        logits.scatter_(1, target[:, None], 20.0)
    logits = logits.to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    with use_backend("reference"):
        wanted = cross_entropy(wide, target)
    (wanted_grad,) = torch.autograd.grad(wanted.loss.sum(), wide)
    for score in (baselines.loss_and_scores, baselines.loss_and_scores_to_compile):
        found = score(logits, target)
        for name, got in zip(FLOAT_STATS, found, strict=True):
            want = getattr(wanted, name).detach().float()
            torch.testing.assert_close(got.detach(), want, rtol=1e-4, atol=1e-5)
        (grad,) = torch.autograd.grad(found[0].sum(), logits)
        torch.testing.assert_close(
            grad.float(), wanted_grad.to(dtype).float(), rtol=1e-2, atol=1e-5
        )
        assert not any(score.requires_grad for score in found[1:])
    loss, entropy = baselines.loss_and_entropy(logits, target)
    for got, want in ((loss, wanted.loss), (entropy, wanted.entropy)):
        torch.testing.assert_close(got.detach(), want.detach().float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [EMP(), EMP(beta=0.5, decay=0.9)])
def test_the_baseline_updates_as_a_store_does(rule: EMP) -> None:
    generator = torch.Generator().manual_seed(0)
    store = ScoreStore(20, rule)
    scores, memory = torch.full((20,), torch.inf), torch.zeros(20)
    visits = torch.zeros(20, dtype=torch.int32)
    for _ in range(3):
        at = torch.randperm(20, generator=generator)[:7]
        loss, entropy = torch.rand(2, 7, generator=generator)
        with use_backend("reference"):
            store.update(at, {"loss": loss, "entropy": entropy})
        baselines.update_emp(at, loss, entropy, scores, memory, visits, rule.beta, rule.decay)
    torch.testing.assert_close(scores, store.scores)
    torch.testing.assert_close(memory, store.memory)
    assert torch.equal(visits, store.visits)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_command_and_the_suites_have_one_baseline(
    gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, seen = baselines.loss_and_scores, []

    def recorded(*arguments: Tensor) -> tuple[Tensor, ...]:
        seen.append(arguments)
        return right(*arguments)

    monkeypatch.setattr(baselines, "loss_and_scores", recorded)
    command = sys.modules[bench_command.__module__]
    listed = {name: who for name, _, who in command._contests([(2, 3)], [], CPU, compiled=False)}
    for compared in (
        contenders.scoring(CPU, gradient=gradient, compile=False),
        listed["scores + gradient 2 x 3" if gradient else "scores 2 x 3"],
    ):
        (eager,) = (one for one in compared if one.name == "eager")
        arguments = (torch.randn(2, 3, requires_grad=True), torch.tensor([0, 2]))
        eager.call(*arguments)
        assert seen.pop() == arguments
    assert not seen


# ---- the report ----------------------------------------------------------------------------------


def record(suite: str, name: str, contender: str, median: float, **more: Any) -> dict[str, Any]:
    info = {
        "suite": suite,
        "case": name,
        "facts": {},
        "name": contender,
        "ours": contender.startswith("emp_fast"),
        "note": "",
        "p20": median * 0.9,
        "median": median,
        "p80": median * 1.1,
    }
    return {"extra_info": info | more}


def result_file(folder: Path, name: str = "cpu.json", **changes: Any) -> Path:
    overheads = {"median": 1.25, "p20": 0.5, "p80": 2.0}
    steps = {
        "steps": 141,
        "overhead_percent": {"pruner.loss": overheads, "eager pruning": overheads},
    }
    scores = {"num_scores": 10**7, "k": 10**6}
    result = {
        "machine_info": {
            "device": "cpu",
            "processor": "An Ordinary Processor",
            "cores": 2,
            "threads": 2,
            "memory_gib": 24,
            "python": "3.11.7",
            "cpu_capability": "AVX2",
            "versions": {"torch": "2.13.0"},
            "copy_bytes_per_second": {"median": 2e10, "p20": 1.9e10, "p80": 2.1e10},
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-11-24T00:00:00",
        "refused": [
            {"name": "Liger", "refused": "not importable", "suite": "forward", "case": "a"},
            {"name": "Liger", "refused": "not importable", "suite": "forward", "case": "b"},
        ],
        "benchmarks": [
            record("forward", "a", "emp_fast cpu", 1e-3, copy_percent=61.4),
            record("forward", "a", "eager", 2e-3),
            record("forward", "b", "emp_fast cpu", 1e-5, copy_percent=30.0),
            record("forward", "b", "eager", 8e-5, note="computes less"),
            record("selection", "s", "emp_fast cpu", 2.0, facts=scores, peak_bytes=18 * 10**6),
            record("selection", "s", "torch.topk", 9.0, facts=scores),
            record("training step", "t", "F.cross_entropy", 0.01, facts=steps),
            record("training step", "t", "pruner.loss", 0.0101, facts=steps),
            record("training step", "t", "eager pruning", 0.011, facts=steps),
            record("training step", "t", "selection", 0.002, facts=steps),
        ],
    }
    path = folder / name
    path.write_text(json.dumps(result | changes))
    return path


def test_the_report_tells_times_ratios_and_means(tmp_path: Path) -> None:
    assert report.main([str(result_file(tmp_path))]) == 0
    text = (tmp_path / "cpu.md").read_text()
    assert "# Benchmarks: An Ordinary Processor (2 cores)" in text
    assert "20.0 GB/s" in text
    assert "2026-11-24, commit 0123456789ab with uncommitted changes" in text
    assert "| a | 1 ms (0.9 to 1.1) | 61 % | 2.00x |" in text
    assert "| b | 10 us (9 to 11) | 30 % | 8.00x |" in text
    assert "| **geometric mean** |  |  | **4.00x** |" in text
    assert "| **lowest** |  |  | **2.00x** |" in text
    assert "eager: computes less." in text
    assert "| s | 2 s (1.8 to 2.2) |  | 1.00 | 4.50x |" in text
    assert "1.2 % (0.5 to 2.0)" in text or "1.3 % (0.5 to 2.0)" in text
    assert "- Liger (2 cases, the first forward a): not importable" in text
    assert "Times are those of whole calls: medians" in text
    assert "| Rounds |" not in text, "a file that does not say how many"
    told = readme_block(load([tmp_path / "cpu.json"]), "cpu.md", None)
    assert told.startswith("The time of a call of each peer")
    assert "latency" not in told


def test_a_gpus_times_are_called_kernel_times_and_latencies_stand_beside_them(
    tmp_path: Path,
) -> None:
    def timed(name: str, who: str, kernel: float, latency: float, **more: Any) -> dict[str, Any]:
        times = {"host": {"median": latency / 2}, "latency": {"median": latency}}
        return record("forward", name, who, kernel, **times, **more)

    path = result_file(
        tmp_path,
        benchmarks=[
            timed("a", "emp_fast cuda", 1e-5, 4e-5),
            timed("a", "F.cross_entropy", 2e-5, 3e-5, note="computes the loss alone"),
            timed("b", "emp_fast cuda", 1e-5, 4e-5),
            timed("b", "F.cross_entropy", 8e-5, 12e-5, note="computes the loss alone"),
            # Its kernel times are unsteady: its latency counts all the same.
            timed("c", "emp_fast cuda", 1e-5, 1e-4, p80=1e-4),
            timed("c", "F.cross_entropy", 1e-5, 1.5e-4),
        ],
    )
    result = load([path])
    text = markdown(result, None)
    assert "Times are kernel times (between events, behind a flushed L2 cache): medians" in text
    assert "| **geometric mean** |  |  | **4.00x** |" in text
    assert "| a | 20.0 / 40.0 us | 15.0 / 30.0 us |" in text
    assert "| c | 50.0 / 100.0 us | 75.0 / 150.0 us |" in text
    assert "| **latency, geometric mean** |  | **1.50x** |" in text
    assert "| **latency, lowest** |  | **0.75x** |" in text
    told = readme_block(result, "cuda.md", None)
    assert told.startswith("The kernel time (behind a flushed L2 cache) of each peer")
    assert "| Loss and four scores, 2 of 3 cases | 4.00x (2.00x) |" in told
    assert "launches included (`F.cross_entropy` alone launches less and computes less):" in told
    assert "| Loss and four scores | 1.50x (0.75x) |" in told


def test_an_overhead_says_what_was_timed_once_an_epoch(tmp_path: Path) -> None:
    path = result_file(tmp_path)
    old = "`store.select`, without the making of the epoch's order and without the sampler"
    for told in (markdown(load([path]), None), readme_block(load([path]), "cpu.md", None)):
        assert old in told
        assert "the 20 and 80 percentiles" in told
    assert "| selection, per epoch |" in markdown(load([path]), None)
    benches = json.loads(path.read_text())["benchmarks"]
    for bench in benches:
        info = bench["extra_info"]
        bench["stats"] = {"rounds": 9 if info["suite"] == "training step" else 7}
        if info["suite"] == "training step":
            info["facts"]["per_epoch"] = "beginning"
        if info["name"] == "selection":
            info |= {"name": "beginning", "note": "all of it"}
    new = load([result_file(tmp_path, benchmarks=benches)])
    text, told = markdown(new, None), readme_block(new, "cpu.md", None)
    assert "| beginning, per epoch |" in text
    assert "The last column is all of it;" in text
    assert "percentiles over 9 rounds" in text
    assert "| Rounds | 7 to 9 a case |" in text
    assert "spread over the steps of an epoch, all of it (the same for both)" in told
    assert "Median over 9 rounds" in told
    assert old not in text + told


def test_baselines_that_compute_more_than_emp_needs_have_a_footnote(tmp_path: Path) -> None:
    names = ("emp_fast cpu", "eager", "torch.compile", "F.cross_entropy")
    suite = "forward + backward + state"
    benches = [record(suite, "a", name, 1e-3) for name in names]
    text = markdown(load([result_file(tmp_path, benchmarks=benches)]), None)
    assert "eager, torch.compile: computes loss and all scores, as the kernels do, though" in text
    assert "F.cross_entropy:" not in text


def test_cases_of_the_suites_that_the_files_lack_are_named(tmp_path: Path) -> None:
    machine = json.loads(result_file(tmp_path).read_text())["machine_info"] | {"device": "cuda"}
    size = {"num_scores": 1000, "k": 100}
    random, peaked = size | {"scores": "random"}, size | {"scores": "peaked"}
    cases = [record("selection", f"{n}", "emp_fast cuda", 1.0, facts=random) for n in range(12)]
    cases += [record("selection", f"p{n}", "emp_fast cuda", 1.0, facts=peaked) for n in range(10)]
    lost = {"suite": "selection", "case": "p10", "name": "torch.sort", "refused": "no memory"}
    changes = {"machine_info": machine, "refused": [lost | {"facts": peaked}]}
    text = markdown(load([result_file(tmp_path, benchmarks=cases, **changes)]), None)
    (line,) = (line for line in text.splitlines() if "present suites" in line)
    assert line.startswith("- every contender (forward, random; forward, peaked; ")
    assert "forward + backward, random; forward + backward + state, random; linear; " in line
    assert "; selection, peaked: 1 of 12 cases; training step): not in the files" in line


def test_kernel_times_with_the_hosts_pauses_in_them_are_not_reported(tmp_path: Path) -> None:
    host = {"host": {"median": 3e-4}}
    wide = {"p20": 1e-5, "p80": 1.6e-5}
    path = result_file(
        tmp_path,
        benchmarks=[
            record("forward", "a", "emp_fast cuda", 1e-3, **host),
            record("forward", "a", "eager", 2e-3, **host),
            record("forward", "a", "Liger", 1.2e-5, **host | wide),
            record("forward", "b", "emp_fast cuda", 1.2e-5, **host | wide),
            record("forward", "b", "emp_fast triton", 1e-5, **host),
            record("linear", "s", "emp_fast cpu", 1.2e-5, **wide),  # wall times may vary
        ],
    )
    result = load([path])
    assert [case.name for case in result.cases] == ["a", "s"]
    assert list(result.cases[0].contenders) == ["emp_fast cuda", "eager"]
    text = markdown(result, None)
    unsteady = "its 80 percentile is more than 1.5 times its 20 percentile"
    assert f"- Liger (forward a): {unsteady}" in text
    assert f"- every contender (forward b): of emp_fast cuda {unsteady}" in text
    assert "| Loss and four scores, 1 of 2 cases |" in readme_block(result, "r.md", None)


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.main([str(result_file(tmp_path)), "-o", str(tmp_path / "out")]) == 0
    picture = (tmp_path / "out" / "cpu.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "![Time relative to emp_fast](cpu.png)" in (tmp_path / "out" / "cpu.md").read_text()


def test_a_page_changes_between_its_markers_alone(tmp_path: Path) -> None:
    page = "before\n<!-- bench:cpu -->\nold 99x\n<!-- /bench:cpu -->\nafter\n"
    block = readme_block(load([result_file(tmp_path)]), "cpu.md", "cpu.png")
    once = rewrite(page, "bench:cpu", block)
    assert once.startswith("before\n<!-- bench:cpu -->\n")
    assert once.endswith("\n<!-- /bench:cpu -->\nafter\n")
    assert "old" not in once
    assert "| Loss and four scores, 2 cases | 4.00x (2.00x) |  |" in once
    assert "](cpu.png)" in once
    assert "[cpu.md](cpu.md)" in once
    assert rewrite(once, "bench:cpu", block) == once
    for other in ("nothing", page + page, "<!-- /bench:cpu --> <!-- bench:cpu -->"):
        with pytest.raises(BadResult, match="must hold <!-- bench:cpu -->"):
            rewrite(other, "bench:cpu", block)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no benchmark result"),
        ("[]", "is no benchmark result"),
        ('{"benchmarks": [], "machine_info": {}}', "holds no benchmarks"),
        ('{"benchmarks": [{"extra_info": {}}], "machine_info": {}}', "is no result of these"),
    ],
)
def test_a_bad_result_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert report.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} {message}")
    assert error.count("\n") == 1


def test_a_missing_result_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


def test_results_of_one_commit_join(tmp_path: Path) -> None:
    first = result_file(tmp_path)
    more = [record("forward", "c", "emp_fast cpu", 1e-3)]
    second = result_file(tmp_path, "more.json", benchmarks=more, refused=[])
    assert report.main([str(first), str(second)]) == 0
    assert "| c | 1 ms" in (tmp_path / "cpu.md").read_text()


def test_results_of_several_commits_join_suite_by_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = result_file(tmp_path)
    updates = [
        record("state update", "c", "emp_fast cpu", 1e-3),
        record("state update", "c", "eager", 3e-3),
    ]
    later = {"commit_info": {"id": "fedcba9876543210"}, "refused": []}
    other = result_file(tmp_path, "other.json", benchmarks=updates, **later)
    assert report.main([str(first), str(other)]) == 0
    text = (tmp_path / "cpu.md").read_text()
    assert "| c | 1 ms" in text
    header = "| Measured | Date | Copy bandwidth | Load before the run | Rounds | All numbers |"
    assert header in text
    assert "| State update alone | 2026-11-24, commit fedcba987654 | 20.0 GB/s" in text
    assert text.count("| Date |") == 1
    told = readme_block(load([first, other]), "cpu.md", None)
    assert "2 cases | 4.00x (2.00x) |  | 2026-11-24, 0123456789ab+ |" in told
    assert "1 case | 3.00x (3.00x) |  | 2026-11-24, fedcba987654 |" in told
    assert "20 and 80 percentiles; measured 2026-11-24, 0123456789ab+:" in told
    # The same suite of two commits would be compared with itself.
    again = [record("forward", "c", "emp_fast cpu", 1e-3)]
    twice = result_file(tmp_path, "twice.json", benchmarks=again, **later)
    assert report.main([str(first), str(twice)]) == 2
    assert "has 'forward' of another commit" in capsys.readouterr().err
    machine = {**json.loads(first.read_text())["machine_info"], "processor": "Another"}
    elsewhere = result_file(tmp_path, "elsewhere.json", machine_info=machine)
    assert report.main([str(first), str(elsewhere)]) == 2
    assert "of another machine" in capsys.readouterr().err
    # A library that only one run had does not matter, another version does.
    known = json.loads(first.read_text())["machine_info"]
    for versions, status in (({}, 0), ({"a-peer": "1"}, 0), ({"torch": "0"}, 2)):
        machine = {**known, "versions": {**known["versions"], **versions}}
        other = result_file(
            tmp_path, "other.json", benchmarks=updates, machine_info=machine, **later
        )
        assert report.main([str(first), str(other)]) == status
    assert "or of other versions" in capsys.readouterr().err


# ---- what is committed ---------------------------------------------------------------------------


def test_every_committed_page_is_what_its_generator_makes() -> None:
    """After a change of the generator or of the JSON: `make results`."""
    for path, text in committed.pages(*committed.index_and_reports()).items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is stale: make results"


def test_the_committed_results_are_of_the_suites_as_they_are_but_for_those_named() -> None:
    _, reports = committed.index_and_reports()
    gaps = "- every contender (forward, peaked; linear; selection, peaked): not in the files"
    assert gaps in markdown(reports["h200"], None)
    assert "present suites" not in markdown(reports["cpu"], None)


def test_every_result_file_is_reported() -> None:
    index = json.loads((committed.RESULTS / "index.json").read_text())
    used = {name for files in index["reports"].values() for name in files}
    used |= {one["file"] for tables in index["kernels"].values() for one in tables}
    used |= set(index["demos"])
    assert used == {path.name for path in committed.RESULTS.glob("*.json")} - {"index.json"}
    made = {*index["reports"], *index["kernels"]}
    assert made == {path.stem for path in committed.RESULTS.glob("*.md")}
    for tables in index["kernels"].values():
        for name in {one["file"] for one in tables}:
            runs = json.loads((committed.RESULTS / name).read_text())["runs"]
            assert sorted(one["run"] for one in tables if one["file"] == name) == [
                *range(len(runs))
            ]


def test_a_stale_page_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert committed.main(["--check"]) == 0
    path = committed.ROOT / "page.md"
    monkeypatch.setattr(committed, "pages", lambda *_: {path: "new"})
    assert committed.main(["--check"]) == 1
    assert "page.md is not what `make results` makes" in capsys.readouterr().out
    assert not path.exists()


def test_a_sweep_becomes_a_table(tmp_path: Path) -> None:
    seconds = {
        "scores 4 x 10 bfloat16": {"cuda": 9.96e-6, "cuda, plain": 1.234e-5},
        "update 128": {"cuda": 0.0123},
    }
    run: dict[str, Any] = {"commit": "0123456789abcdef", "seconds": seconds}
    run["copy_bytes_per_second"] = 1e8
    versions = {"torch": "2.11.0", "triton": "3.6.0"}
    machine = {"gpu": "GPU", "cuda": "13.0", "python": "3.12.3", "versions": versions}
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"date": "2026-11-24", "machine": machine, "runs": [run]}))
    shown = [Shown("A title", "sweep.json", 0, "A note.", 12.0)]
    text = kernel_report(tmp_path, shown)
    assert "2026-11-24, commit 0123456789ab, copy bandwidth 0 GB/s" in text
    assert "| case | cuda | cuda, plain |" in text
    assert "| scores 4 x 10 bf16 | 10.0 us, 19 % | 12 us, 16 % |" in text
    assert "| update 128 | 12.3 ms |  |" in text
    for commit, told in (
        ("0123456789abcdef+", "commit 0123456789ab with uncommitted changes,"),
        (None, "commit unknown,"),
    ):
        dirty = {"date": "2026-11-24", "machine": machine, "runs": [run | {"commit": commit}]}
        path.write_text(json.dumps(dirty))
        assert told in kernel_report(tmp_path, shown)
    noted = run | {"note": "From a printed table.", "rounds": 10}
    path.write_text(json.dumps({"date": "2026-11-24", "machine": machine, "runs": [noted]}))
    text = kernel_report(tmp_path, shown)
    assert "\n\nA note.\n\nFrom a printed table.\n\n| case" in text
    assert "GB/s; 10 rounds, all numbers in" in text
    with pytest.raises(BadResult, match="no results of the sweep"):
        kernel_report(tmp_path, [shown[0]._replace(run=1)])
    other = {"date": "2026-11-24", "machine": machine | {"gpu": "another"}, "runs": [run]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(BadResult, match="several machines"):
        kernel_report(tmp_path, [*shown, shown[0]._replace(file="other.json")])


@pytest.mark.parametrize(
    ("case", "nbytes"),
    [
        ("scores 4 x 10 bfloat16", 4 * (20 + 28)),
        ("step 4 x 10 float32", 4 * (80 + 56)),
        ("backward 4 x 10 float16", 4 * (40 + 28)),
        ("select 30% of 1e+06", 4 * 10**6 + 8 * 300_000),
        ("update 128", 36 * 128),
    ],
)
def test_the_floor_of_a_case_follows_from_its_name(case: str, nbytes: int) -> None:
    assert floor_bytes(case) == nbytes


# ---- a quick run from end to end -----------------------------------------------------------------


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--quick", "-q", "--device=cpu", *arguments]
    # Tests may share the cores with other workers: threads that wait for each other then crawl.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    inherited["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=inherited | environment, check=False
    )


def test_a_quick_run_measures_and_reports_every_suite(tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    finished = run(["benchmarks", f"--benchmark-json={path}"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    raw = json.loads(path.read_text())
    assert "node" not in raw["machine_info"], "a result names no host"
    assert raw["machine_info"]["copy_bytes_per_second"]["median"] > 0
    assert set(raw["commit_info"]) <= {"id", "time", "dirty"}

    result = load([path])
    assert [case.suite for case in result.cases].count("forward") == 4
    assert {case.suite for case in result.cases} == set(SUITES)
    for one in result.cases:
        assert one.ours is not None, one.name
        assert len(one.contenders) >= 2, one.name
        for measured in one.contenders.values():
            assert 0 < measured.p20 <= measured.median <= measured.p80
    assert report.main([str(path)]) == 0
    text = (tmp_path / "quick.md").read_text()
    assert "a smoke test and no measurement" in text
    assert "| Rounds | 2 a case |" in text
    assert "| beginning, per epoch |" in text
    assert "present suites" not in text, "every case is in the file"


def test_a_wrong_score_fails_the_run_and_leaves_no_speed(tmp_path: Path) -> None:
    (tmp_path / "wrong_loss.py").write_text(
        "from benchmarks import contenders\n"
        "right = contenders.cross_entropy\n"
        "def wrong(*arguments):\n"
        "    stats = right(*arguments)\n"
        "    return stats._replace(loss=stats.loss * 1.001)\n"
        "contenders.cross_entropy = wrong\n"
    )
    path = tmp_path / "wrong.json"
    finished = run(
        [
            "benchmarks/test_score.py::test_forward",
            f"--benchmark-json={path}",
            "-p",
            "wrong_loss",
        ],
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
    )
    assert finished.returncode == 1
    assert "differs from the reference in loss of forward 128 x 10" in finished.stdout
    assert not path.exists()


# ---- the sweep over our own kernels --------------------------------------------------------------


@pytest.fixture
def small_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"_SHAPES": ((6, 10), (3, 70)), "_SELECTED": (1000,), "_UPDATED": (5,)}
    for name, value in {**small, "_NUM_SAMPLES": 64, "_ROUNDS": 2}.items():
        monkeypatch.setattr(sweep, name, value)


def test_the_sweep_times_every_case_by_every_backend(small_sweep: None, tmp_path: Path) -> None:
    results = tmp_path / "sweep.json"
    assert sweep.main(["--device", "cpu", "-o", str(results)]) == 0
    written = json.loads(results.read_text())
    assert written["machine"]["device"] == "cpu"
    (measured,) = written["runs"]
    assert measured["copy_bytes_per_second"] > 0
    assert measured["commit"] == sweep._commit()
    assert measured["rounds"] == 2
    found = measured["seconds"]
    rows = [
        f"{work} {shape} {dtype}"
        for shape in ("6 x 10", "3 x 70")
        for dtype in ("bfloat16", "float32")
        for work in ("scores", "step", "backward")
    ]
    selected = [f"select {share} of 1e+03" for share in ("10%", "30%", "70%")]
    assert list(found) == [*rows, *selected, "update 5"]
    assert all(0 < seconds < 1 for times in found.values() for seconds in times.values())
    assert all(list(times) == ["cpu"] for times in found.values())


def test_the_sweep_may_warm_up_a_share_of_some_cases(
    small_sweep: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(["--device", "cpu", "--only", "backward", "--warm", "1/2"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == [f"backward {shape}: " for shape in ("6 x 10 float32", "3 x 70 float32")]


def test_a_variant_that_fails_is_named_and_the_others_are_timed(
    small_sweep: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> contextlib.AbstractContextManager[None]:
        raise RuntimeError("no such kernel\nand a long trace")

    entered = {"reference": contextlib.nullcontext, "reference, broken": broken}
    monkeypatch.setattr(sweep.contenders, "backends", lambda *_, **__: (entered, {}))
    assert sweep.main(["--device", "cpu", "--only", "scores 6 x 10 float32"]) == 0
    _, problem, times = capsys.readouterr().out.splitlines()
    assert problem == "scores 6 x 10 float32, reference, broken: RuntimeError: no such kernel"
    assert times.startswith("scores 6 x 10 float32: reference ")
    assert "broken" not in times


def test_the_launch_arithmetic_that_a_sweep_varies_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("cuda", "triton", "triton, plain", "triton, stepped")
    entered = dict.fromkeys(names, contextlib.nullcontext)
    monkeypatch.setattr(sweep.contenders, "backends", lambda *_, **__: (entered, {}))
    every = sweep.variants(torch.device("cuda"))
    assert tuple(variant.name for variant in every[: len(names)]) == names
    assert all(variant.name.startswith("triton") for variant in every[1:])
    for constant, within in (("rows_warps", "triton, stepped"), ("tile_threads", "triton, plain")):
        varied = [variant.name for variant in every if constant in variant.name]
        assert varied
        assert all(name.startswith(f"{within}, ") for name in varied)
    for variant in every:
        with variant.enter():
            pass


def test_a_sweep_of_a_gpu_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert sweep.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def demo_file(folder: Path, data: str, **changes: Any) -> Path:
    """A result of `emp-fast demo` of three methods and two seeds."""
    names = {"full": (0.90, 0.92), "loss": (0.93, 0.93), "emp": (0.94, 0.95)}
    methods = [
        {
            "name": name,
            "label": name.upper(),
            "about": f"what {name} does",
            "accuracies": list(accuracies),
            "accuracy_mean": sum(accuracies) / 2,
            "accuracy_std": 0.01,
        }
        for name, accuracies in names.items()
    ]
    result = {
        "data": data,
        "num_samples": 1000,
        "settings": {"epochs": 10, "prune_rate": 0.7},
        "budget": 3000,
        "seeds": [0, 1],
        "torch": "2.13.0",
        "processor": "An Ordinary Processor",
        "date": "2026-11-24",
        "methods": methods,
    }
    path = folder / f"{data}.json"
    path.write_text(json.dumps(result | changes))
    return path


def test_accuracies_become_a_column_a_data_set(tmp_path: Path) -> None:
    files = [demo_file(tmp_path, "fashion-mnist"), demo_file(tmp_path, "digits")]
    block = accuracy_block(files, "demo.png")
    assert "| method |  | Fashion-MNIST | digits |" in block
    assert "| **EMP** | what emp does | 94.50 ± 1.00 | 94.50 ± 1.00 |" in block
    # The differences are 4 and 3 points.
    assert "EMP against full data +3.50 ± 0.50 points (standard error)" in block
    assert "`make demo DEMO_FLAGS='--data fashion-mnist'` on An Ordinary Processor" in block
    assert "digits: 3,000 samples, 10 epochs of 30% of 1,000, 2 seeds" in block
    assert "](demo.png)" in block


def test_accuracies_of_other_methods_or_of_none_are_refused(tmp_path: Path) -> None:
    whole = demo_file(tmp_path, "digits")
    methods = json.loads(whole.read_text())["methods"]
    for changes in ({"methods": methods[1:]}, {"seeds": None}):
        other = demo_file(tmp_path, "fashion-mnist", **changes)
        with pytest.raises(BadResult, match=r"no results of emp-fast demo"):
            accuracy_block([whole, other], "demo.png")
