"""`score_dataset`: whatever the loader and the model, resumed, on one rank and on several."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections import UserDict
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from typer.testing import CliRunner

import emp_fast
from emp_fast import EmpFastWarning, FileProblem, Pruner, SampleStats, ScoreStore, with_indices
from emp_fast.batches import nested_to_device
from emp_fast.cli import app
from emp_fast.functional import cross_entropy
from emp_fast.rules import AUM, EMP, RHO, DynUnc, GraNd, Loss
from emp_fast.single_visit import single_visit_scores
from emp_fast.static import score_dataset
from emp_fast.tally import Tally

N, FEATURES, CLASSES = 53, 6, 4


def make_data(n: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, FEATURES, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (n,), generator=generator))


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    )


def make_loader(n: int = N, **options) -> DataLoader:
    return DataLoader(with_indices(make_data(n)), **{"batch_size": 8, **options})


def wanted_stats(model: nn.Module, data: TensorDataset) -> SampleStats:
    """All samples in one batch."""
    modes = [module.training for module in model.modules()]
    model.eval()
    with torch.no_grad():
        stats = cross_entropy(model(data.tensors[0]), data.tensors[1])
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return stats


def assert_close(got: SampleStats, wanted: SampleStats) -> None:
    for name, value in wanted._asdict().items():
        torch.testing.assert_close(getattr(got, name), value, rtol=1e-5, atol=1e-6, msg=name)


def quiet(model, loader, **options) -> SampleStats:
    return score_dataset(model, loader, **{"progress": False, **options})


# ---- what is scored -----------------------------------------------------------------------------


def test_every_sample_is_scored_as_in_one_batch():
    model, data = make_model(), make_data()
    assert_close(quiet(model, make_loader()), wanted_stats(model, data))


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"drop_last": True},
        {"num_workers": 2},
        {"sampler": DistributedSampler(range(N), num_replicas=2, rank=1)},
        {"sampler": Subset(range(N), [3, 1])},
    ],
    ids=["shuffled", "drop_last", "workers", "sharded", "partial"],
)
def test_the_loaders_own_sampler_changes_nothing(options):
    model = make_model()
    plain = quiet(model, make_loader())
    other = quiet(model, make_loader(**options))
    assert all(torch.equal(*pair) for pair in zip(plain, other, strict=True))


def test_a_pruners_loader_can_be_given_and_stays_where_it_is():
    pruner = Pruner(N, 0.5)
    loader = make_loader(sampler=pruner.sampler)
    before = pruner.state_dict()["epoch"], pruner.epoch, len(loader)
    assert_close(quiet(make_model(), loader), wanted_stats(make_model(), make_data()))
    assert (pruner.state_dict()["epoch"], pruner.epoch, len(loader)) == before
    assert pruner.store.rows_seen == 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: SimpleNamespace(logits=logits, loss=None),
        lambda logits: {"logits": logits, "loss": logits.mean()},
        lambda logits: UserDict(logits=logits),
        lambda logits: (logits, "hidden"),
        lambda logits: [logits],
    ],
    ids=["tensor", "attribute", "dict", "mapping", "tuple", "list"],
)
def test_logits_in_whatever_the_model_returns(wrap):
    inner = make_model().eval()
    got = quiet(lambda x: wrap(inner(x)), make_loader())
    assert_close(got, wanted_stats(inner, make_data()))


@pytest.mark.parametrize("target", ["labels", "label", "targets", "target"])
def test_mappings_go_to_the_model_by_name(target):
    data = make_data()

    class Mappings(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            return {"scale": 2.0, target: data[i][1], "x": data[i][0]}

    inner = make_model().eval()
    loader = DataLoader(with_indices(Mappings()), batch_size=8)
    got = quiet(lambda *, x, scale: inner(x * scale.float()[:, None] / 2), loader)
    assert_close(got, wanted_stats(inner, data))


def test_several_inputs_go_to_the_model_in_order():
    x, y = make_data().tensors
    loader = DataLoader(with_indices(TensorDataset(x, 2 * x, y)), batch_size=8)
    inner = make_model().eval()
    assert_close(quiet(lambda a, b: inner(b - a), loader), wanted_stats(inner, make_data()))


def test_a_rule_that_tells_nothing_of_one_visit_is_told(tmp_path):
    with pytest.warns(EmpFastWarning, match=r"all \d+ scores are 0.0.*DynUnc\(window=10\) tells"):
        quiet(make_model(), make_loader(), rule=DynUnc(), output=tmp_path / "scores.npy")


def test_options_of_the_loss():
    model, (x, y) = make_model().eval(), make_data().tensors
    options = {"weight": torch.rand(CLASSES), "label_smoothing": 0.1, "softcap": 3.0}
    with torch.no_grad():
        assert_close(quiet(model, make_loader(), **options), cross_entropy(model(x), y, **options))


def test_causal_language_models_are_scored_against_the_next_token():
    tokens = torch.randint(7, (5, 6), generator=torch.Generator().manual_seed(2))
    labels = tokens.clone()
    labels[:, :2] = -100  # the prompt
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    loader = DataLoader(with_indices(data), batch_size=2)
    got = quiet(lambda input_ids: table[input_ids], loader, shift_labels=True)
    for i in range(5):
        pairs = [(t, t + 1) for t in range(5) if t + 1 >= 2]
        losses = [-torch.log_softmax(table[tokens[i, a]], 0)[tokens[i, b]].item() for a, b in pairs]
        assert got.loss[i].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert got.count[i] == len(losses)
    with pytest.raises(ValueError, match=r"shift_labels needs labels \[S, T\]"):
        quiet(make_model(), make_loader(), shift_labels=True)


def test_a_causal_language_model_must_say_what_its_labels_are():
    class TinyForCausalLM(nn.Embedding):
        def forward(self, input_ids):
            return super().forward(input_ids)

    model = TinyForCausalLM(7, 7)
    data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 3
    loader = DataLoader(with_indices(data), batch_size=2)
    for whole in (model, torch.compile(model), nn.Sequential(model)):
        with pytest.raises(ValueError, match="shift_labels must be given for TinyForCausalLM"):
            quiet(whole, loader)
    assert quiet(model, loader, shift_labels=True).count.tolist() == [3] * 3
    assert quiet(model, loader, shift_labels=False).count.tolist() == [4] * 3


def test_correct_may_be_integers_in_the_stats_of_score_batch():
    right = torch.arange(N) % 2

    def score(model, batch):
        (x, y), indices = batch
        return indices, cross_entropy(model(x), y)._replace(correct=right[indices])

    stats = quiet(make_model(), make_loader(), score_batch=score)
    assert stats.correct.tolist() == right.bool().tolist()


def test_any_other_batch_through_score_batch():
    model, data = make_model().eval(), make_data()

    def score(given, batch):
        assert given is model
        (x, y), indices = batch
        return indices, cross_entropy(given(x), y)

    assert_close(quiet(model, make_loader(), score_batch=score), wanted_stats(model, data))


def test_any_iterable_of_batches_with_repeats():
    model, (x, y) = make_model(), make_data().tensors
    order = [*range(20, N), *range(30), 7, 7]
    batches = [((x[part], y[part]), torch.tensor(part)) for part in (order[:31], order[31:])]
    for loader in (batches, iter(batches)):
        assert_close(quiet(model, loader, num_samples=N), wanted_stats(model, make_data()))


def test_a_batch_sampler_of_the_users_is_followed():
    sampler = BatchSampler(SequentialSampler(range(N)), batch_size=9, drop_last=False)
    loader = DataLoader(with_indices(make_data()), batch_sampler=sampler)
    assert_close(quiet(make_model(), loader), wanted_stats(make_model(), make_data()))


def test_a_loader_that_accelerate_has_prepared():
    accelerate = pytest.importorskip("accelerate")
    model, loader = accelerate.Accelerator(cpu=True).prepare(make_model(), make_loader())
    assert_close(quiet(model, loader), wanted_stats(make_model(), make_data()))


def test_the_stats_are_means_over_the_passes():
    class Noisy(Dataset):
        """Sample i shows another target each time that it is fetched."""

        def __init__(self):
            self.fetched = [0] * 3

        def __len__(self):
            return 3

        def __getitem__(self, i):
            self.fetched[i] += 1
            return torch.zeros(1), [0, 1, -100][(self.fetched[i] - 1) % 3]

    data = Noisy()
    logits = torch.tensor([[2.0, 0.0]])
    loader = DataLoader(with_indices(data), batch_size=2)
    got = quiet(lambda x: logits.expand(len(x), 2), loader, passes=3)
    assert data.fetched == [3, 3, 3]
    losses = [math.log1p(math.exp(-2)), 2 + math.log1p(math.exp(-2))]
    assert got.loss.tolist() == pytest.approx([sum(losses) / 2] * 3)  # the ignored visit is out
    assert got.margin.tolist() == [0.0] * 3
    assert got.count.tolist() == [2] * 3
    assert got.correct.tolist() == [False] * 3


# ---- what is left as it was ---------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_and_random_states_are_as_before(fails):
    model = make_model().train()
    model[1].eval()  # a frozen layer
    running = model[1].running_mean.clone()
    seen = {}

    def hook(module, inputs, output):
        seen["training"] = module.training
        seen["grad"] = torch.is_grad_enabled()
        if fails:
            raise RuntimeError("out of memory")

    model[3].register_forward_hook(hook)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory") if fails else contextlib.nullcontext():
        quiet(model, make_loader(shuffle=True))
    assert seen == {"training": False, "grad": False}
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert torch.is_grad_enabled()
    assert torch.equal(model[1].running_mean, running)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_is_the_callers():
    dtypes = set()
    model = nn.Linear(FEATURES, CLASSES)
    model.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    quiet(model, make_loader())
    assert dtypes == {torch.float32}
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        stats = quiet(model, make_loader())
    assert dtypes == {torch.bfloat16}
    assert stats.loss.dtype == torch.float32


# ---- files --------------------------------------------------------------------------------------


def test_the_parquet_file_is_what_select_reads(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "scores.parquet"
    stats = quiet(make_model(), make_loader(), output=output, rule=EMP(beta=0.5))
    table = parquet.read_table(output)
    assert table.column_names == ["score", *SampleStats._fields]
    for name in SampleStats._fields:
        assert table[name].to_numpy().tolist() == getattr(stats, name).tolist()
    score = stats.loss + 0.5 * stats.entropy
    assert table["score"].to_numpy().tolist() == score.tolist()
    result = CliRunner().invoke(app, ["select", str(output), f"{tmp_path}/kept.npy", "--k", "11"])
    assert result.exit_code == 0, result.output
    kept = np.load(tmp_path / "kept.npy")
    assert kept.tolist() == score.topk(11).indices.sort().values.tolist()
    # The same without the files.
    store = ScoreStore(N, EMP(beta=0.5))
    store.update(torch.arange(N), stats)
    assert kept.tolist() == store.select(11).indices.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.npy", "scores.parquet"]


def test_the_npy_file_is_the_score_alone(tmp_path):
    stats = quiet(make_model(), make_loader(), output=str(tmp_path / "scores.npy"), rule=AUM())
    scores = np.load(tmp_path / "scores.npy")
    assert scores.dtype == np.float32
    assert scores.tolist() == (-stats.margin).tolist()


def test_chosen_stats_alone(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "scores.parquet"
    quiet(make_model(), make_loader(), output=output, stats=("el2n", "correct"))
    assert parquet.read_table(output).column_names == ["score", "el2n", "correct"]


def test_samples_without_a_score_are_nan_and_told(tmp_path):
    x, y = make_data().tensors
    x, y = x.clone(), y.clone()
    x[5], y[9] = torch.nan, -100
    loader = DataLoader(with_indices(TensorDataset(x, y)), batch_size=8)
    with pytest.warns(EmpFastWarning, match="2 of 53 samples have no score, the first of them 5"):
        stats = quiet(make_model(), loader, output=tmp_path / "scores.npy")
    scores = np.load(tmp_path / "scores.npy")
    assert np.flatnonzero(np.isnan(scores)).tolist() == [5, 9]
    assert stats.count.tolist() == [0 if i == 9 else 1 for i in range(N)]


def test_a_partial_result_in_no_folder_is_refused_before_any_work(tmp_path):
    with pytest.raises(FileProblem, match=r"cannot write .*nowhere/part: No such file"):
        quiet(Counting(0), make_loader(), partial=tmp_path / "nowhere" / "part")


def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path):
    def model(x):
        raise AssertionError("was called")

    (tmp_path / "scores.npy").write_bytes(b"precious")
    with pytest.raises(FileProblem, match=r"scores\.npy exists already"):
        quiet(model, make_loader(), output=tmp_path / "scores.npy")
    with pytest.raises(FileProblem, match=r"must end in \.npy, \.parquet, got .*scores\.txt"):
        quiet(model, make_loader(), output=tmp_path / "scores.txt")
    with pytest.raises(FileProblem, match="No such file"):
        quiet(model, make_loader(), output=tmp_path / "nowhere" / "scores.npy")
    with pytest.raises(FileProblem, match="File name too long"):
        quiet(model, make_loader(), output=tmp_path / f"{'s' * 300}.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npy"]
    quiet(make_model(), make_loader(), output=tmp_path / "scores.npy", overwrite=True)
    assert np.load(tmp_path / "scores.npy").shape == (N,)


# ---- interruption -------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class Counting(nn.Module):
    """Counts the samples that it is called for; fails at one call."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.inner = make_model().eval()
        self.calls, self.samples, self.fails_at = 0, 0, fails_at

    def forward(self, x):
        if self.calls == self.fails_at:
            raise Interrupted
        self.calls += 1
        self.samples += len(x)
        return self.inner(x)


