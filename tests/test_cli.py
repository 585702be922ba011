"""The command line: what each command prints and writes; misuse is one line and exit code 2."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import emp_fast
from emp_fast import Policy, backends
from emp_fast.backends.native import NativeModule, load_native
from emp_fast.cli import app, bench, doctor
from emp_fast.cli import demo as demo_command
from emp_fast.demo import comparison
from emp_fast.files import write_atomically

N = 1009


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result


def refused(*arguments):
    """The one line on stderr of a refusal."""
    result = run(*arguments, exit_code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("emp-fast: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    return result.stderr


# ---- the group ----------------------------------------------------------------------------------


def test_output_in_ascii_gets_what_is_nearest() -> None:
    code = (
        "import sys; from emp_fast.cli.console import OneLineErrors, stdout; import typer\n"
        "app = typer.Typer(cls=OneLineErrors)\n"
        "app.command()(lambda: stdout().print('1.5 µs ± 2 ☃'))\n"
        "app.callback()(lambda: None)\n"
        "app()"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code, "<lambda>"], env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"1.5 us +- 2 ?\n"), done.stderr


def test_module_runs_as_a_command():
    environment = {**os.environ, "PYTHONPATH": str(Path(emp_fast.__file__).parents[1])}

    def emp_fast_module(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "emp_fast", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )

    report = emp_fast_module("doctor", "--json")
    assert report.returncode == 0, report.stderr
    assert json.loads(report.stdout)["versions"]["torch"] == torch.__version__
    wrong = emp_fast_module("select", "nowhere.npy", "out.npy", "--k", "3")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr == "emp-fast: cannot read nowhere.npy: No such file or directory\n"


def test_version_and_help():
    assert run("--version").stdout == f"emp_fast {emp_fast.__version__}\n"
    for arguments in ((), ("--help",)):
        text = run(*arguments).stdout
        assert all(command in text for command in ("doctor", "demo", "bench", "select"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diagnose",), "No such command 'diagnose'"),
        (("doctor", "--xml"), "--xml"),  # versions of typer put it differently
        (("doctor", "extra"), "unexpected extra argument"),
        (("select",), "Missing argument 'SCORES'"),
        (("demo", "--epochs", "0"), "'--epochs'"),
        (("demo", "--seeds", "many"), "'--seeds'"),
        (("--frobnicate",), "No such option"),
    ],
)
def test_misuse_is_one_line(arguments, message):
    assert message in refused(*arguments)


# ---- doctor -------------------------------------------------------------------------------------


def test_an_interrupt_is_one_line_and_the_shells_exit_code(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[doctor.__module__], "examine", interrupted)
    result = run("doctor", exit_code=130)
    assert result.stderr.split("\n")[-2:] == ["emp-fast: interrupted", ""]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),  # of stdout
        (OSError(13, "Permission denied", "/here"), "/here: Permission denied"),
    ],
)
def test_an_error_of_the_system_is_one_line(monkeypatch, error, line):
    def failing():
        raise error

    monkeypatch.setattr(sys.modules[doctor.__module__], "examine", failing)
    assert refused("doctor") == f"emp-fast: {line}\n"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", "the cuda backend cannot serve cpu: "),
        ("magic", "EMP_FAST_BACKEND must be one of"),
    ],
)
@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_backend_that_cannot_serve_is_refused_first(command, backend, message, monkeypatch):
    monkeypatch.setenv("EMP_FAST_BACKEND", backend)
    assert message in refused(command, "--quick")


def test_select_says_that_a_backend_cannot_serve(file, monkeypatch):
    monkeypatch.setenv("EMP_FAST_BACKEND", "triton")
    assert "the triton backend cannot serve cpu: " in refused("select", file, "out.npy", "--k", 2)


def test_doctor_reports_backends_versions_and_where_kernels_ran():
    report = json.loads(run("doctor", "--json").stdout)
    backends = {line["backend"]: line for line in report["backends"] if line["device"] == "cpu"}
    assert set(backends) == {"reference", "cpu", "triton", "cuda"}
    assert backends["reference"]["available"]
    for line in backends.values():
        assert (line["reason"] is None) == line["available"]
        assert line["self_check"] in ("is the oracle", "passed", "failed", "not run")
    assert report["reference_problem"] is None
    assert report["automatic_choice"]["cpu"] in ("reference", "cpu")
    assert report["kernels_have_run_on"] == {"triton": ["NVIDIA H200"], "cuda": ["NVIDIA H200"]}
    not_run = report["kernels_not_run_yet"]["cuda"]
    assert "rows_ring and rows_cluster with softcap or label smoothing" in not_run[0]
    assert report["versions"]["emp_fast"] == emp_fast.__version__


def test_doctor_prints_the_same_as_tables():
    text = run("doctor").stdout
    assert "│ reference │ yes" in text
    assert torch.__version__ in text
    told = " ".join(text.split())
    assert "GPUs that have run the kernels: triton on NVIDIA H200; cuda on NVIDIA H200." in told
    assert "Not run on any GPU as they are now: cuda: " in told


def test_doctor_says_that_a_chosen_backend_cannot_serve(monkeypatch):
    monkeypatch.setenv("EMP_FAST_BACKEND", "cuda")
    report = json.loads(run("doctor", "--json").stdout)
    assert "the cuda backend cannot serve cpu" in report["automatic_choice"]["cpu"]
    monkeypatch.setenv("EMP_FAST_BACKEND", "magic")
    report = json.loads(run("doctor", "--json").stdout)
    assert "got 'magic'" in report["automatic_choice"]["cpu"]
    monkeypatch.setenv("EMP_FAST_BACKEND", "[/magic]")  # which is no markup of the table's
    assert "got '[/magic]' (EMP_FAST_BACKEND=[/magic])" in " ".join(run("doctor").stdout.split())


def test_doctor_tells_a_failed_self_check_from_one_that_did_not_run(monkeypatch):
    def status(device):
        return [
            backends.BackendStatus("reference", True),
            backends.BackendStatus("cpu", False, "self-check failed: topk differs", "topk differs"),
            backends.BackendStatus("cuda", False, "no device"),
        ]

    monkeypatch.setattr(sys.modules[doctor.__module__], "backend_status", status)
    lines = json.loads(run("doctor", "--json").stdout)["backends"]
    assert [(line["self_check"], line["reason"]) for line in lines[:3]] == [
        ("is the oracle", None),
        ("failed", "topk differs"),
        ("not run", "no device"),
    ]


@pytest.mark.parametrize("loads", [True, False])
def test_doctor_believes_its_eyes_where_no_build_was_recorded(tmp_path, monkeypatch, loads):
    module = sys.modules[doctor.__module__]
    monkeypatch.setattr(module.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(module, "load_native", lambda: NativeModule(object() if loads else None))
    assert module._build_info()["native"] is loads


def test_doctor_shows_how_the_cpu_kernels_run():
    machine = json.loads(run("doctor", "--json").stdout)["machine"]
    native = load_native()
    if native.module is None:
        assert machine["instruction_set"] is machine["openmp"] is None
    else:
        assert machine["instruction_set"] in native.module.supported_isas()
        assert machine["openmp"] is native.module.OPENMP


def test_doctor_shows_which_row_kernels_are_chosen(monkeypatch):
    for variable, kernels in (
        ("EMP_FAST_CPU_ISA", "avx2"),
        ("EMP_FAST_CUDA_ROWS", "cluster"),
        ("EMP_FAST_TRITON_ROWS", "plain"),
    ):
        monkeypatch.delenv(variable, raising=False)
        settings = json.loads(run("doctor", "--json").stdout)["settings"]
        assert settings[variable] == "auto"
        monkeypatch.setenv(variable, kernels)
        settings = json.loads(run("doctor", "--json").stdout)["settings"]
        assert settings[variable] == kernels


def test_doctor_says_that_no_row_kernels_have_that_name(monkeypatch):
    # As in a new process: a backend is made once.
    monkeypatch.setattr(backends, "_load", functools.cache(backends._load.__wrapped__))
    monkeypatch.setattr(backends, "_status", functools.cache(backends._status.__wrapped__))
    monkeypatch.setenv("EMP_FAST_CUDA_ROWS", "magic")
    report = json.loads(run("doctor", "--json").stdout)
    reasons = {line["backend"]: line["reason"] for line in report["backends"]}
    names = "['auto', 'plain', 'shared', 'cluster', 'ring', 'held']"
    assert f"EMP_FAST_CUDA_ROWS must be one of {names}" in reasons["cuda"]
    assert "got 'magic'" in reasons["cuda"]
    with pytest.raises(ValueError, match="EMP_FAST_CUDA_ROWS"):
        backends.load("cuda")


@pytest.mark.parametrize("broken", ["cross_entropy", "topk_indices"])
def test_doctor_fails_when_the_reference_is_wrong(monkeypatch, broken):
    module = sys.modules[doctor.__module__]
    right = getattr(module, broken)

    def wrong(*arguments):
        if broken == "topk_indices":
            return right(*arguments) + 1
        stats = right(*arguments)
        return stats._replace(loss=stats.loss + 1e-3)

    monkeypatch.setattr(module, broken, wrong)
    result = run("doctor", exit_code=1)
    assert "The reference backend does not work" in result.stdout


# ---- select -------------------------------------------------------------------------------------


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(N).round(1).astype(np.float32)  # many ties


@pytest.fixture
def file(tmp_path, scores) -> Path:
    np.save(tmp_path / "scores.npy", scores)
    return tmp_path / "scores.npy"


def expected(scores, k):
    """A stable sort's top k, ascending."""
    return np.sort(np.argsort(-scores, kind="stable")[:k]).tolist()


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".txt"])
@pytest.mark.parametrize("budget", [("--keep", "0.3"), ("--k", "303")])
def test_select_writes_the_highest(file, scores, suffix, budget):
    output = file.parent / f"kept{suffix}"
    result = run("select", file, output, *budget)
    assert result.stderr == f"kept 303 of 1,009 samples: {output}\n"
    if suffix == ".npy":
        kept = np.load(output)
        assert kept.dtype == np.int64
    elif suffix == ".txt":
        kept = np.loadtxt(output, dtype=np.int64)
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(output)
        assert table.column_names == ["index"]
        kept = table["index"].to_numpy()
    assert kept.tolist() == expected(scores, 303)
    assert {path.name for path in file.parent.iterdir()} == {"scores.npy", output.name}


