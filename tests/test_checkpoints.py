"""Checkpoints: whole or not at all, safe to load, refused when damaged or foreign."""

from __future__ import annotations

import collections
import copy
import enum
import errno
import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import emp_fast
from emp_fast import FileProblem, Pruner, load_checkpoint, save_checkpoint
from emp_fast.rules import UCB, Loss

RULE = UCB()
SUFFIXES = [".pt", ".safetensors"]


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors")
    return tmp_path / f"run{request.param}"


def trained(rule=RULE, seed=0):
    """A model, its optimizer and pruner in the middle of an epoch."""
    return trained_with_rest(rule, seed)[0]


def trained_with_rest(rule, seed):
    """The same, and the samples that the epoch has left."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters())
    pruner = Pruner(40, 0.5, rule=rule, seed=3)
    order = iter(pruner.sampler)
    for _ in range(2):
        indices = torch.tensor([next(order) for _ in range(7)])
        loss = pruner.loss(model(torch.randn(7, 4)), indices % 3, indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "pruner": pruner}, order


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(equal, one, other))
    return one == other or (one != one and other != other)


def states(parts):
    return {name: part.state_dict() for name, part in parts.items()}


def test_everything_comes_back(path):
    parts, order = trained_with_rest(RULE, 0)
    plain = {"step": 7, "note": "π", "none": None, "pair": (1, [2.5, {3: torch.arange(3)}])}
    rng = torch.get_rng_state()
    save_checkpoint(path, **parts, **plain, rate=math.inf, rng=rng)
    fresh = trained(seed=1)
    assert not equal(states(fresh), states(parts))
    saved = load_checkpoint(path, **fresh)
    assert equal(states(fresh), states(parts))
    assert equal({name: saved[name] for name in plain}, plain)
    assert saved["rate"] == math.inf
    assert torch.equal(saved["rng"], rng)
    rest = list(fresh["pruner"].sampler)
    assert rest == list(order)
    assert len(rest) == 6


def test_it_loads_without_running_code(tmp_path):
    save_checkpoint(tmp_path / "run.pt", **trained())
    whole = torch.load(tmp_path / "run.pt", weights_only=True)
    assert set(whole["parts"]) == {"model", "optimizer", "pruner"}


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path):
    path, ran = tmp_path / "run.pt", tmp_path / "ran"

    class RunsCode:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    save_checkpoint(path, step=1)
    whole = torch.load(path, weights_only=True)
    whole["parts"]["step"] = RunsCode()
    torch.save(whole, path)
    with pytest.raises(FileProblem, match="not a sound checkpoint"):
        load_checkpoint(path)
    assert not ran.exists()


def test_what_a_gpu_saved_loads_on_the_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as saving:
        saving.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        save_checkpoint(tmp_path / "run.pt", scores=torch.arange(3.0))
    assert b"cuda:0" in (tmp_path / "run.pt").read_bytes()
    assert equal(load_checkpoint(tmp_path / "run.pt")["scores"], torch.arange(3.0))


def test_views_aliases_and_scalars_survive(path):
    base = torch.arange(12.0).reshape(3, 4)
    given = {"rows": base[1:], "columns": base.T, "same": base, "scalar": torch.tensor(2.5)}
    save_checkpoint(path, given=given, half=base.bfloat16(), empty=torch.empty(0, 3))
    saved = load_checkpoint(path)
    assert equal(saved["given"], given)
    assert saved["half"].dtype == torch.bfloat16
    assert saved["empty"].shape == (0, 3)


def test_views_with_other_dtypes_survive(path):
    base, pair = torch.arange(4.0), torch.tensor([1 + 2j, 3 + 4j])
    bits = torch.nn.Parameter(base.view(torch.int32)[1:], requires_grad=False)
    halves = base.view(torch.bfloat16).requires_grad_()
    parts = {"base": base, "bits": {"x": bits}, "tail": base[2:], "pair": [pair, pair.imag]}
    parts["halves"] = halves
    save_checkpoint(path, **parts, model=torch.nn.Linear(2, 2))
    saved = load_checkpoint(path)
    assert equal({name: saved[name] for name in parts}, parts)
    if path.suffix == ".pt":  # .safetensors knows neither parameters nor shared storages
        assert type(saved["bits"]["x"]) is torch.nn.Parameter
        assert saved["halves"].requires_grad
        assert saved["tail"].data_ptr() == saved["base"].data_ptr() + 8


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_and_nested_tensors_survive(tmp_path):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)])
    save_checkpoint(
        tmp_path / "run.pt",
        sparse=torch.eye(3).to_sparse(),
        nested=nested,
        bits=nested.values().view(torch.int32),
    )
    saved = load_checkpoint(tmp_path / "run.pt")
    assert equal(saved["sparse"].to_dense(), torch.eye(3))
    assert equal(saved["nested"].unbind(), nested.unbind())
    assert equal(saved["bits"], nested.values().view(torch.int32))


def test_tensors_under_keys_that_look_alike_stay_apart(path):
    one, two, three, four = torch.arange(4)
    given = {"a/b": one, "a": {"b": two}, 1: three, "1": four}
    save_checkpoint(path, given=given)
    assert equal(load_checkpoint(path)["given"], given)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"a": [1, object()]}, r"part\['a'\]\[1\] must be a tensor or a plain value, got <object"),
        (lambda: 1, "part must be a tensor or a plain value, got <function"),
        ({"a": -(2**2039)}, r"part\['a'\] must be an int of at most 2039 bits .*, got one of 2040"),
        ({2**2040: 1}, "a key of part must be an int of at most 2039 bits"),
        ({"keys": np.zeros(99)}, r"(?s)got array\(\[0.*; torch.from_numpy makes a tensor of it$"),
        ({(1, 2): 3}, r"part must have str or int keys, got \(1, 2\)"),
        ({1.5: 3}, r"part must have str or int keys, got 1\.5"),
        ({"a": {1, 2}}, r"part\['a'\] must be a tensor or a plain value, got \{1, 2\}"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(path, part, message):
    with pytest.raises(TypeError, match=message):
        save_checkpoint(path, part=part)
    assert not path.exists()


class Colour(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


def test_subclasses_of_plain_values_are_saved_as_plain_values(path):
    """torch.load(weights_only=True) would refuse them when the run resumes."""
    given = {
        "best": np.mean([0.5, 0.75]),
        "steps": np.int64(7),
        "done": np.bool_(True),
        "colour": Colour.RED,
        "level": Level.HIGH,
        "history": collections.defaultdict(list, a=[np.float32(1.5)]),
        "pair": torch.Size([2, 3]),
    }
    save_checkpoint(path, given=given, alone=np.float64(2.0))
    saved = load_checkpoint(path)
    wanted = {
        "best": 0.625,
        "steps": 7,
        "done": True,
        "colour": "red",
        "level": 3,
        "history": {"a": [1.5]},
        "pair": (2, 3),
    }
    assert saved == {"given": wanted, "alone": 2.0}
    for name, value in wanted.items():
        assert type(saved["given"][name]) is type(value)


def test_schedulers_and_versions_of_modules_survive(tmp_path):
    path = tmp_path / "run.pt"
    model = torch.nn.BatchNorm1d(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.1))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])
    save_checkpoint(path, model=model, optimizer=optimizer, scheduler=scheduler)
    saved = load_checkpoint(path, model=model, optimizer=optimizer, scheduler=scheduler)
    assert saved["model"]._metadata == model.state_dict()._metadata
    assert type(scheduler.milestones) is collections.Counter


def test_a_tensor_that_torch_could_not_load_is_not_saved(path):
    class Mine(torch.Tensor):
        pass

    with pytest.raises(TypeError, match=r"part\['x'\] must be a tensor that torch.load.*got Mine"):
        save_checkpoint(path, part={"x": torch.ones(2).as_subclass(Mine)})


@pytest.mark.parametrize(
    ("tensor", "got"),
    [
        (lambda: torch.ones(2, dtype=torch.complex128), "Tensor of torch.complex128"),
        (lambda: torch.eye(2).to_sparse(), "Tensor of torch.float32 with layout torch.sparse_coo"),
        (lambda: torch.ones(2, device="meta"), "Tensor of torch.float32 .* on meta"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested Tensor"),
        (lambda: torch.empty(2, dtype=torch.qint8), "Tensor of torch.qint8"),
    ],
    ids=["complex128", "sparse", "meta", "nested", "quantised"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_that_safetensors_cannot_hold_is_named(tensor, got, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "run.safetensors"
    with pytest.raises(TypeError, match=rf"part\['x'\] must be a dense torch.Tensor.*got {got}"):
        save_checkpoint(path, part={"x": tensor()})
    assert not path.exists()


def test_a_tensor_without_a_storage_is_not_saved(path):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    with pytest.raises(TypeError, match=r"part\['x'\] must be a tensor that torch.load"):
        save_checkpoint(path, part={"x": torch.ones(2).to_mkldnn()})


def test_a_tensor_of_any_strides_is_saved(path):
    pair = torch.tensor([1 + 2j, 3 + 4j], dtype=torch.complex64)
    given = [torch.arange(4.0)[::4], pair.conj(), pair[:1].clone().conj().imag]
    save_checkpoint(path, given=given)
    assert equal(load_checkpoint(path)["given"], given)


def test_a_changed_bit_is_noticed(path):
    save_checkpoint(path, **trained())
    whole = path.read_bytes()
    before = load_checkpoint(path)
    chance = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            saved = load_checkpoint(path)
        except FileProblem:
            refused += 1
        else:
            assert equal(saved, before), "only a bit that means nothing may change unnoticed"
    assert refused > 30


def test_a_file_has_checksums_even_if_torch_makes_none(tmp_path):
    path = tmp_path / "run.pt"
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(path, x=torch.ones(3))
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(path)["x"].tolist() == [1, 1, 1]


def test_an_existing_file_keeps_its_permissions_and_a_link_its_target(path):
    save_checkpoint(path, step=1)
    path.chmod(0o640)
    link = path.with_name(f"link{path.suffix}")
    link.symlink_to(path)
    save_checkpoint(link, step=2)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert load_checkpoint(path)["step"] == 2


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused_and_nothing_changes(path, share):
    save_checkpoint(path, **trained())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    fresh = trained(seed=1)
    before = states(trained(seed=1))
    with pytest.raises(FileProblem, match=r"run.* is not a sound checkpoint"):
        load_checkpoint(path, **fresh)
    assert equal(states(fresh), before)


def test_foreign_files_are_refused(path):
    with pytest.raises(FileProblem, match=r"cannot read .*run.*No such file"):
        load_checkpoint(path)
    path.write_text("hello")
    with pytest.raises(FileProblem, match="not a sound checkpoint"):
        load_checkpoint(path)
    if path.suffix == ".pt":
        torch.save([1], path)
        with pytest.raises(FileProblem, match="not a checkpoint that save_checkpoint wrote"):
            load_checkpoint(path)
        torch.save({"weights": torch.ones(2)}, path)
    else:
        from safetensors.torch import save_file

        save_file({"weights": torch.ones(2)}, path)
    with pytest.raises(FileProblem, match="not a checkpoint that save_checkpoint wrote"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ({"version": None}, {}),
        ({"version": "one"}, {}),
        ({"structure": None}, {}),
        ({"structure": "[1"}, {}),
        ({}, {"0/rng": None}),
    ],
    ids=["no version", "no number", "no structure", "no JSON", "no tensor"],
)
def test_a_safetensors_file_that_lacks_something_is_refused(metadata, tensors, tmp_path):
    library = pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    def changed(whole, changes):
        return {name: value for name, value in (whole | changes).items() if value is not None}

    path = tmp_path / "run.safetensors"
    save_checkpoint(path, step=1, rng=torch.arange(3))
    with library.safe_open(path, framework="pt") as file:
        whole, arrays = file.metadata(), {"0/rng": file.get_tensor("0/rng")}
    save_file(arrays, path, whole)
    assert load_checkpoint(path)["step"] == 1
    save_file(changed(arrays, tensors), path, changed(whole, metadata))
    with pytest.raises(FileProblem, match=r"run\.safetensors is not a sound checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda one, other: (other, one),
        lambda one, other: (one.view(torch.int32), other),
        lambda one, other: (one.view(3, 1), other),
    ],
    ids=["other name", "other dtype", "other shape"],
)
def test_a_safetensors_file_whose_tensors_were_taken_for_others_is_refused(change, tmp_path):
    library = pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    path = tmp_path / "run.safetensors"
    save_checkpoint(path, one=torch.arange(3.0), other=torch.arange(3.0) + 7)
    with library.safe_open(path, framework="pt") as file:
        whole, names = file.metadata(), sorted(file.keys())
        tensors = [file.get_tensor(name) for name in names]
    save_file(dict(zip(names, change(*tensors), strict=True)), path, whole)
    with pytest.raises(FileProblem, match="its checksum is wrong"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("version", "a checkpoint of format version None"), ("parts", "a damaged checkpoint")],
)
def test_a_file_of_torch_that_lacks_something_is_refused(missing, message, tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, step=1)
    whole = torch.load(path, weights_only=True)
    del whole[missing]
    torch.save(whole, path)
    with pytest.raises(FileProblem, match=rf"run\.pt is {message}"):
        load_checkpoint(path)


def test_a_part_that_refuses_its_state_leaves_all_parts_as_they_were(path):
    save_checkpoint(path, **trained(rule=UCB()))
    fresh = trained(rule=Loss(), seed=1)
    before = states(trained(rule=Loss(), seed=1))
    with pytest.raises(FileProblem, match=r"does not fit pruner, and nothing was changed: .*rule"):
        load_checkpoint(path, **fresh)
    assert equal(states(fresh), before)
    other = {"model": torch.nn.Linear(2, 2)}
    with pytest.raises(FileProblem, match="does not fit model"):
        load_checkpoint(path, **other)


def test_parts_that_had_taken_some_of_their_state_get_back_what_they_had(path):
    def parts(last):
        return {
            "first": torch.nn.Linear(2, 2),
            "second": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, last)),
        }

    save_checkpoint(path, **parts(last=3))
    fresh = parts(last=4)
    before = copy.deepcopy(states(fresh))
    with pytest.raises(FileProblem, match="does not fit second, and nothing was changed"):
        load_checkpoint(path, **fresh)
    assert equal(states(fresh), before)


def test_missing_parts_and_parts_without_a_state_are_named(path):
    save_checkpoint(path, step=3)
    with pytest.raises(FileProblem, match=r"has no part 'pruner'; it has step"):
        load_checkpoint(path, pruner=Pruner(4))
    with pytest.raises(TypeError, match="step must have state_dict and load_state_dict, got 3"):
        load_checkpoint(path, step=3)


@pytest.mark.parametrize(
    "name",
    ["file/run.pt", "r" * 250 + ".pt", "r" * 300 + ".pt", "."],
    ids=["no folder", "long", "too long", "folder"],
)
def test_a_path_that_cannot_be_is_named(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem, match="cannot write"):
        save_checkpoint(tmp_path / name, step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileProblem, match=r"cannot write .*missing/run.pt: No such file"):
        save_checkpoint(tmp_path / "missing" / "run.pt", step=1)


@pytest.mark.parametrize("parts", [1, 60], ids=["large", "many"])
def test_a_full_disk_is_named_and_leaves_the_previous_file(path, full_disk, parts):
    """torch.save makes another error of the file's, for some sizes."""
    save_checkpoint(path, step=1)
    large = {f"part{at}": torch.ones(100_000 // parts) for at in range(parts)}
    with full_disk(), pytest.raises(FileProblem) as told:
        save_checkpoint(path, **large)
    assert str(told.value) == f"cannot write {path}: {os.strerror(errno.EFBIG)}"
    assert load_checkpoint(path) == {"step": 1}
    assert list(path.parent.iterdir()) == [path]


def _write_forever(path: Path) -> None:
    step = 0
    while True:
        step += 1
        save_checkpoint(path, step=step, large=torch.full((300_000,), float(step)))


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "emp_fast"])
    steps = []
    for delay in (0.0, 0.03, 0.07, 0.13, 1.0):
        writer = context.Process(target=_write_forever, args=(path,))
        path.unlink(missing_ok=True)
        writer.start()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        saved = load_checkpoint(path)
        assert bool((saved["large"] == saved["step"]).all())
        steps.append(saved["step"])
    assert max(steps) > 1
    assert emp_fast.load_checkpoint is load_checkpoint