@pytest.mark.parametrize("fails_at", [0, 3, 6, 7, 9])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, fails_at):
    whole = quiet(Counting(), make_loader(), passes=2)
    output = tmp_path / "scores.npy"
    options = {"output": output, "passes": 2}
    with pytest.raises(Interrupted):
        quiet(Counting(fails_at), make_loader(), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npy.partial"]
    rest = Counting()
    resumed = quiet(rest, make_loader(), **options)
    assert rest.calls == 2 * math.ceil(N / 8) - fails_at
    assert all(torch.equal(*pair) for pair in zip(whole, resumed, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npy"]


def test_an_error_while_a_batch_is_added_does_not_count_its_samples(tmp_path):
    output = tmp_path / "scores.npy"

    def spoiled(model, batch):
        (x, y), indices = batch
        stats = cross_entropy(model(x), y)
        return indices, stats._replace(correct=None) if 16 in indices else stats

    with pytest.raises(TypeError, match=r"correct of the stats that .* got NoneType"):
        quiet(make_model(), make_loader(), output=output, score_batch=spoiled)
    partial = tmp_path / "scores.npy.partial"
    assert torch.load(partial, weights_only=True)["done"].tolist() == 16 * [1] + (N - 16) * [0]


def test_an_interrupt_while_a_batch_is_added_saves_nothing_of_it(tmp_path, monkeypatch):
    output = tmp_path / "scores.npy"

    class Stopping(torch.Tensor):
        def __setitem__(self, at, values):
            raise KeyboardInterrupt

    def stopped(model, batch):
        (x, y), indices = batch
        if 16 in indices:
            tally = tallies[0]
            tally._tensors["count"] = tally._tensors["count"].as_subclass(Stopping)
        return indices, cross_entropy(model(x), y)

    tallies = []
    init = Tally.__init__
    monkeypatch.setattr(
        Tally, "__init__", lambda self, *given: (init(self, *given), tallies.append(self))[0]
    )
    with pytest.raises(KeyboardInterrupt):
        quiet(make_model(), make_loader(), output=output, score_batch=stopped, save_every=0)
    partial = torch.load(tmp_path / "scores.npy.partial", weights_only=True)
    assert partial["done"].tolist() == 16 * [1] + (N - 16) * [0]
    assert int(partial["tensors"]["visits"].sum()) == 16


def test_batches_keep_their_types():
    class Pair(NamedTuple):
        x: torch.Tensor
        y: torch.Tensor

    class Encoded(UserDict):
        """As transformers' BatchEncoding: a mapping with more than its entries."""

        encodings = None

    given = {"pair": Pair(torch.ones(2), torch.zeros(2)), "encoded": Encoded(x=torch.ones(1))}
    given["encoded"].encodings = "kept"
    got = nested_to_device(given, torch.device("meta"))
    assert type(got["pair"]) is Pair
    assert got["pair"].x.is_meta
    assert type(got["encoded"]) is Encoded
    assert got["encoded"].encodings == "kept"
    assert got["encoded"]["x"].is_meta
    assert not given["encoded"]["x"].is_meta

    class Output(UserDict):
        """As transformers' ModelOutput, which refuses this."""

        def update(self, *_, **__):
            raise TypeError("no update")

    class Listed(list):
        def __init__(self, first, second):
            super().__init__([first, second])

    output = Output()
    output["x"] = torch.ones(1)
    assert nested_to_device(output, torch.device("meta"))["x"].is_meta
    listed = Listed(torch.ones(1), torch.ones(1))
    assert [x.is_meta for x in nested_to_device(listed, torch.device("meta"))]
    read_only = MappingProxyType({"x": torch.zeros(1)})
    assert nested_to_device(read_only, torch.device("meta"))["x"].is_meta
    assert type(nested_to_device((torch.ones(1),), torch.device("meta"))) is tuple
    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    assert torch.equal(nested_to_device(packed, torch.device("cpu")).data, packed.data)


def test_a_run_goes_on_with_another_batch_size_and_any_iterable(tmp_path):
    options = {"output": tmp_path / "scores.npy", "num_samples": N}
    with pytest.raises(Interrupted):
        quiet(Counting(3), make_loader(), **options)
    with pytest.raises(Interrupted):
        quiet(Counting(1), make_loader(batch_size=5), **options)
    rest = Counting()
    stats = quiet(rest, list(make_loader(batch_size=10)), **options)
    assert_close(stats, wanted_stats(rest.inner, make_data()))


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL leaves no time to save: what the last partial result has is there."""
    code = f"""
        import os, signal, sys
        sys.path[:0] = {[str(Path(__file__).parent)]!r}
        from test_static import Counting, make_loader, quiet

        class Dying(Counting):
            def forward(self, x):
                if self.calls == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().forward(x)

        quiet(Dying(), make_loader(), output={str(tmp_path / "scores.npy")!r}, save_every=0)
    """
    root = str(Path(emp_fast.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    died = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, check=False, timeout=300
    )
    assert died.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npy.partial"]
    rest = Counting()
    stats = quiet(rest, make_loader(), output=tmp_path / "scores.npy")
    assert rest.calls == math.ceil(N / 8) - 4
    assert_close(stats, wanted_stats(rest.inner, make_data()))


def test_a_partial_result_of_another_run_is_refused(tmp_path):
    output = tmp_path / "scores.npy"
    partial = tmp_path / "scores.npy.partial"
    with pytest.raises(Interrupted):
        quiet(Counting(3), make_loader(), output=output)
    kept = partial.read_bytes()
    trained = Counting()
    with torch.no_grad():
        next(trained.parameters())[0, 0] += 1e-6
    with pytest.raises(FileProblem, match="of a run of another model; delete it"):
        quiet(trained, make_loader(), output=output)
    with pytest.raises(FileProblem, match="of a run of another num_samples; delete it"):
        quiet(Counting(), make_loader(20), output=output)
    with pytest.raises(FileProblem, match="of a run of another passes and scoring; delete it"):
        quiet(Counting(), make_loader(), output=output, passes=2, softcap=2.0)
    assert partial.read_bytes() == kept
    for content in (kept[:-40], b"foreign", b""):
        partial.write_bytes(content)
        with pytest.raises(FileProblem, match="not a sound partial result; delete it"):
            quiet(Counting(), make_loader(), output=output)
        assert partial.read_bytes() == content
    torch.save({"model": {}}, partial)
    with pytest.raises(FileProblem, match="not a sound partial result; delete it"):
        quiet(Counting(), make_loader(), output=output)


def test_a_partial_result_with_a_changed_bit_is_refused(tmp_path):
    """In an array, where every value is possible: only the checksum tells."""
    output, partial = tmp_path / "scores.npy", tmp_path / "scores.npy.partial"
    with pytest.raises(Interrupted):
        quiet(Counting(3), make_loader(), output=output)
    damaged = bytearray(partial.read_bytes())
    with zipfile.ZipFile(partial) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data/1"))
        at = damaged.index(archive.read(entry), entry.header_offset)
    damaged[at + 1] ^= 1
    partial.write_bytes(damaged)
    with pytest.raises(FileProblem, match=r"not a sound partial result; delete it.*data/1"):
        quiet(Counting(), make_loader(), output=output)
    assert partial.read_bytes() == damaged


def test_a_partial_result_has_checksums_even_if_torch_makes_none(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        with pytest.raises(Interrupted):
            quiet(Counting(3), make_loader(), output=tmp_path / "scores.npy")
    finally:
        torch.serialization.set_crc32_options(True)
    rest = Counting()
    quiet(rest, make_loader(), output=tmp_path / "scores.npy")
    assert rest.calls == math.ceil(N / 8) - 3


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_partial_result_that_cannot_be_written_is_warned_of_once(tmp_path, monkeypatch):
    monkeypatch.setattr("emp_fast.archives.torch.save", full)
    output = tmp_path / "scores.npy"
    model = Counting()
    with pytest.warns(EmpFastWarning, match="no partial result was saved.*No space left") as told:
        stats = quiet(model, make_loader(), output=output, save_every=0)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert_close(stats, wanted_stats(model.inner, make_data()))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npy"]


def test_a_partial_result_is_saved_again_when_there_is_room(tmp_path, monkeypatch):
    class Freeing(Counting):
        def forward(self, x):
            if self.calls == 2:
                monkeypatch.undo()
            return super().forward(x)

    monkeypatch.setattr("emp_fast.archives.torch.save", full)
    options = {"output": tmp_path / "scores.npy", "save_every": 0}
    with (
        pytest.warns(EmpFastWarning, match="no partial result was saved"),
        pytest.raises(Interrupted),
    ):
        quiet(Freeing(4), make_loader(), **options)
    rest = Counting()
    quiet(rest, make_loader(), **options)
    assert rest.calls == math.ceil(N / 8) - 4


def test_a_partial_result_that_cannot_be_removed_is_warned_of(tmp_path, monkeypatch):
    def fixed(self, missing_ok=False):
        if self.name.endswith(".partial"):
            raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", fixed)
    with pytest.warns(EmpFastWarning, match=r"cannot remove .*\.partial, .*: Read-only") as told:
        quiet(make_model(), make_loader(), output=tmp_path / "scores.npy")
    assert len(told) == 1
    assert np.load(tmp_path / "scores.npy").shape == (N,)


def test_a_partial_result_whose_name_cannot_be_stops_nothing(tmp_path):
    with pytest.warns(EmpFastWarning, match="File name too long") as told:
        quiet(make_model(), make_loader(), partial=tmp_path / ("p" * 300))
    assert len(told) == 1


DAMAGE = {
    "no format": lambda state: state.pop("format"),
    "no counts": lambda state: state.pop("done"),
    "counts of another length": lambda state: state.update(done=state["done"][:1]),
    "counts of another kind": lambda state: state.update(done=state["done"].float()),
    "no array": lambda state: state["tensors"].pop("wrong"),
    "no arrays": lambda state: state.update(tensors=None),
    "an array that is none": lambda state: state["tensors"].update(sums=[1.0]),
    "an array of another shape": lambda state: state["tensors"].update(visits=torch.ones(3).int()),
    "an array that would broadcast": lambda state: state["tensors"].update(wrong=torch.tensor(7)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_partial_result_is_refused_and_nothing_is_taken_from_it(damage, tmp_path):
    facts = {"model": "a"}
    tally = Tally(4, torch.device("cpu"))
    stats = cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))
    tally.add(torch.tensor([1, 3]), stats, 0)
    tally.save(tmp_path / "partial", facts)
    whole = torch.load(tmp_path / "partial", weights_only=True)
    fresh = Tally(4, torch.device("cpu"))
    fresh.load(tmp_path / "partial", facts)
    assert_close(fresh.means(), tally.means())

    damage(whole)
    torch.save(whole, tmp_path / "partial")
    fresh = Tally(4, torch.device("cpu"))
    with pytest.raises(FileProblem, match="not a sound partial result; delete it"):
        fresh.load(tmp_path / "partial", facts)
    assert fresh.done.sum() == 0
    assert_close(fresh.means(), Tally(4, torch.device("cpu")).means())


def test_an_output_that_fails_at_the_end_keeps_the_partial_result(tmp_path, monkeypatch):
    monkeypatch.setattr("emp_fast.files._write_npy", full)
    output = tmp_path / "scores.npy"
    with pytest.raises(FileProblem, match="No space left"):
        quiet(Counting(), make_loader(), output=output)
    monkeypatch.undo()
    rest = Counting()
    quiet(rest, make_loader(), output=output)
    assert rest.calls == 0
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npy"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "held",
    [
        lambda dense: dense.to_sparse(),
        lambda dense: dense.to_sparse_csr(),
        lambda dense: dense.to_sparse_csc(),
        lambda dense: dense.to_mkldnn(),
        lambda dense: torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        lambda dense: torch.complex(dense, dense).conj(),
        lambda dense: (torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8), None),
    ],
    ids=["coo", "csr", "csc", "mkldnn", "quantised", "conj", "packed"],
)
def test_weights_of_any_layout_tell_models_apart(held, tmp_path):
    class Holding(Counting):
        def __init__(self, dense: torch.Tensor, fails_at: int | None = None) -> None:
            super().__init__(fails_at)
            self.held = held(dense)

        def get_extra_state(self):
            return self.held

        def set_extra_state(self, state):
            raise AssertionError

    output, dense = tmp_path / "scores.npy", torch.eye(3)
    with pytest.raises(Interrupted):
        quiet(Holding(dense, 2), make_loader(), output=output)
    with pytest.raises(FileProblem, match="of a run of another model"):
        quiet(Holding(dense + torch.eye(3)[:, [1, 2, 0]]), make_loader(), output=output)
    rest = Holding(dense)
    quiet(rest, make_loader(), output=output)
    assert rest.calls == math.ceil(N / 8) - 2


# ---- ranks --------------------------------------------------------------------------------------


def scores_are_those_of_one_process(rank: int, size: int, folder: str):
    parts = Path(folder)
    shares = Counting()
    stats = quiet(shares, make_loader(), output=parts / "scores.npy")
    assert shares.calls == math.ceil(math.ceil(N / 8) / size)  # the same on every rank
    return [value.tolist() for value in stats]


def ranks_go_on_from_each_others_parts(rank: int, size: int, folder: str):
    """Where batches are fewer than ranks, some repeat one: all call the model as often."""
    parts = Path(folder)
    with contextlib.suppress(Interrupted):
        quiet(Counting(1), make_loader(), partial=parts / "partial", process_group=None)
    torch.distributed.barrier()
    names = sorted(path.name for path in parts.glob("partial*"))
    assert names == [f"partial.{r}-of-{size}" for r in range(size)]
    rest = Counting()
    stats = quiet(rest, make_loader(), partial=parts / "partial")
    assert rest.calls == math.ceil((math.ceil(N / 8) - size) / size)
    torch.distributed.barrier()
    assert not list(parts.glob("partial*"))
    return [value.tolist() for value in stats]


def several_passes_go_on_after_ranks_failed_apart(rank: int, size: int, folder: str):
    """What is left of the first pass has other batches on a rank than the second pass."""
    options = {"output": Path(folder) / "passes.npy", "passes": 2}
    whole = quiet(Counting(), make_loader(), passes=2)
    with pytest.raises((Interrupted, RuntimeError)):
        quiet(Counting(1 if rank == 0 else 2), make_loader(), **options)
    rest = quiet(Counting(), make_loader(), **options)
    assert all(torch.equal(*pair) for pair in zip(whole, rest, strict=True))


def a_sharded_model_goes_on(rank: int, size: int, folder: str):
    """Its digest is of the whole weights: every rank reads the files of all others."""
    options = {"output": Path(folder) / "sharded.npy"}
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    whole = quiet(model, make_loader())
    calls = 0

    def score_batch(model, batch):
        nonlocal calls
        calls += 1
        if calls == 2:  # on all ranks: the model's layers communicate
            raise Interrupted
        (x, y), indices = batch
        return indices, cross_entropy(model(x), y)

    with pytest.raises(Interrupted):
        quiet(model, make_loader(), score_batch=score_batch, **options)
    torch.distributed.barrier()
    assert len(list(Path(folder).glob("sharded.npy.partial*"))) == size
    rest = quiet(model, make_loader(), score_batch=score_batch, **options)
    assert calls - 2 == math.ceil((math.ceil(N / 8) - size) / size)
    assert all(torch.equal(*pair) for pair in zip(whole, rest, strict=True))


def a_run_of_ranks_dies(rank: int, size: int, folder: str):
    with contextlib.suppress(Interrupted):
        quiet(Counting(2), make_loader(), output=Path(folder) / "left.npy")


def a_loader_that_leaves_samples_out_is_refused_everywhere(rank: int, size: int, folder: str):
    batches = list(make_loader())[rank:-size:size]
    with pytest.raises(ValueError, match="must deliver each of 53 samples, but"):
        quiet(make_model(), batches, num_samples=N)


def an_output_refused_on_one_rank_is_refused_on_all(rank: int, size: int, folder: str):
    told = "" if rank == 0 else "the arguments: rank 0 raised this.*"
    with pytest.raises(FileProblem, match=rf"{told}scores\.npy exists already"):
        quiet(make_model(), make_loader(), output=Path(folder) / "scores.npy")


def a_folder_that_one_rank_lacks_is_refused_on_all(rank: int, size: int, folder: str):
    """As on a second host: there the rank's own partial result would have no place."""
    output = Path(folder) / ("" if rank == 0 else "elsewhere") / "lacking.npy"
    told = "the arguments: rank 1 raised this.*" if rank == 0 else ""
    with pytest.raises(FileProblem, match=rf"{told}cannot write .*lacking\.npy\.partial: No such"):
        quiet(Counting(0), make_loader(), output=output)


def an_error_of_one_rank_is_one_of_all(rank: int, size: int, folder: str):
    """All are told, and none waits for the group's time to be out."""

    def raised_by(who: int, own: type[Exception], others: type[Exception], message: str):
        if rank == who:
            return pytest.raises(own, match=message)
        return pytest.raises(others, match=f"rank {who} raised this.*{message}")

    with raised_by(1, Interrupted, RuntimeError, ""):
        quiet(Counting(1 if rank == 1 else None), make_loader())
    unwilling = make_model()
    if rank == 1:
        unwilling.train = None  # which eval() calls
    with raised_by(1, TypeError, TypeError, "not callable"):
        quiet(unwilling, make_loader())
    silent = make_model()
    if rank == 0:
        silent.forward = lambda x: {}
    with raised_by(0, TypeError, TypeError, "model must return logits"):
        quiet(silent, make_loader())
    with raised_by(1, ValueError, ValueError, "passes must be at least 1"):
        quiet(make_model(), make_loader(), passes=0 if rank == 1 else 1)


def ranks_that_disagree_are_told(rank: int, size: int, folder: str):
    with pytest.raises(ValueError, match=r"passes is 1 on rank 0, 2 on rank 1"):
        quiet(make_model(), make_loader(), passes=1 + rank)
    with pytest.raises(ValueError, match=r"batch_size is 8 on rank 0, 4 on rank 1"):
        quiet(make_model(), make_loader(batch_size=4 if rank == 1 else 8))
    other = make_model()
    if rank == 1:
        with torch.no_grad():
            next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"digest of the parameters is '\w+' on rank 0, '\w+' on"):
        quiet(other, make_loader())


def running_statistics_may_differ(rank: int, size: int, folder: str):
    """As after training in DDP, which keeps those of rank 0."""
    model = make_model()
    model[1].running_mean += rank
    assert len(quiet(model, make_loader()).loss) == N


RANK_CHECKS = [
    scores_are_those_of_one_process,
    ranks_go_on_from_each_others_parts,
    several_passes_go_on_after_ranks_failed_apart,
    a_sharded_model_goes_on,
    a_run_of_ranks_dies,
    a_loader_that_leaves_samples_out_is_refused_everywhere,
    an_output_refused_on_one_rank_is_refused_on_all,
    a_folder_that_one_rank_lacks_is_refused_on_all,
    an_error_of_one_rank_is_one_of_all,
    ranks_that_disagree_are_told,
    running_statistics_may_differ,
]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks(tmp_path, size):
    (tmp_path / "parts").mkdir()
    told = run_ranks(size, RANK_CHECKS, tmp_path, str(tmp_path / "parts"))
    with emp_fast.use_backend("reference"):
        whole = [value.tolist() for value in quiet(Counting(), make_loader())]
    for rank, outcomes in enumerate(told):
        for check in RANK_CHECKS:
            assert check.__name__ in outcomes, f"rank {rank} died before {check.__name__}"
            result, error = outcomes[check.__name__]
            assert error is None, f"rank {rank} of {size}, {check.__name__}:\n{error}"
            assert result is None or result == whole
    assert np.load(tmp_path / "parts" / "scores.npy").shape == (N,)
    rest = Counting()
    with emp_fast.use_backend("reference"):
        alone = quiet(rest, make_loader(), output=tmp_path / "parts" / "left.npy")
    assert rest.calls == math.ceil(N / 8) - 2 * size
    assert [value.tolist() for value in alone] == whole
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == ["left.npy", "passes.npy", "scores.npy", "sharded.npy"]


# ---- refusals -----------------------------------------------------------------------------------


def scoring(**fields):
    """A ``score_batch`` whose stats have these fields in place of the right ones."""

    def score_batch(model, batch):
        (x, y), indices = batch
        return indices, cross_entropy(model(x), y)._replace(**fields)

    return score_batch


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"passes": 0}, ValueError, "passes must be at least 1, got 0"),
        ({"passes": True}, TypeError, "passes must be an int, got True"),
        ({"save_every": -1}, ValueError, "save_every must be a number of seconds, got -1"),
        ({"num_samples": 7}, ValueError, "num_samples must be 53, the loader's, got 7"),
        ({"stats": ("loss", "grand")}, ValueError, r"stats must be of loss, entropy.*'grand'"),
        ({"stats": ("loss", "loss")}, ValueError, "each once"),
        ({"rule": "emp"}, TypeError, "rule must be an emp_fast.Rule, got 'emp'"),
        ({"rule": GraNd()}, ValueError, r"rule must read.*GraNd\(decay=0.0\) reads hidden"),
        ({"rule": RHO(torch.zeros(3))}, ValueError, "each of 53 samples, got 3"),
        ({"softcap": -1.0}, ValueError, "softcap must be a positive finite number, got -1.0"),
        (
            {"score_batch": print, "softcap": 1.0, "shift_labels": True},
            ValueError,
            "softcap, shift_labels would have no effect",
        ),
        ({"wieght": 1}, TypeError, "unexpected argument 'wieght': the options are weight, ignore"),
        ({"stats": None}, TypeError, "stats must be names of SampleStats fields, got None"),
        ({"shift_labels": "no"}, TypeError, "shift_labels must be a bool or None, got 'no'"),
        ({"score_batch": 3}, TypeError, "score_batch must be a function or None, got 3"),
        ({"score_batch": lambda *_: None}, TypeError, "score_batch must return.*got NoneType"),
        (
            {"score_batch": lambda *_: (torch.arange(8), {"loss": torch.zeros(8)})},
            TypeError,
            r"score_batch must return \(indices, SampleStats\), got stats of type dict",
        ),
        (
            {
                "score_batch": lambda *_: (
                    "ab",
                    cross_entropy(torch.zeros(8, 4), torch.arange(8) % 4),
                )
            },
            TypeError,
            "the indices that score_batch returns must be integers, got 'ab'",
        ),
        ({"score_batch": scoring(entropy=None)}, TypeError, "entropy of the stats.*got NoneType"),
        (
            {"score_batch": scoring(margin=torch.zeros(3))},
            ValueError,
            r"margin of the stats that score_batch returns must have shape \(8,\), .*got \(3,\)",
        ),
        (
            {"score_batch": scoring(loss=torch.zeros(8, 1))},
            ValueError,
            r"loss of the stats that score_batch returns must have shape \(8,\), .*got \(8, 1\)",
        ),
        ({"device": "gpu"}, ValueError, "device must be.*got 'gpu'"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        quiet(make_model(), make_loader(), **options)


def test_bad_loaders():
    model = make_model()
    data = make_data()
    x, y = data.tensors
    with pytest.raises(TypeError, match="model must be callable, got None"):
        quiet(None, make_loader())
    with pytest.raises(ValueError, match="num_samples must be given for a loader"):
        quiet(model, DataLoader(data, batch_size=8))
    with pytest.raises(TypeError, match=r"as of emp_fast.with_indices\(dataset\); got Tensor"):
        quiet(model, DataLoader(data, batch_size=8), num_samples=N)
    with pytest.raises(TypeError, match=r"got Tensor.*score_batch can score any other"):
        quiet(model, DataLoader(with_indices(x), batch_size=8))
    with pytest.raises(TypeError, match=r"got list of Tensor, Tensor$"):
        quiet(model, DataLoader(TensorDataset(x, y.float()), batch_size=8), num_samples=N)
    two = [{"x": x[i], "labels": y[i], "target": y[i]} for i in range(N)]
    with pytest.raises(TypeError, match="got dict of 'x', 'labels', 'target'"):
        quiet(model, DataLoader(with_indices(two), batch_size=8))
    with pytest.raises(IndexError, match=r"indices must lie in \[0, 53\), got 53"):
        quiet(model, [((x[:1], y[:1]), torch.tensor([N]))], num_samples=N)
    with pytest.raises(ValueError, match="one index for each of its stats"):
        quiet(model, [((x[:2], y[:2]), torch.tensor([0]))], num_samples=N)
    with pytest.raises(ValueError, match=r"53 samples, but 51 were missing, the first.* 1$"):
        quiet(model, [((x[:2], y[:2]), torch.tensor([0, 3]))], num_samples=N)
    once = iter([((x, y), torch.arange(N))])
    with pytest.raises(ValueError, match=r"53 were missing in pass 2, .* an iterator is used up"):
        quiet(model, once, num_samples=N, passes=2)


def test_a_model_without_logits():
    with pytest.raises(TypeError, match=r"model must return logits.*got dict of 'loss'"):
        quiet(lambda x: {"loss": x.sum()}, make_loader())


def test_the_progress_bar_goes_to_stderr(capsys):
    score_dataset(make_model(), make_loader())
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "scoring, pass 1" in printed.err
    assert "7/7" in printed.err
    quiet(make_model(), make_loader())
    assert capsys.readouterr().err == ""


def test_rules_that_look_at_one_sample_score_it_alone():
    """The score of a sample depends on its own stats, whoever else is in the data set."""
    stats = wanted_stats(make_model(), make_data())
    parts = [SampleStats(*(value[i : i + 1] for value in stats)) for i in range(N)]
    alone = torch.cat([single_visit_scores(Loss(), part) for part in parts])
    assert torch.equal(alone, single_visit_scores(Loss(), stats))