@pytest.mark.parametrize(
    "values",
    [
        np.arange(50)[::-1] % 7,
        (np.arange(50) % 7).astype(np.uint8),
        (1 + np.arange(50)[::-1] * 1e-12).astype(np.float64),  # one number in float32
        (np.arange(50) % 11).astype(np.float16),
        (np.arange(50) % 13).astype(">f4"),
        (np.arange(50) * 1e300)[::-1],
    ],
    ids=["int64", "uint8", "float64", "float16", "big-endian", "beyond float32"],
)
def test_select_ranks_every_dtype_exactly(tmp_path, values):
    np.save(tmp_path / "scores.npy", values)
    run("select", tmp_path / "scores.npy", tmp_path / "kept.npy", "--k", 9)
    assert np.load(tmp_path / "kept.npy").tolist() == expected(values.astype(np.float64), 9)


def test_select_can_prefer_the_lowest(tmp_path):
    values = np.array([0.5, np.nan, -1.0, 3.0, -1.0, 0.25], dtype=np.float32)
    np.save(tmp_path / "margin.npy", values)
    arguments = (
        "select",
        tmp_path / "margin.npy",
        tmp_path / "kept.npy",
        "--lowest",
        "--allow-nan",
    )
    for k, wanted in ((1, [2]), (3, [2, 4, 5]), (5, [0, 2, 3, 4, 5])):
        run(*arguments, "--k", k, "--overwrite")
        assert np.load(tmp_path / "kept.npy").tolist() == wanted


