"""What only CUDA has: streams, graphs, several devices; and that a run repeats itself exactly."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from sizes import DRY_RUN

from emp_fast import Pruner, rules
from emp_fast.backends import backend_status
from emp_fast.functional import cross_entropy, topk_indices

RUNS = 3 if DRY_RUN else 20
#: Steps of one launch and of two; long rows that end within a chunk of the kernels with rings.
SHAPES = [(64, 10), (300, 100), (65, 1000), (3, 32000), (260, 8192), (264, 20004), (2000, 36)]
#: Rows enough for rows_held on a device of 132 multiprocessors, by 16 or 32 threads and by 8.
SHAPES += [(11000, 640), (34000, 136)]
#: Rows enough for Triton's score_rows.
MANY = (4000, 4096)


def test_the_self_check_passes(backend: str, device: torch.device) -> None:
    status = {status.name: status for status in backend_status(device)}[backend]
    assert status.available, status.reason


_DETERMINISTIC = """
import torch
torch.use_deterministic_algorithms(True)
from emp_fast import Pruner, use_backend
from emp_fast.backends import resolve
from emp_fast.functional import topk_indices
device = torch.device({device!r})
with use_backend({backend!r}):
    assert resolve(device).name == {backend!r}
    logits = torch.randn(64, 10, device=device, requires_grad=True)
    target = torch.arange(64, device=device) % 10
    pruner = Pruner(64, device=device)
    pruner.loss(logits, target, torch.arange(64, device=device)).backward()
    chosen = topk_indices(pruner.store.scores, 20)
with use_backend("reference"):
    assert torch.equal(chosen, topk_indices(pruner.store.scores, 20))