def test_a_refused_load_does_not_move_the_run(tmp_path):
    """What the pruner has trained since counts as before, whichever part refused."""
    pruner = Pruner(20, 0.5, rule=Loss(), seed=1)
    order = iter(pruner.sampler)

    def step():
        indices = torch.tensor([next(order) for _ in range(2)])
        pruner.loss(torch.randn(2, 3, requires_grad=True), indices % 3, indices)

    step()
    path = tmp_path / "run.pt"
    save_checkpoint(path, pruner=pruner, model=torch.nn.Linear(2, 2))
    for parts in ({"pruner": pruner, "model": torch.nn.Linear(4, 4)}, {"pruner": Pruner(21)}):
        with pytest.raises(FileProblem, match="nothing was changed"):
            load_checkpoint(path, **{"model": torch.nn.Linear(2, 2), **parts})
    for _ in range(4):
        step()
    assert pruner.state_dict()["epoch"] == 1
    assert list(order) == []
    assert len(list(pruner.sampler)) == 10
    assert pruner.epoch == 1


def test_what_a_pruner_would_refuse_can_be_asked_before():
    pruner = Pruner(20, 0.5, seed=1)
    state = pruner.state_dict()
    pruner.check_state_dict(state)
    with pytest.raises(ValueError, match=r"state\['store'\]\['num_samples'\] must be 20, got 7"):
        pruner.check_state_dict({**state, "store": {**state["store"], "num_samples": 7}})