def test_select_reads_parquet_columns(tmp_path, scores):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, kept = tmp_path / "scores.parquet", tmp_path / "kept.npy"
    parquet.write_table(pa.table({"loss": scores, "score": -scores}), path)
    run("select", path, kept, "--k", 100)
    assert np.load(kept).tolist() == expected(-scores, 100)
    run("select", path, kept, "--k", 100, "--column", "loss", "--overwrite")
    assert np.load(kept).tolist() == expected(scores, 100)
    message = refused("select", path, kept, "--k", 1, "--column", "no", "--overwrite")
    assert "has no column 'no'; it has 'loss', 'score'" in message
    parquet.write_table(pa.table({"a": scores, "b": scores}), path)
    assert "no column 'score'" in refused("select", path, tmp_path / "x.npy", "--k", 1)
    parquet.write_table(pa.table([scores, scores], names=["score", "score"]), path)
    message = refused("select", path, tmp_path / "x.npy", "--k", 1)
    assert "scores.parquet has 2 columns 'score'" in message
    parquet.write_table(pa.table({"a": [1, None, None]}), path)
    assert "holds 2 nulls" in refused("select", path, tmp_path / "x.npy", "--k", 1)
    parquet.write_table(pa.table({"a": ["x", "y"]}), path)
    assert "must hold numbers" in refused("select", path, tmp_path / "x.npy", "--k", 1)


@pytest.mark.parametrize("balance", ["equal", "proportional"])
def test_select_balances_classes(file, scores, balance):
    labels = np.repeat([7, -2, 40], [900, 99, 10])
    np.save(file.parent / "labels.npy", labels)
    output = file.parent / "kept.npy"
    options = ("--labels", file.parent / "labels.npy", "--balance", balance)
    run("select", file, output, "--k", 200, *options)
    kept = np.load(output)
    counts = [int((labels[kept] == label).sum()) for label in (7, -2, 40)]
    assert counts == ([95, 95, 10] if balance == "equal" else [178, 20, 2])
    for label, count in zip((7, -2, 40), counts, strict=True):
        members = np.flatnonzero(labels == label)
        wanted = members[expected(scores[members], count)]
        assert kept[labels[kept] == label].tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("random", ()),
        ("epsilon-greedy", ("--eps", "0.5")),
        ("gumbel", ("--temperature", "0.5")),
        ("stratified", ()),
        ("window", ("--low", "0.2", "--high", "0.9")),
    ],
)
def test_select_draws_reproducibly(file, policy, options):
    outputs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = file.parent / f"{name}.npy"
        run("select", file, output, "--k", 300, "--policy", policy, "--seed", seed, *options)
        outputs.append(np.load(output).tolist())
        assert len(set(outputs[-1])) == 300
        assert outputs[-1] == sorted(outputs[-1])
    assert outputs[0] == outputs[1] != outputs[2]


def test_select_checks_what_the_policy_chose(file, monkeypatch):
    class All(Policy):
        def choose(self, candidates, quotas):
            return torch.ones(len(candidates), dtype=torch.bool), None

    table = sys.modules["emp_fast.cli.select"]._POLICIES
    monkeypatch.setitem(table, "topk", (All, ()))
    message = refused("select", file, file.parent / "kept.npy", "--k", 300)
    assert "must choose 300 samples, but All() chose 1009" in message
    assert not (file.parent / "kept.npy").exists()


@pytest.mark.filterwarnings("default::emp_fast.EmpFastWarning")
def test_select_below_mean_keeps_weights_in_parquet(file, scores):
    parquet = pytest.importorskip("pyarrow.parquet")
    output = file.parent / "kept.parquet"
    run("select", file, output, "--policy", "below-mean", "--keep", 0.25)
    table = parquet.read_table(output)
    kept, weights = table["index"].to_numpy(), table["weight"].to_numpy()
    below = scores < scores.astype(np.float64).mean()
    assert np.flatnonzero(~below).tolist() == kept[~below[kept]].tolist()
    assert below[kept].sum() == int(0.25 * below.sum())
    assert weights.tolist() == np.where(below[kept], 4.0, 1.0).tolist()
    result = run("select", file, file.parent / "k.npy", "--policy", "below-mean", "--keep", 0.25)
    assert "weights, which .npy cannot hold" in result.stderr
    assert np.load(file.parent / "k.npy").tolist() == kept.tolist()