"""


def test_deterministic_algorithms_refuse_nothing(backend: str, device: torch.device) -> None:
    """Neither a backend, whose self-check runs the reference, nor the reference itself."""
    code = _DETERMINISTIC.format(device=str(device), backend=backend)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def batch(shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(shape[1])
    logits = torch.randn(shape, generator=generator).mul(3).to(device, dtype)
    target = torch.randint(shape[1], (shape[0],), generator=generator).to(device)
    indices = torch.randint(shape[0], (shape[0],), generator=generator).to(device)
    return logits.requires_grad_(), target, indices


def step(pruner, logits, target, indices):
    loss = pruner.loss(logits, target, indices)
    (grad,) = torch.autograd.grad(loss, logits)
    store = pruner.store
    return loss.detach(), grad, store.scores, store.memory, store.visits


@pytest.mark.parametrize("shape", [*SHAPES, MANY], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeated_runs_give_the_same_bits(shape, dtype, backend, device, poison) -> None:
    logits, target, indices = batch(shape, device, dtype)
    first = None
    for _ in range(RUNS):
        pruner = Pruner(shape[0], rule=rules.EMP(0.5, 0.9), device=device)
        made = [*step(pruner, logits, target, indices), *step(pruner, logits, target, indices)]
        made += [*cross_entropy(logits, target), topk_indices(pruner.store.scores, shape[0] // 2)]
        made = [tensor.clone() for tensor in made]
        first = first or made
        for one, other in zip(made, first, strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_work_follows_the_current_stream(shape, backend, cuda) -> None:
    """The inputs come late, on a side stream: whoever runs on another one sees zeros."""
    logits, target, indices = batch(shape, cuda)
    wanted = [t.clone() for t in step(Pruner(shape[0], device=cuda), logits, target, indices)]
    late = [torch.zeros_like(logits), torch.zeros_like(target), torch.zeros_like(indices)]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for here, there in zip(late, (logits, target, indices), strict=True):
            here.detach().copy_(there.detach())
        pruner = Pruner(shape[0], device=cuda)
        got = step(pruner, late[0].requires_grad_(), late[1], late[2])
        chosen = topk_indices(pruner.store.scores, 3)
    torch.cuda.synchronize()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert torch.equal(chosen, topk_indices(wanted[2], 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_captures_into_a_graph(shape, backend, cuda) -> None:
    logits, target, indices = batch(shape, cuda)
    pruner = Pruner(shape[0], rule=rules.EMP(0.5, 0.9), device=cuda)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, and makes the choice of the backend
        step(Pruner(shape[0], device=cuda), logits, target, indices)
        step(pruner, logits, target, indices)
    torch.cuda.synchronize()
    fixed = [tensor.detach().clone() for tensor in (logits, target, indices)]
    fixed[0].requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(pruner, *fixed)
    eager = Pruner(shape[0], rule=rules.EMP(0.5, 0.9), device=cuda)
    step(eager, logits, target, indices)
    for seed in range(3):
        fresh = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(cuda)
        fixed[0].detach().copy_(fresh)
        graph.replay()
        wanted = step(eager, fresh.requires_grad_(), target, indices)
        torch.testing.assert_close(captured, wanted, rtol=0, atol=0)


def test_a_selection_captures_into_a_graph(backend, cuda) -> None:
    scores = torch.randn(100_003, device=cuda)
    if backend == "triton":
        pytest.skip("its selection reads each bracket on the host")
    topk_indices(scores, 30_000)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = topk_indices(scores, 30_000)
    for seed in range(3):
        scores.copy_(torch.randn(100_003, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(chosen, topk_indices(scores, 30_000))


def test_a_step_waits_for_nothing(backend, cuda) -> None:
    logits, target, indices = batch((128, 10), cuda)
    pruner = Pruner(128, device=cuda)
    step(pruner, logits, target, indices)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(pruner, logits, target, indices)
        pruner.update(indices, loss=logits.detach()[:, 0], memory=logits.detach()[:, 1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_device_than_the_current_one(backend, cuda) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    other = torch.device("cuda", 1 - torch.cuda.current_device())
    logits, target, indices = batch((64, 10), other)
    wanted = step(Pruner(64), *batch((64, 10), torch.device("cpu")))
    got = step(Pruner(64), logits, target, indices)
    assert got[2].device == other
    torch.testing.assert_close([t.cpu() for t in got], list(wanted), rtol=1e-4, atol=1e-5)


def test_compiles_whole(backend, device) -> None:
    logits, target, _ = batch((64, 100), device)

    def losses(logits, target):
        stats = cross_entropy(logits, target)
        return stats.loss.sum(), stats.entropy

    compiled = torch.compile(losses, fullgraph=True)
    got, wanted = compiled(logits, target), losses(logits, target)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got[0], logits), torch.autograd.grad(wanted[0], logits)
    )


def test_vmap_of_grad(backend, device) -> None:
    x = torch.randn(3, 33, 40, device=device)
    target = torch.randint(0, 40, (3, 33), device=device)

    def ours(x, target):
        return cross_entropy(x, target).loss.sum()

    def torchs(x, target):
        return torch.nn.functional.cross_entropy(x, target, reduction="sum")

    made, wanted = (torch.func.vmap(torch.func.grad(loss))(x, target) for loss in (ours, torchs))
    torch.testing.assert_close(made, wanted)


def test_ops_pass_opcheck(backend, device) -> None:
    logits, target, _ = batch((6, 10), device)
    ops = torch.ops.emp_fast
    torch.library.opcheck(ops.cross_entropy, (logits.detach(), target, None, -100, 0.0, 0.0))
    torch.library.opcheck(ops.topk_indices, (logits.detach()[:, 0].contiguous(), 3))


def test_the_automatic_choice_is_a_kernel(cuda) -> None:
    from emp_fast.backends import resolve

    names = [status.name for status in backend_status(cuda) if status.available]
    assert resolve(cuda).name == next(name for name in ("cuda", "triton") if name in names)
    assert topk_indices(torch.tensor([1.0, 2.0], device=cuda), 1).tolist() == [1]