def test_select_takes_infinities_and_counts_nan(tmp_path):
    path, output = tmp_path / "scores.npy", tmp_path / "kept.npy"
    np.save(path, np.array([np.nan, 1, -np.inf, np.inf, np.nan, 0], dtype=np.float32))
    message = refused("select", path, output, "--k", 3)
    assert "holds 2 NaN among 6 scores, the first at 0" in message
    assert not output.exists()
    run("select", path, output, "--k", 3, "--allow-nan")
    assert np.load(output).tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "either --keep or --k"),
        (("--k", 3, "--keep", 0.3), "not both; got --keep 0.3 and --k 3"),
        (("--k", 0), "--k must lie in [1, 1009], the number of scores, got 0"),
        (("--k", N + 1), "--k must lie in [1, 1009], the number of scores, got 1010"),
        (("--k", "2.5"), "'--k'"),
        (("--keep", 0), "--keep must lie in (0, 1], got 0.0"),
        (("--keep", 1.5), "--keep must lie in (0, 1], got 1.5"),
        (("--keep", "nan"), "--keep must lie in (0, 1], got nan"),
        (("--keep", 1e-9), "--keep must keep at least one of 1009 samples, got 1e-09"),
        (("--k", 3, "--policy", "best"), "--policy must be one of topk, random"),
        (("--k", 3, "--eps", 0.1), "--eps has no effect with --policy topk, got 0.1"),
        (("--k", 3, "--policy", "epsilon-greedy", "--eps", 2), "eps must lie in [0, 1], got 2"),
        (("--k", 3, "--policy", "below-mean"), "--k has no effect with --policy below-mean"),
        (("--policy", "below-mean", "--keep", 7), "keep must lie in (0, 1], got 7"),
        (
            ("--k", 900, "--policy", "window", "--low", 0.5),
            "k must be at most 505, the samples in Window(low=0.5, high=1.0), got 900",
        ),
        (("--k", 3, "--balance", "equal"), "--balance has no effect without --labels, got equal"),
        (("--k", 3, "--label-column", "y"), "--label-column has no effect without --labels, got y"),
        (
            ("--k", 3, "--labels", "a.npy", "--balance", "fair"),
            "--balance must be one of equal, proportional, got 'fair'",
        ),
        (("--k", -1), "--k must lie in [1, 1009], the number of scores, got -1"),
        (("--k", 3, "--bins", 4), "--bins has no effect with --policy topk, got 4"),
        (("--k", 3, "--policy", "stratified", "--bins", 0), "bins must be an int in [1, 1048576]"),
        (("--k", 3, "--policy", "stratified", "--cutoff", 1), "cutoff must lie in [0, 1), got 1"),
        (
            ("--k", 3, "--policy", "gumbel", "--temperature", "inf"),
            "temperature must be a positive",
        ),
        (("--k", 3, "--policy", "window", "--low", 0.7, "--high", 0.2), "low must be below high"),
        (("--k", 3, "--seed", 2**63), "--seed must fit 64 bits"),
        (("--k", 3, "--column", "a"), "only .parquet files have named columns, got 'a'"),
        (("--k", 3, "--labels", "nowhere.npy"), "cannot read nowhere.npy: No such file"),
    ],
)
def test_select_refuses_bad_options(file, options, message):
    output = file.parent / "kept.npy"
    assert message in refused("select", file, output, *options)
    assert [path.name for path in file.parent.iterdir()] == ["scores.npy"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 2)), "must hold a vector [N], got shape [4, 2]"),
        (np.float32(3), "must hold a vector [N], got shape []"),
        (np.zeros(0), "is empty"),
        (np.array(["a", "b"]), "must hold numbers, got dtype <U1"),
        (np.array([True, False]), "must hold numbers, got dtype bool"),
        (np.array([1j, 2]), "must hold numbers, got dtype complex128"),
        (np.ones(2, dtype=np.longdouble), "must hold numbers of at most 64 bits, got dtype"),
        (np.array([2**60, 2**60 + 1]), "integers beyond 2**53"),
        (np.array([3, 2**53, 2**53 + 1]), "integers beyond 2**53"),
        (np.array([3, -(2**53) - 1]), "integers beyond 2**53"),
        (np.array([3, 2**64 - 1], dtype=np.uint64), "integers beyond 2**53"),
        (np.zeros(3, dtype=[("score", "f4")]), "must hold numbers, got dtype [('score', '<f4')]"),
        (np.array(["2026-01-01"], dtype="M8[D]"), "must hold numbers, got dtype datetime64[D]"),
    ],
)
def test_select_refuses_bad_scores(tmp_path, array, message):
    np.save(tmp_path / "scores.npy", array)
    assert message in refused("select", tmp_path / "scores.npy", tmp_path / "k.npy", "--k", 1)


def test_select_refuses_files_that_are_not_what_they_are_called(file):
    output = file.parent / "kept.npy"
    whole = file.read_bytes()
    for content in (b"", b"not numpy", whole[:100], whole[:-4]):
        file.write_bytes(content)
        told = refused("select", file, output, "--k", 3)
        assert "is not a sound .npy file" in told
        assert "pickle" not in told
    np.save(file, np.array([{}, 1], dtype=object), allow_pickle=True)
    assert "is not a sound .npy file" in refused("select", file, output, "--k", 3)
    with file.open("wb") as archive:
        np.savez(archive, a=np.zeros(3))
    assert "an archive of several arrays" in refused("select", file, output, "--k", 3)
    for suffix, message in ((".csv", "must be .npy or .parquet, got"), ("", "got")):
        other = file.with_suffix(suffix) if suffix else file.parent / "scores"
        assert message in refused("select", other, output, "--k", 3)
    folder = file.parent / "folder.npy"
    folder.mkdir()
    assert "Is a directory" in refused("select", folder, output, "--k", 3)
    pytest.importorskip("pyarrow")
    (file.parent / "bad.parquet").write_bytes(b"PAR1 but no more")
    message = refused("select", file.parent / "bad.parquet", output, "--k", 3)
    assert "is not a sound .parquet file" in message


def test_select_does_not_call_a_file_damaged_for_which_memory_is_short(file, monkeypatch):
    def load(path, **_):
        raise MemoryError("Unable to allocate 36.4 TiB")

    monkeypatch.setattr(np, "load", load)
    told = refused("select", file, file.parent / "kept.npy", "--k", 3)
    assert told == f"emp-fast: cannot read {file}: Unable to allocate 36.4 TiB\n"


def test_select_refuses_labels_that_do_not_fit(file):
    labels, output = file.parent / "labels.npy", file.parent / "kept.npy"
    for array, message in (
        (np.zeros(N - 1, dtype=np.int64), "one label for each of 1,009 scores, got 1,008"),
        (np.zeros(N), "must hold integer class ids, got dtype float64"),
    ):
        np.save(labels, array)
        assert message in refused("select", file, output, "--k", 3, "--labels", labels)


def test_select_keeps_the_whole_window_without_a_budget(tmp_path):
    np.save(tmp_path / "scores.npy", np.arange(10, dtype=np.float32))
    output = tmp_path / "kept.npy"
    run(
        "select", tmp_path / "scores.npy", output, "--policy", "window", "--low", 0.2, "--high", 0.5
    )
    assert np.load(output).tolist() == [2, 3, 4]


def test_select_never_loses_a_file(file, scores):
    output = file.parent / "kept.npy"
    output.write_bytes(b"precious")
    assert "exists already; --overwrite" in refused("select", file, output, "--k", 3)
    assert output.read_bytes() == b"precious"
    missing = file.parent / "none.npy"  # told before, since --overwrite would not help
    assert "none.npy" in refused("select", missing, output, "--k", 3)
    assert "--k must lie in" in refused("select", file, output, "--k", 0)
    run("select", file, output, "--k", 3, "--overwrite")
    assert np.load(output).tolist() == expected(scores, 3)
    labels = file.parent / "labels.npy"
    np.save(labels, np.zeros(N, dtype=np.int64))
    for read in (file, file.parent / ".." / file.parent.name / file.name, labels):
        options = ("--k", 3, "--overwrite", "--labels", labels)
        assert "OUTPUT must differ from" in refused("select", file, read, *options)
    assert np.load(file).tolist() == scores.tolist()
    folder = file.parent / "data"
    folder.mkdir()
    options = ("--k", 3, "--overwrite", "--dataset", folder)
    assert "OUTPUT must differ from" in refused("select", file, folder, *options)


def test_select_refuses_an_output_that_cannot_be_written(file):
    assert "the output must end in .npy, .parquet, .txt" in refused(
        "select", file, file.parent / "kept.csv", "--k", 3
    )
    nowhere = file.parent / "nowhere" / "kept.npy"
    assert f"cannot write {nowhere}: No such file" in refused("select", file, nowhere, "--k", 3)
    inside = file / "kept.npy"  # a folder that is a file
    assert f"cannot write {inside}: No such file" in refused("select", file, inside, "--k", 3)
    folder = file.parent / "folder.npy"
    folder.mkdir()
    options = ("--k", 3, "--overwrite")
    assert f"cannot write {folder}: Is a directory" in refused("select", file, folder, *options)
    assert list(folder.iterdir()) == []


def test_select_refuses_a_name_that_is_too_long(file):
    name = file.parent / ("n" * 300 + ".npy")
    for arguments in ((name, file), (file, name), (file, name, "--dataset", file.parent)):
        assert "File name too long" in refused("select", *arguments, "--k", 3, "--overwrite")


def test_select_refuses_a_link_to_itself(file):
    loop = file.parent / "loop.npy"
    loop.symlink_to(loop)
    told = refused("select", loop, file, "--k", 3, "--overwrite")
    assert told == f"emp-fast: cannot read {loop}: Too many levels of symbolic links\n"


def test_select_refuses_an_output_of_a_folder_that_takes_no_files(file, monkeypatch):
    opened = Path.open

    def refuse(self, mode, **options):
        if mode == "xb":
            raise PermissionError(13, "Permission denied")
        return opened(self, mode, **options)

    monkeypatch.setattr("pathlib.Path.open", refuse)
    output = file.parent / "kept.npy"
    assert f"cannot write {output}: Permission denied" in refused("select", file, output, "--k", 3)
    assert not output.exists()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1.0, 2.0], [3.0]], "must hold numbers, got dtype object"),
        ([True, False], "must hold numbers, got dtype bool"),
        ([None, None], "holds 2 nulls"),
        ([], "is empty"),
        ([1.0, float("nan")], "holds 1 NaN among 2 scores, the first at 1"),
        ([1.0, None], "holds 1 NaN among 2 scores, the first at 1"),  # so pandas writes NaN
    ],
)
def test_select_refuses_bad_parquet_columns(tmp_path, column, message):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"score": pa.array(column, type=None if column else pa.float32())})
    parquet.write_table(table, tmp_path / "scores.parquet")
    output = tmp_path / "kept.npy"
    assert message in refused("select", tmp_path / "scores.parquet", output, "--k", 1)
    assert not output.exists()


def test_select_refuses_a_folder_of_parquet_files_and_one_without_columns(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "kept.npy"
    (tmp_path / "folder.parquet").mkdir()
    message = refused("select", tmp_path / "folder.parquet", output, "--k", 1)
    assert "folder.parquet" in message
    parquet.write_table(pa.table({}), tmp_path / "none.parquet")
    message = refused("select", tmp_path / "none.parquet", output, "--k", 1)
    assert "has no column 'score'; it has no columns" in message


def test_select_without_pyarrow_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    wanted = (
        "a .parquet file needs pyarrow, which is not installed: pip install 'emp_fast[parquet]'"
    )
    assert wanted in refused("select", file, file.parent / "kept.parquet", "--k", 3)
    assert wanted in refused("select", file.with_suffix(".parquet"), file, "--k", 3, "--overwrite")


def test_select_drops_the_hardest_share_of_a_stratified_selection(tmp_path):
    path, output = tmp_path / "scores.npy", tmp_path / "kept.npy"
    np.save(path, np.arange(100, dtype=np.float32))
    options = ("--policy", "stratified", "--bins", 5, "--cutoff", 0.1)
    run("select", path, output, "--k", 90, *options)
    assert np.load(output).tolist() == list(range(90))


# ---- select of a Hugging Face data set ----------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A folder with a data set of 6 rows, and their scores."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": list("abcdef")}).save_to_disk(tmp_path / "whole")
    np.save(tmp_path / "scores.npy", np.array([3, 9, 1, 8, 2, 7], dtype=np.float32))
    return tmp_path


def test_select_saves_the_kept_part_of_a_data_set(saved):
    datasets = pytest.importorskip("datasets")
    options = ("--k", 3, "--dataset", saved / "whole")
    result = run("select", saved / "scores.npy", saved / "part", *options)
    assert result.stderr == f"kept 3 of 6 samples: {saved / 'part'}\n"
    assert datasets.load_from_disk(saved / "part")["text"][:] == ["b", "d", "f"]
    message = refused("select", saved / "scores.npy", saved / "part", *options)
    assert "part exists already; --overwrite replaces it" in message
    options = ("--policy", "below-mean", "--keep", 0.5, "--dataset", saved / "whole", "--overwrite")
    run("select", saved / "scores.npy", saved / "part", *options)
    part = datasets.load_from_disk(saved / "part")
    assert sorted(part["weight"][:]) == [1.0, 1.0, 1.0, 2.0]
    assert sorted(path.name for path in saved.iterdir()) == ["part", "scores.npy", "whole"]


def test_select_refuses_data_sets_that_do_not_fit(saved, monkeypatch):
    def message(scores, folder):
        told = refused("select", scores, saved / "part", "--k", 1, "--dataset", folder)
        assert not (saved / "part").exists()
        return told

    scores = saved / "scores.npy"
    assert "nowhere is not a data set that was saved to disk" in message(scores, saved / "nowhere")
    assert "not a data set that was saved to disk" in message(scores, scores)
    np.save(saved / "more.npy", np.zeros(7, dtype=np.float32))
    wanted = "must have a sample for each of 7 scores, got 6"
    assert wanted in message(saved / "more.npy", saved / "whole")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'emp_fast[datasets]'" in message(scores, saved / "whole")


def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(emp_fast.FileProblem, match=f"cannot write {path}: No space left on device"):
        write_atomically(path, fail, overwrite=True)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_being_written_has_a_name_of_its_own(tmp_path):
    names = []

    def write(file):
        names.extend(path.name for path in tmp_path.iterdir())

    write_atomically(tmp_path / "kept.npy", write, overwrite=False)
    (name,) = names
    assert re.fullmatch(r"\.kept\.npy\.[0-9a-f]{8}\.tmp", name)  # as docs/resuming.md has it


# ---- demo ---------------------------------------------------------------------------------------


def test_demo_trains_prints_and_draws(tmp_path):
    pytest.importorskip("sklearn")
    output = tmp_path / "new" / "folder"
    result = run("demo", "--quick", "--epochs", 1, "--output", output)
    for label in ("full data", "random", "loss", "EMP", "InfoBatch's rule"):
        assert label in result.stdout
    assert "every method sees 404 samples" in result.stdout
    report = json.loads((output / "digits.json").read_text())
    assert report["figure"] == str(output / "digits.png")
    assert report["budget"] == 404
    assert [method["samples_seen"] for method in report["methods"]] == [404] * 5
    assert (output / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_a_narrow_table_cuts_nothing_off(tmp_path, monkeypatch, small_bench):
    pytest.importorskip("sklearn")
    for command in (small_bench, sys.modules[demo_command.__module__]):
        monkeypatch.setattr(command, "stdout", lambda: Console(width=44))
    for arguments in (("bench", "--quick"), (*DEMO, "--output", tmp_path)):
        text = run(*arguments).stdout
        assert "┃" in text
        assert "…" not in text


def test_demo_json_is_all_of_stdout(tmp_path):
    pytest.importorskip("sklearn")
    options = ("--quick", "--epochs", 1, "--seeds", 1, "--prune-rate", 0.9, "--batch-size", 50)
    methods = ("--methods", "emp, full")
    result = run("demo", *options, *methods, "--output", tmp_path, "--json")
    report = json.loads(result.stdout)
    assert [method["name"] for method in report["methods"]] == ["emp", "full"]
    assert report["budget"] == 135
    assert report["settings"]["batch_size"] == 50
    assert report == json.loads((tmp_path / "digits.json").read_text())


def stop_at_run(monkeypatch, number, error):
    """Makes the demo's run of that number, counted from 1, raise in place of training."""
    module = sys.modules[comparison.__name__]
    train, runs = module.train, []

    def stopping(*arguments):
        runs.append(arguments)
        if len(runs) == number:
            raise error
        return train(*arguments)

    monkeypatch.setattr(module, "train", stopping)


DEMO = ("demo", "--quick", "--epochs", 1, "--seeds", 2, "--methods", "full,loss,emp")


def test_an_interrupted_demo_prints_and_writes_the_finished_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    (tmp_path / "digits.json").write_text("of an earlier, complete comparison")
    stop_at_run(monkeypatch, 5, KeyboardInterrupt())
    result = run(*DEMO, "--output", tmp_path, exit_code=130)
    assert result.stderr.endswith("\nemp-fast: interrupted after 4 of 6 runs\n")
    for label in ("full data", "loss", "EMP"):
        assert f"│ {label}" in result.stdout
    assert "standard deviation over 1 to 2 seeds" in result.stdout
    assert "EMP against" not in result.stdout  # of two runs with one seed
    files = tmp_path / "digits-partial.json", tmp_path / "digits-partial.png"
    assert f"Written: {files[0]}, {files[1]}" in result.stdout
    report = json.loads(files[0].read_text())
    accuracies = {method["name"]: method["accuracies"] for method in report["methods"]}
    assert {name: len(of) for name, of in accuracies.items()} == {"full": 2, "loss": 1, "emp": 1}
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "digits.json").read_text() == "of an earlier, complete comparison"


def test_a_demo_with_a_failing_run_prints_the_finished_ones_and_then_the_error(
    tmp_path, monkeypatch
):
    pytest.importorskip("sklearn")
    stop_at_run(monkeypatch, 3, RuntimeError("out of memory"))
    result = CliRunner().invoke(app, [*map(str, DEMO), "--output", str(tmp_path), "--json"])
    assert str(result.exception) == "out of memory"
    assert result.stderr.endswith("\nemp-fast: stopped after 2 of 6 runs\n")
    assert [method["name"] for method in json.loads(result.stdout)["methods"]] == ["full", "loss"]


def test_a_demo_interrupted_while_it_draws_keeps_the_results(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.Comparison, "figure", interrupted)
    result = run(*DEMO, "--output", tmp_path, exit_code=130)
    assert "│ EMP" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["digits.json"]
    assert json.loads((tmp_path / "digits.json").read_text())["figure"] is None


def test_a_demo_interrupted_in_its_first_run_prints_only_that(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    stop_at_run(monkeypatch, 1, KeyboardInterrupt())
    result = run(*DEMO, "--output", tmp_path, exit_code=130)
    assert result.stdout == ""
    assert result.stderr.endswith("\nemp-fast: interrupted after 0 of 6 runs\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".json", ".png"])
def test_demo_refuses_results_that_cannot_be_written_before_it_trains(tmp_path, suffix):
    pytest.importorskip("sklearn")
    path = tmp_path / f"digits{suffix}"
    path.mkdir()
    told = refused(*DEMO, "--output", tmp_path)
    assert told == f"emp-fast: cannot write {path}: Is a directory\n"


def test_demo_prints_results_that_can_no_longer_be_written(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")

    def full(path, write, *, overwrite):
        raise emp_fast.FileProblem(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(sys.modules[demo_command.__module__], "write_atomically", full)
    result = run(*DEMO, "--output", tmp_path, exit_code=2)
    assert "│ EMP" in result.stdout
    assert "Written" not in result.stdout
    path = tmp_path / "digits.json"
    assert result.stderr.endswith(f"\nemp-fast: cannot write {path}: No space left on device\n")


def test_demo_without_matplotlib_says_so(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ("--quick", "--epochs", 1, "--seeds", 1, "--methods", "full")
    result = run("demo", *options, "--output", tmp_path)
    assert "No plot: a plot needs matplotlib" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["digits.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "imagenet"), "--data must be one of digits, fashion-mnist, cifar10, cifar100"),
        (("--data", "cifar10"), "cifar10 needs --root"),
        (("--data", "cifar10", "--root", "nowhere"), "no file nowhere/data_batch_1"),
        (("--data", "fashion-mnist", "--root", "nowhere"), "no folder nowhere"),
        (("--root", "here"), "take no root"),
        (("--methods", "emp,best"), "--methods must be of full, random, loss, emp, infobatch"),
        (("--methods", ""), "got ''"),
        (("--prune-rate", "1"), "--prune-rate must lie in [0, 1), got 1"),
        (("--prune-rate", "-0.1"), "--prune-rate must lie in [0, 1), got -0.1"),
        (("--prune-rate", "nan"), "--prune-rate must lie in [0, 1), got nan"),
        (("--prune-rate", "0.9999"), "must leave at least one of 1348 samples"),
        (("--device", "gpu"), "--device 'gpu' cannot be used"),
        (("--device", "cuda:99"), "--device 'cuda:99' cannot be used"),
        (("--device", "meta"), "--device must be cpu or cuda, got 'meta'"),
        (("--batch-size", "0"), "'--batch-size'"),
        (("--batch-size", 10**30), "--batch-size must be at most 1348, the number of training"),
    ],
)
def test_demo_refuses_bad_options(tmp_path, options, message):
    pytest.importorskip("sklearn")
    assert message in refused("demo", "--output", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_demo_refuses_a_folder_that_cannot_be_made(tmp_path):
    pytest.importorskip("sklearn")
    (tmp_path / "file").write_text("")
    message = refused("demo", "--quick", "--output", tmp_path / "file" / "out")
    assert "cannot make the folder" in message
    assert "cannot make the folder" in refused("demo", "--quick", "--output", tmp_path / "file")


def test_demo_states_no_winner_that_the_seeds_do_not_show():
    module = sys.modules[demo_command.__module__]

    def summary(name, accuracies):
        values = dict.fromkeys(module.Summary._fields)
        mean = sum(accuracies) / len(accuracies)
        values |= {"name": name, "label": name, "accuracies": accuracies, "accuracy_mean": mean}
        return module.Summary(**values)

    worse = module._verdict([summary("loss", [0.9, 0.91]), summary("emp", [0.8, 0.81])])
    assert worse == (
        "EMP against loss, the best of the others here: -10.00 ± 0.00 points "
        "(mean ± standard error over seeds)."
    )
    stopped = module._verdict([summary("loss", [0.9, 0.91, 0.1]), summary("emp", [0.8, 0.81])])
    assert stopped == worse  # the third seed has run with one of them alone
    unclear = module._verdict([summary("loss", [0.9, 0.8]), summary("emp", [0.8, 0.91])])
    assert unclear.endswith("no clear difference.")
    assert module._verdict([summary("loss", [0.9]), summary("emp", [0.8])]) is None


# ---- bench --------------------------------------------------------------------------------------


@pytest.fixture
def small_bench(monkeypatch):
    module = sys.modules[bench.__module__]
    monkeypatch.setattr(module, "benchmark_shapes", lambda device: ((7, 10), (3, 33)))
    monkeypatch.setattr(module, "_SELECTION", (501,))
    monkeypatch.setattr(module, "_UPDATE", (17,))
    monkeypatch.setattr(module, "_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(module, "_QUICK_SECONDS", 0.01)
    return module


def test_bench_measures_against_plain_torch(small_bench):
    report = json.loads(run("bench", "--quick", "--json").stdout)
    names = [line["case"] for line in report["cases"]]
    assert names == [
        "scores 7 x 10",
        "scores + gradient 7 x 10",
        "scores 3 x 33",
        "scores + gradient 3 x 33",
        "update 17 samples",
        "select 30% of 501",
    ]
    for line in report["cases"]:
        assert line["problem"] is None
        times = line["microseconds"]
        for name, ratio in line["times_faster_than"].items():
            assert ratio == pytest.approx(times[name] / times["emp_fast"])
        assert set(times) == {"emp_fast", *line["times_faster_than"]}
        assert "eager" in times or "torch.topk" in times
        for name, (low, high) in line["microseconds_p20_p80"].items():
            assert 0 < low <= times[name] <= high
        assert line["share_of_copy_bandwidth"] > 0
        assert line["not_measured"] == {}
    assert "too short and too small to be a result" in run("bench", "--quick").stdout


def test_bench_times_nothing_that_is_wrong(small_bench, monkeypatch):
    right = small_bench.cross_entropy

    def wrong(*arguments):
        stats = right(*arguments)
        return stats._replace(el2n=stats.el2n + 1e-3, loss=stats.loss * 1.01)

    monkeypatch.setattr(small_bench, "cross_entropy", wrong)
    monkeypatch.setattr(
        small_bench, "topk_indices", lambda scores, k: torch.arange(k), raising=True
    )
    report = json.loads(run("bench", "--quick", "--json", exit_code=1).stdout)
    problems = {line["case"]: line["problem"] for line in report["cases"]}
    differs = "emp_fast differs from the reference in"
    assert problems["scores 7 x 10"].startswith(f"{differs} loss of forward 7 x 10")
    assert problems["scores + gradient 7 x 10"].startswith(f"{differs} loss of forward + backward")
    assert problems["select 30% of 501"].startswith(f"{differs} indices of selection")
    assert all("microseconds" not in line for line in report["cases"] if line["problem"])
    assert "wrong" in run("bench", "--quick", exit_code=1).stdout


@pytest.mark.parametrize("finished", [0, 2])
def test_an_interrupted_bench_prints_what_was_measured(small_bench, monkeypatch, finished):
    measured, cases = small_bench._measured, []

    def interrupted(contest, *arguments):
        cases.append(contest)
        if len(cases) > finished:
            raise KeyboardInterrupt
        return measured(contest, *arguments)

    monkeypatch.setattr(small_bench, "_measured", interrupted)
    result = run("bench", "--quick", "--json", exit_code=130)
    assert result.stderr.endswith(f"emp-fast: interrupted after {finished} of 6 cases\n")
    names = [line["case"] for line in json.loads(result.stdout)["cases"]] if finished else []
    assert names == ["scores 7 x 10", "scores + gradient 7 x 10"][:finished]
    assert bool(result.stdout) == bool(finished)


def test_bench_refuses_a_device_that_is_not_there():
    assert "cannot be used" in refused("bench", "--device", "cuda:99")
