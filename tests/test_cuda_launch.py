"""The launch arithmetic and the per-element logic of the CUDA kernels, on the host, without a GPU.

What is tested is what the kernels and their launches run: cuda_emulator/plans.cpp makes the same
inline functions Python's.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulator import require

from emp_fast.backends.base import Backend
from emp_fast.backends.cuda import CudaBackend
from emp_fast.backends.native import load_native

H200 = (132, 227 * 1024, 8)
A100 = (108, 163 * 1024, 0)
RTX5090 = (170, 99 * 1024, 8)
NARROW = (60, 227 * 1024, 2)  # no such device: clusters of two blocks at most
SMALL = (1, 48 * 1024, 0)
AUTO, PLAIN, SHARED, CLUSTER, RING, HELD = range(6)
SAMPLE_BITS = 18  # of the package's sampled selections
MAX_GRID_X, MAX_GRID_Y = 2**31 - 1, 65535
#: The register and thread kernels' reach, and where vectors and warps end.
CLASSES = [1, 2, 3, 7, 8, 9, 10, 16, 31, 32, 33, 100, 127, 128, 129, 249, 255, 256, 257, 1000]
CLASSES += [1017, 1018, 1024, 1025, 2048, 4096, 4097, 8185, 8186, 8192, 32000, 50257, 65536]
CLASSES += [128256, 151936, 262144, 10**6, 10**8]
#: Where rows become long enough to be split, of 4 and 2 bytes a logit, aligned and not.
CLASSES += [16376, 16377, 16378, 16380, 16381, 16383, 16384]
CLASSES += [32752, 32753, 32754, 32760, 32761, 32767, 32768]
ROWS = [1, 2, 3, 31, 128, 131, 256, 257, 512, 1024, 1025, 4096, 32767, 32768, 65536, 10**9]


def most_vectors(classes: int, element_bytes: int, aligned: bool) -> int:
    elements = 16 // element_bytes
    shifts = [0] if aligned else range(elements)
    return max(math.ceil((shift + classes) / elements) for shift in shifts)


def plan_rows(*shape: Any, kernels: int = PLAIN) -> dict[str, Any]:
    *numbers, device = shape
    plan: dict[str, Any] = require().plans.choose_rows(*numbers, *device, kernels)
    return plan


@pytest.fixture(scope="session")
def plans() -> Any:
    """The functions and constants of the launch arithmetic; built when the first test asks."""
    return require().plans


@pytest.fixture(scope="session")
def cuda() -> Any:
    """What the package's own module has, among it the constants that the Python side reads."""
    return require().cuda


@pytest.fixture
def kernels_built() -> None:
    """For tests of the package's own module: it was built by nvcc."""
    if not hasattr(load_native().module, "cuda"):
        stop = pytest.fail if os.environ.get("EMP_FAST_CUDA") == "1" else pytest.skip
        stop("the native module was built without CUDA")


@pytest.mark.parametrize("kernels", [PLAIN, SHARED])
@pytest.mark.parametrize("device", [H200, SMALL])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("aligned", [False, True])
def test_row_plans_cover_every_row_and_column(
    kernels: int,
    device: tuple[int, int, int],
    element_bytes: int,
    aligned: bool,
    plans: Any,
    cuda: Any,
) -> None:
    elements = 16 // element_bytes
    options = itertools.product(ROWS, CLASSES, (0, 3), (False, True), (False, True), (False, True))
    for rows, classes, padding, soft, general, grad in options:
        stride = classes + padding
        numbers = (rows, classes, stride, element_bytes, aligned, soft, general, general, grad)
        plan = plan_rows(*numbers, device, kernels=kernels)
        shape = (rows, classes, stride, soft, general, grad, plan)
        every_row_aligned = aligned and (rows == 1 or stride % elements == 0)
        vectors = most_vectors(classes, element_bytes, every_row_aligned)
        assert plan["threads"] % 32 == 0, shape
        assert plan["threads"] <= 1024, shape
        assert plan["threads"] % plan["lanes"] == 0, shape
        assert plan["lanes"] & (plan["lanes"] - 1) == 0, shape
        assert 1 <= plan["grid"] <= MAX_GRID_X, shape
        # Static reductions need a little of the shared memory as well.
        assert plan["shared_bytes"] <= max(48 * 1024, device[1] - 1024), shape
        tiles = math.ceil(rows / (plan["threads"] // plan["lanes"]))
        if plan["path"] == "shared":
            tiles = math.ceil(rows / (plan["threads"] // 32 * plan["tile_rows"]))
        if plan["path"] == "split":
            assert plan["grid"] == rows, shape
            assert 1 < plan["parts"] <= MAX_GRID_Y, shape
            assert plan["parts"] * plan["vectors_per_part"] >= vectors, shape
            assert (plan["parts"] - 1) * plan["vectors_per_part"] < vectors, shape
            assert plan["workspace_bytes"] == rows * plan["parts"] * 24, shape
            # The Python side asks for workspace only from here on.
            assert classes * element_bytes >= cuda.SPLIT_BYTES, shape
        elif plan["path"] == "shared":
            # A tile a warp, or as many blocks as run at once, which loop over the tiles.
            # The sums of a step take 512 bytes more.
            fit = (device[1] + 1024) // (plan["shared_bytes"] + (1536 if grad else 1024))
            held = 896 if grad and plan["lanes"] > 1 else 1024  # threads, of 72 and 64 registers
            resident = max(min(held // plan["threads"], fit), 1) * device[0]
            assert plan["grid"] == min(tiles, resident), shape
        else:
            # A tile a block, or a loop over tiles where the grid ends.
            assert plan["grid"] == min(tiles, MAX_GRID_X), shape
        if plan["path"] != "split":
            assert plan["parts"] == 1, shape
            assert plan["workspace_bytes"] == 0, shape
        if kernels == PLAIN:
            assert plan["path"] in ("registers", "few", "looped", "split"), shape
        elif plan["path"] != "shared":
            assert plan == plan_rows(*numbers, device, kernels=PLAIN), shape
        if plan["path"] == "shared":
            assert classes * element_bytes <= 16384, shape
            assert plan["lanes"] in (1, 4, 8, 16, 32), shape
            assert rows == 1 or stride == classes, shape
            assert plan["threads"] <= 128, shape
            assert plan["tile_rows"] % (32 // plan["lanes"]) == 0, shape
            tile, rest = divmod(plan["shared_bytes"], plan["threads"] // 32)
            assert rest == 0, shape
            assert tile % 16 == 0, shape
            held = most_vectors(plan["tile_rows"] * classes, element_bytes, False)
            assert tile >= 16 * held, shape
            assert plan["shared_bytes"] <= 48 * 1024, shape  # with no leave asked of the driver
        if plan["path"] == "registers":
            assert plan["lanes"] * plan["register_vectors"] >= vectors, shape
            # Where one vector a thread is enough for a launch of few threads, it is one.
            one = plan["register_vectors"] == 1
            assert one or plan["register_vectors"] == plans.REGISTER_VECTORS, shape
            lanes = min(n for n in (8, 32, 128, 256, math.inf) if n >= vectors)
            assert one == (grad and rows * lanes <= 1024 * device[0]), shape
            assert not one or plan["lanes"] == lanes, shape
        if kernels == PLAIN:
            room = min(n for n in (8, 16, 32, 64, 128, 256, math.inf) if n >= vectors)
            few = not (soft or general or grad) and rows * room <= 1024 * device[0]
            assert (plan["path"] == "few") == few, shape
        if plan["path"] == "few":
            room = plan["lanes"] * plan["lane_vectors"]
            assert vectors <= room, shape
            # All vectors but the last half of a thread are loaded without a test.
            assert plan["lane_vectors"] == 1 or vectors > room / 2, shape
            assert rows * room <= 1024 * device[0], shape
            assert plan["threads"] <= 128, shape
            assert not grad, shape
        if plan["path"] in ("shared", "registers", "few", "split"):
            assert not soft, shape
            assert not general, shape
        if plan["path"] == "looped":
            assert plan["cached_vectors"] * 16 == plan["shared_bytes"], shape
            assert plan["cached_vectors"] <= vectors, shape
            assert grad or plan["cached_vectors"] == 0, shape
        # Of few rows the block that ends last takes the step, at most four a thread.
        whole = rows <= min(256, 4 * plan["threads"])
        assert plan["step"] == ("whole" if whole else "claims"), shape


def test_smoothed_rows_have_no_kernels_of_one_vector_a_thread(plans: Any) -> None:
    for classes in (10, 100, 1000):
        shape = (128, classes, classes, 2, True, False, False)
        vectors = [
            plan_rows(*shape, smoothed, True, H200)["register_vectors"]
            for smoothed in (False, True)
        ]
        assert vectors == [1, plans.REGISTER_VECTORS]


@pytest.mark.parametrize("device", [H200, A100, SMALL])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_auto_takes_what_another_choice_would(
    device: tuple[int, int, int], element_bytes: int
) -> None:
    for shape in every_shape(element_bytes):
        *_, rare, grad = shape
        auto = plan_rows(*shape, device, kernels=AUTO)
        if not grad and (auto["path"], auto["lanes"]) == ("looped", 32):
            continue  # a warp per row, for which there is no choice of its own
        others = (PLAIN, SHARED, CLUSTER, RING, HELD)
        assert auto in [plan_rows(*shape, device, kernels=other) for other in others], shape
        if auto["path"] in ("ring", "cluster"):
            # Scores alone gain nothing on chip, and the rare options have not been measured there.
            assert grad, shape
            assert not rare, shape
            assert keeps_enough(auto, element_bytes), shape


@pytest.mark.parametrize(
    ("rows", "classes", "element_bytes", "scores", "step"),
    [
        (128, 10, 4, "few", "registers"),
        (65536, 10, 2, "shared", "shared"),
        (65536, 100, 2, "shared", "shared"),
        (65536, 100, 4, "held", "held"),
        (512, 1000, 2, "few", "registers"),
        (65536, 1000, 2, "held", "held"),
        (65536, 1000, 4, "held", "held"),
        (16384, 4096, 2, "shared", "shared"),
        (16384, 4096, 4, "looped", "ring"),
        (8192, 8192, 4, "looped", "ring"),
        (4096, 32000, 2, "looped", "ring"),
        (4096, 32000, 4, "looped", "ring"),
        (8192, 128256, 2, "looped", "cluster"),
        (8192, 128256, 4, "looped", "cluster"),
        (8192, 151936, 2, "looped", "cluster"),
        (2048, 262144, 2, "looped", "cluster"),
        (2048, 262144, 4, "looped", "cluster"),
    ],
)
def test_auto_takes_what_was_the_fastest_on_an_h200(
    rows: int, classes: int, element_bytes: int, scores: str, step: str
) -> None:
    """Or within a few per cent of it: benchmarks/results/h200.md, its steps in h200-kernels.md."""
    for grad, path in ((False, scores), (True, step)):
        shape = (rows, classes, classes, element_bytes, True, False, False, False, grad)
        assert plan_rows(*shape, H200, kernels=AUTO)["path"] == path


def test_auto_takes_no_rings_for_few_rows_and_rare_options() -> None:
    def path(rows: int, classes: int, element_bytes: int, smoothed: bool = False) -> str:
        shape = (rows, classes, classes, element_bytes, True, False, False, smoothed, True)
        return str(plan_rows(*shape, H200, kernels=AUTO)["path"])

    assert [path(rows, 128256, 2) for rows in (131, 132)] == ["split", "cluster"]
    assert path(16384, 4096, 4, smoothed=True) == "shared"
    assert path(8192, 32000, 2, smoothed=True) == "looped"
    # Of a 16-bit row clusters keep two thirds at least, of a longer one all.
    for element_bytes, rounds in ((2, 9), (4, 6)):
        longest = 8 * rounds * 2**15 // element_bytes
        paths = [path(8192, classes, element_bytes) for classes in (longest, longest + 8)]
        assert paths == ["cluster", "looped"]


def test_few_long_rows_are_split_into_two_parts_a_multiprocessor() -> None:
    def parts(rows: int, classes: int = 10**6) -> int:
        shape = (rows, classes, classes, 2, True, False, False, False, False)
        return int(plan_rows(*shape, H200, kernels=PLAIN)["parts"])

    assert [parts(rows) for rows in (1, 66, 131, 132, 263, 264)] == [61, 4, 3, 2, 2, 1]
    assert parts(1, 10**8) == 64
    assert [parts(1, 8 * vectors) for vectors in (4095, 4096, 6143, 6144)] == [1, 2, 2, 3]


def test_a_looped_block_alone_on_its_multiprocessor_has_the_threads_of_two() -> None:
    def lanes(classes: int, soft: bool = False, grad: bool = True) -> int:
        shape = (4096, classes, classes, 2, True, soft, True, False, grad)
        plan = plan_rows(*shape, H200, kernels=PLAIN)
        assert plan["path"] == "looped"
        return int(plan["lanes"])

    most = ((H200[1] // 2 - 4096) // 16) * 8  # of which two blocks keep their rows
    assert [lanes(n) for n in (4096, 4104, most, most + 8)] == [32, 512, 512, 1024]
    assert lanes(10**6, soft=True) == 512
    assert lanes(10**6, grad=False) == 32


def keeps_enough(plan: dict[str, Any], element_bytes: int) -> bool:
    """Whether its rings keep a row for the gradient, or two thirds of a 16-bit one."""
    few = 1.5 if element_bytes == 2 else 1
    return bool(plan["rounds"] <= few * plan["slots"])


def test_scores_of_long_rows_take_the_fewest_threads_that_occupy_the_device() -> None:
    def lanes(rows: int, grad: bool = False) -> int:
        shape = (rows, 32000, 32000, 2, True, False, False, False, grad)
        plan = plan_rows(*shape, H200, kernels=PLAIN)
        assert plan["path"] == "looped"
        return int(plan["lanes"])

    assert [lanes(rows) for rows in (264, 462, 924, 3695, 3696)] == [512, 256, 128, 128, 32]
    assert lanes(10**6, grad=True) == 512


def test_shared_serves_the_short_rows_that_occupy_the_device() -> None:
    def path(rows: int, classes: int, padding: int = 0) -> str:
        shape = (rows, classes, classes + padding, 4, True, False, False, False, True)
        return str(plan_rows(*shape, H200, kernels=SHARED)["path"])

    few, enough = 32 * 132 - 32, 32 * 132 - 31  # a group of 32 rows a multiprocessor, begun or not
    assert [path(rows, 32) for rows in (1, few, enough)] == ["registers", "registers", "shared"]
    assert [path(rows, 128) for rows in (1, 128, 10**6)] == ["registers", "registers", "shared"]
    assert path(10**6, 4096) == "shared"  # 16 KiB
    assert path(10**6, 4097) == "looped"
    assert path(10**6, 128, padding=3) == "registers"


@pytest.mark.parametrize("device", [H200, A100, RTX5090, SMALL])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_held_serves_every_row_of_whole_vectors_that_its_lanes_hold(
    device: tuple[int, int, int], element_bytes: int, plans: Any
) -> None:
    multiprocessors, shared, max_cluster = device
    elements = 16 // element_bytes
    served = set()
    for classes, grad in itertools.product(range(1, 257 * elements + 2), (False, True)):
        vectors, rest = divmod(classes, elements)
        for padding, aligned, soft, general, smoothed in (
            (0, True, False, False, False),
            (3, True, False, False, False),
            (elements, True, False, False, False),
            (0, False, False, False, False),
            (0, True, True, False, False),
            (0, True, False, True, False),
            (0, True, False, False, True),
        ):
            options = (element_bytes, aligned, soft, general, smoothed, grad)
            plain = padding == 0 and aligned and not (soft or general or smoothed)
            shape: tuple[Any, ...] = (2**30, classes, classes + padding, *options)
            most = plan_rows(*shape, device, kernels=HELD)
            if not (plain and rest == 0 and 16 < vectors <= 256):
                assert most == plan_rows(*shape, device), shape
                continue
            assert most["path"] == "held", shape
            lanes, held = most["lanes"], most["lane_vectors"]
            served.add((lanes, held))
            # Every lane has all but two of its vectors, and together they have the row.
            assert (held - 2) * lanes <= vectors <= held * lanes, shape
            assert most["threads"] == 128, shape
            # Rows as they lie in memory, that may begin anywhere in 128 bytes, and their gradients
            # if bulk copies store them.
            bulk_stores = grad and max_cluster > 0
            copies = 2 if bulk_stores else 1
            assert most["shared_bytes"] == copies * 128 // lanes * vectors * 16 + 128, shape
            assert most["shared_bytes"] <= 48 * 1024, shape  # with no leave of the driver
            assert most["parts"] == 1, shape
            assert most["workspace_bytes"] == 0, shape
            blocks, uneven = divmod(most["grid"], multiprocessors)
            assert uneven == 0, shape
            room = plans.held_room(lanes, held, grad)
            assert 3 <= room <= 7, shape
            wanted = room if bulk_stores else room - 2 if not grad and held == 8 else room - 1
            # With the sums at the end of a step, and what CUDA reserves.
            fit = (shared + 1024) // (most["shared_bytes"] + 512 + 1024)
            assert blocks == min(wanted, max(fit, 1)), shape
            # Two rows for every group of lanes, and row numbers that fit an int.
            enough = 2 * multiprocessors * (room - 1) * (128 // lanes)
            for rows in (1, enough - 1, enough, 2**30 + 1):
                shape = (rows, classes, classes, *options)
                plan = plan_rows(*shape, device, kernels=HELD)
                if rows == enough:
                    assert plan == most | {"step": "whole" if rows <= 512 else "claims"}, shape
                else:
                    assert plan == plan_rows(*shape, device), shape
    assert served == {(8, 4), *itertools.product((8, 16, 32), (6, 8))}


@pytest.mark.parametrize("kernels", [AUTO, PLAIN, SHARED, CLUSTER, RING, HELD])
def test_workspace_asked_for_covers_any_alignment(kernels: int, cuda: Any) -> None:
    # `score_workspace` asks the driver for the device, so its rule is repeated here.
    for rows, classes, element_bytes in itertools.product(ROWS[:8], CLASSES, (2, 4)):
        sizes = {
            (aligned, rare, grad): plan_rows(
                *(rows, classes, classes, element_bytes, aligned, False, rare, rare, grad, H200),
                kernels=kernels,
            )["workspace_bytes"]
            for aligned, rare, grad in itertools.product((False, True), repeat=3)
        }
        asked = max(sizes[aligned, False, False] for aligned in (False, True))
        assert asked == max(sizes.values())
        if classes * element_bytes < cuda.SPLIT_BYTES:
            assert asked == 0


@pytest.mark.parametrize("device", [H200, A100, RTX5090, NARROW, SMALL])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_cluster_plans_cover_every_row_and_column(
    device: tuple[int, int, int], element_bytes: int, plans: Any
) -> None:
    multiprocessors, shared, widest = device
    round_bytes = 16 * plans.ROUND_VECTORS
    served = 0
    for shape in every_shape(element_bytes):
        rows, *_, soft, _, _, grad = shape
        plan = plan_rows(*shape, device, kernels=CLUSTER)
        plain = plan_rows(*shape, device)
        if plan["path"] != "cluster":
            assert plan == plain, shape
            continue
        served += 1
        # The plain kernels keep what they do as well or alone.
        assert plain["path"] in ("looped", "split"), shape
        assert not soft, shape
        assert plan["threads"] == plan["lanes"] == 512, shape
        cluster, slots, rounds = plan["cluster"], plan["slots"], plan["rounds"]
        assert cluster in (1, 2, 4, 8), shape
        assert cluster <= widest, shape
        vectors = vectors_of(shape)
        part = plan["vectors_per_part"]
        assert part * cluster >= vectors, shape
        assert part % 128 == 0, shape  # whole chunks: no two warps of two blocks share one
        assert (rounds - 1) * plans.ROUND_VECTORS < part <= rounds * plans.ROUND_VECTORS, shape
        assert 2 <= slots <= 6, shape
        # A block has its multiprocessor alone.
        assert plan["blocks_per_multiprocessor"] == 1, shape
        assert plan["shared_bytes"] == slots * round_bytes + plans.RING_TAIL, shape
        assert plan["shared_bytes"] <= shared, shape
        # Whole clusters, each with a row at least, and no more than run at once.
        clusters, rest = divmod(plan["grid"], cluster)
        assert rest == 0, shape
        assert clusters == min(rows, max(multiprocessors // cluster, 1)), shape
        # The gradient's row stays on chip wherever some cluster could hold it.
        most_slots = min((shared - plans.RING_TAIL) // round_bytes, 6)
        if grad and math.ceil(vectors / widest) + 127 <= most_slots * plans.ROUND_VECTORS:
            assert plan["rounds"] <= slots, shape
        # No more blocks share a row than that takes, unless there are too few rows.
        if grad and cluster > 1 and rows * cluster // 2 >= multiprocessors:
            assert math.ceil(vectors / (cluster // 2)) > slots * plans.ROUND_VECTORS, shape
    assert (served > 0) == (widest > 0 and shared >= 2 * round_bytes + plans.RING_TAIL)


@pytest.mark.parametrize("device", [H200, A100, RTX5090, NARROW, SMALL])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_ring_plans_cover_every_row_and_column(
    device: tuple[int, int, int], element_bytes: int, plans: Any
) -> None:
    multiprocessors, shared, _ = device
    for shape in every_shape(element_bytes):
        rows, classes, *_, soft, _, rare, grad = shape
        plan = plan_rows(*shape, device, kernels=RING)
        serves = not soft and classes * element_bytes >= 4096
        serves = serves and multiprocessors <= rows <= 2**30
        serves = serves and shared >= plans.block_ring_bytes(16, 2)
        assert (plan["path"] == "ring") == serves, shape
        if not serves:
            assert plan == plan_rows(*shape, device), shape
            continue
        warps, rest = divmod(plan["threads"], 32)
        assert rest == 0, shape
        assert warps in (1, 2, 4, 8, 16), shape
        assert plan["lanes"] == plan["threads"], shape
        slots, rounds = plan["slots"], plan["rounds"]
        vectors = vectors_of(shape)
        assert (rounds - 1) * warps * 128 < vectors <= rounds * warps * 128, shape
        assert plan["vectors_per_part"] >= vectors, shape
        assert plan["cluster"] == 1, shape
        assert 2 <= slots <= 7, shape
        blocks = plan["blocks_per_multiprocessor"]
        assert blocks >= 1, shape
        assert plan["shared_bytes"] == plans.block_ring_bytes(warps, slots), shape
        assert blocks * (plan["shared_bytes"] + 1024) <= shared + 1024, shape
        assert blocks * warps <= (16 if rare else 32), shape
        # One slot more would leave room for fewer blocks.
        wider = plans.block_ring_bytes(warps, slots + 1)
        fit = (shared + 1024) // (wider + 1024) if wider <= shared else 0
        assert slots == 7 or min(blocks, fit) < blocks, shape
        assert plan["grid"] == min(rows, blocks * multiprocessors), shape
        assert plan["step"] == "claims", shape
        # Fewer warps than a whole block only where they are enough and the row stays on chip.
        if warps < 16:
            assert blocks * warps >= 16, shape
            assert rows >= blocks * multiprocessors, shape
            assert not grad or rounds <= slots, shape


def test_rings_have_the_fewest_warps_that_occupy_the_device_and_keep_the_row() -> None:
    def rings(
        grad: bool, *, general: bool = False, smoothed: bool = False
    ) -> list[tuple[int, int]]:
        """Warps of a block and blocks of a multiprocessor, for rows of three lengths."""
        found = []
        for classes in (4096, 32000, 128256):
            shape = (8192, classes, classes, 2, True, False, general, smoothed, grad)
            plan = plan_rows(*shape, H200, kernels=RING)
            assert plan["path"] == "ring"
            found.append((plan["threads"] // 32, plan["blocks_per_multiprocessor"]))
        return found

    assert rings(grad=True) == [(1, 25), (8, 3), (16, 1)]
    assert rings(grad=False) == [(1, 25), (8, 3), (8, 2)]
    # The kernels of the rare options have registers for half as many.
    assert rings(grad=True, general=True) == [(1, 16), (8, 2), (16, 1)]
    assert rings(grad=True, smoothed=True) == [(1, 16), (8, 2), (16, 1)]


def vectors_of(shape: tuple[Any, ...]) -> int:
    """That the longest row can touch."""
    rows, classes, stride, element_bytes, aligned, *_ = shape
    alike = rows == 1 or stride % (16 // element_bytes) == 0
    return most_vectors(classes, element_bytes, aligned and alike)


def every_shape(element_bytes: int) -> Iterator[tuple[Any, ...]]:
    """The arguments of `plan_rows` before the device."""
    options = itertools.product(
        ROWS, CLASSES, (0, 3), (False, True), (False, True), (False, True), (False, True)
    )
    for rows, classes, padding, aligned, soft, rare, grad in options:
        yield rows, classes, classes + padding, element_bytes, aligned, soft, rare, rare, grad


@pytest.mark.parametrize(
    ("classes", "element_bytes", "blocks"),
    [
        (32000, 4, 1),
        (128256, 2, 2),
        (128256, 4, 4),
        (151936, 2, 2),
        (151936, 4, 4),
        (262144, 2, 4),
        (262144, 4, 8),
    ],
)
def test_an_h200_keeps_the_rows_of_large_vocabularies_on_chip(
    classes: int, element_bytes: int, blocks: int
) -> None:
    shape = (4096, classes, classes, element_bytes, True, False, False, False, True)
    plan = plan_rows(*shape, H200, kernels=CLUSTER)
    assert plan["path"] == "cluster"
    assert plan["cluster"] == blocks
    assert plan["rounds"] <= plan["slots"]


def test_clusters_fit_into_small_devices() -> None:
    def plan(*device: int) -> dict[str, Any]:
        shape = (4096, 262144, 262144, 4, True, False, False, False, True)
        return plan_rows(*shape, device, kernels=CLUSTER)

    few = plan(4, H200[1], 8)  # multiprocessors than a cluster has blocks
    assert (few["cluster"], few["grid"]) == (8, 8)
    least = 2 * 2**15 + require().plans.RING_TAIL
    assert [plan(132, shared, 8)["path"] for shared in (least - 1, least)] == ["looped", "cluster"]


def test_few_rows_spread_over_wider_clusters() -> None:
    def cluster(rows: int, classes: int = 262144) -> int:
        shape = (rows, classes, classes, 2, True, False, False, False, False)
        plan = plan_rows(*shape, H200, kernels=CLUSTER)
        return int(plan["cluster"]) if plan["path"] == "cluster" else 0

    assert [cluster(rows) for rows in (1, 16, 17, 33, 66, 132)] == [0, 0, 8, 4, 2, 1]
    # As long as each has 32 KiB.
    assert [cluster(17, 8 * vectors) for vectors in (4095, 4096, 8191, 8192)] == [1, 2, 2, 4]


@pytest.mark.parametrize("kernels", [CLUSTER, RING])
def test_rows_beyond_an_int_are_the_plain_kernels(kernels: int) -> None:
    def path(rows: int) -> str:
        shape = (rows, 32000, 32000, 2, True, False, False, False, True)
        return str(plan_rows(*shape, H200, kernels=kernels)["path"])

    assert path(2**30) == ("cluster" if kernels == CLUSTER else "ring")
    assert path(2**30 + 1) == "looped"


def plan_backward(
    rows: int,
    classes: int,
    element_bytes: int,
    *,
    stride: int = 0,
    aligned: bool = True,
    soft: bool = False,
    general: bool = False,
    smoothed: bool = False,
    device: tuple[int, int, int] = H200,
) -> dict[str, Any]:
    plan: dict[str, Any] = require().plans.plan_backward(
        *(rows, classes, stride or classes, element_bytes, aligned),
        *(soft, general, smoothed, device[0]),
    )
    return plan


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_backward_plans_cover_every_row_and_column(element_bytes: int) -> None:
    for rows, classes, soft in itertools.product(ROWS, CLASSES, (False, True)):
        plan = plan_backward(rows, classes, element_bytes, soft=soft, aligned=False)
        assert plan["flat_vectors"] == 0
        vectors = most_vectors(classes, element_bytes, False)
        tiles = math.ceil(rows / (plan["threads"] // plan["lanes"]))
        assert plan["grid"] == min(tiles, MAX_GRID_X)
        assert 1 <= plan["parts"] <= MAX_GRID_Y
        assert plan["parts"] * plan["vectors_per_part"] >= vectors
        assert (plan["parts"] - 1) * plan["vectors_per_part"] < vectors
        assert plan["parts"] == 1 or not soft


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("device", [H200, SMALL])
def test_a_contiguous_gradient_is_made_as_one_array(
    device: tuple[int, int, int], element_bytes: int, cuda: Any
) -> None:
    elements = 16 // element_bytes
    for rows, classes in itertools.product(ROWS, CLASSES):
        plan = plan_backward(rows, classes, element_bytes, device=device)
        total = rows * classes
        tile = plan["threads"] * max(plan["flat_vectors"], 1) * elements
        serves = classes > 1 and total * classes < 2**64 and math.ceil(total / tile) <= MAX_GRID_X
        serves = serves and classes + tile <= cuda.MAX_CLASSES
        assert (plan["flat_vectors"] > 0) == serves
        if not serves:
            continue
        assert plan["grid"] == math.ceil(total / tile)
        assert plan["flat_vectors"] == 1 or classes >= elements
        # A row ends in column 0 of a tile at worst.
        assert plan["shared_bytes"] == 16 * (1 + math.ceil((tile - 1) / classes))
        assert plan["shared_bytes"] <= 16 * 1025


def test_what_is_not_one_array_of_vectors_is_made_by_rows() -> None:
    assert plan_backward(65536, 1000, 2)["flat_vectors"] == 4
    assert plan_backward(64, 1000, 2)["flat_vectors"] == 1  # few tiles
    assert plan_backward(1, 1000, 2, stride=1008)["flat_vectors"] == 1
    assert plan_backward(4096, 1000, 2, stride=1008)["flat_vectors"] == 0
    for option in ("soft", "general"):
        assert plan_backward(4096, 1000, 2, **{option: True})["flat_vectors"] == 0
    smoothed = plan_backward(65536, 1000, 2, smoothed=True)
    assert smoothed["flat_vectors"] == 4
    assert smoothed["shared_bytes"] == plan_backward(65536, 1000, 2)["shared_bytes"] // 16 * 20
    assert plan_backward(65536, 7, 2, smoothed=True)["flat_vectors"] == 0
    assert plan_backward(65536, 8, 2, smoothed=True)["flat_vectors"] == 1
    longest = 2**31 - 64 - 8192  # from which no column of a tile overflows
    assert [plan_backward(1, longest + n, 2)["flat_vectors"] for n in (0, 1)] == [4, 0]
    # Four tiles a multiprocessor are many.
    assert [plan_backward(rows, 8192, 2)["flat_vectors"] for rows in (527, 528)] == [1, 4]


def test_gradients_by_rows_have_eight_parts_a_multiprocessor() -> None:
    def plan(rows: int, classes: int) -> dict[str, Any]:
        return plan_backward(rows, classes, 2, aligned=False)

    assert [plan(128, n)["lanes"] for n in (121, 122, 4089, 4090)] == [4, 32, 32, 256]
    rows = (1, 132, 1055, 1056)
    assert [plan(n, 10**6)["parts"] for n in rows] == [123, 8, 2, 1]
    assert [plan(n, 4089)["parts"] for n in rows] == [1, 1, 1, 1]


@pytest.mark.parametrize("tile", [1024, 2048, 4096, 8192])
def test_the_row_of_an_element_is_found_by_multiplication(tile: int, plans: Any) -> None:
    generator = np.random.default_rng(tile)
    for classes in [c for c in CLASSES if c > 1] + [tile - 1, tile, tile + 1, 2**31 - 65]:
        most = min(2**64 // classes, 2**62)
        spots = {int(x) for x in generator.integers(0, most, 200)} | {most}
        starts = {x // classes * classes for x in spots} - {0}
        elements = sorted(spots | starts | {x - 1 for x in starts} | {0, 1})
        near = sorted({n + d for n in range(0, classes + tile, classes) for d in (-1, 0, 1)})
        near = [n for n in near if 0 <= n <= classes + tile - 2]
        rows, near_rows = plans.rows_of_elements(classes, tile, elements, near)
        assert rows == [x // classes for x in elements]
        assert near_rows == [n // classes for n in near]


@pytest.mark.parametrize("elements", [4, 8])
def test_a_window_holds_every_column_once(elements: int, plans: Any) -> None:
    element_bytes = 16 // elements
    for classes in range(1, 70):
        for shift in range(elements):
            address = 0x7F0000000000 + shift * element_bytes
            vectors = plans.window_columns(address, classes, elements)
            held = [column for _, _, columns in vectors for column in columns]
            assert held == list(range(classes))
            for column, interior, columns in vectors:
                assert (address + column * element_bytes) % 16 == 0
                assert columns, "a vector without a column would be a needless read"
                assert interior == (len(columns) == elements)


def test_a_sample_of_the_package_is_of_a_size_tested_here(cuda: Any) -> None:
    assert cuda.SAMPLE_BITS == SAMPLE_BITS


@pytest.mark.parametrize(
    ("n", "k", "groups", "sample_bits"),
    [
        (n, k, groups, sample_bits)
        for n in (1, 2, 1023, 1024, 1025, 65537, 10**6, 2**24, 2**26, 10**9, 2**31 + 5, 2**36)
        for k in sorted({1, max(n // 3, 1), max(n - 1, 1)})
        for groups, sample_bits in ((0, 0), (7, 0), (65536, 0), (0, SAMPLE_BITS), (0, 12))
        if sample_bits == 0 or n >= 32 * 2**sample_bits
    ],
)
def test_selection_plan(n: int, k: int, groups: int, sample_bits: int, plans: Any) -> None:
    plan = plans.plan_selection(n, k, groups, sample_bits)
    assert n - 1 < 2 ** plan["index_bits"] <= max(2 * (n - 1), 1)
    assert (plan["tiles"] - 1) * 1024 < n <= plan["tiles"] * 1024
    assert (plan["runs"] - 1) * 64 < plan["tiles"] <= plan["runs"] * 64
    end = 0
    for offset, size in plan["regions"]:
        assert offset % 256 == 0
        assert offset >= end
        end = offset + size
    assert end <= plan["workspace_bytes"]
    histogram, control, states = plan["regions"][:3]
    # 256 bins a group; else 2048 a digit of the key, or an end of the bracket and the rest.
    assert histogram == (0, 8 * (256 * groups if groups else 3 * 2048))
    assert control[0] + control[1] <= plan["cleared_bytes"] <= states[0]
    if sample_bits:
        sample = 2**sample_bits
        assert sample_bits != SAMPLE_BITS or plan["workspace_bytes"] < n / 4
        bitmap = plan["regions"][5]
        assert bitmap[1] >= sample * 4  # where the sample lies at first
        assert 0 <= plan["rank_above"] < plan["rank_below"] <= sample + 1
        # The bracket holds the rank that k has in the sample, and is narrow enough for the buffer.
        assert plan["rank_above"] <= k / n * sample <= plan["rank_below"]
        assert k > 1 or plan["rank_above"] == 0
        assert k < n - 1 or plan["rank_below"] == sample + 1
        width = (plan["rank_below"] - plan["rank_above"]) / sample * n
        assert width < 0.9 * plan["candidates"]


@pytest.mark.parametrize("k", [1, 16, 160, 235, 319, 10**5, 2**25, 2**26 - 160, 2**26 - 1])
def test_a_bracket_misses_the_kth_score_once_in_20_000_times_at_most(k: int, plans: Any) -> None:
    n, sample = 2**26, 2**SAMPLE_BITS
    plan = plans.plan_selection(n, k, 0, SAMPLE_BITS)
    # How many of the k highest are in the sample is binomial.
    hits = torch.arange(sample + 1, dtype=torch.float64)
    orders = math.lgamma(sample + 1) - torch.lgamma(hits + 1) - torch.lgamma(sample - hits + 1)
    chances = (orders + hits * math.log(k / n) + (sample - hits) * math.log1p(-k / n)).exp()
    chances[plan["rank_above"] : plan["rank_below"]] = 0
    assert chances.sum() < 1 / 20_000


def highest(scores: np.ndarray, k: int) -> list[int]:
    """The contract by a stable sort: NaN lowest, zeros equal, the lowest index of a tie."""
    values = np.where(np.isnan(scores), -np.inf, scores).astype(np.float64) + 0.0
    nan_last = np.isnan(scores)
    order = np.lexsort((np.arange(len(scores)), -values, nan_last))
    return sorted(order[:k].tolist())


def score_sets() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    normal = generator.normal(size=1000).astype(np.float32)
    specials = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, -1e-45, 3.4e38], np.float32)
    return {
        "normal": normal,
        "few_values": generator.integers(0, 3, 513).astype(np.float32),
        "all_equal": np.full(257, 0.5, np.float32),
        "specials": generator.choice(specials, 300),
        "all_nan": np.full(33, np.nan, np.float32),
        "one": np.array([1.5], np.float32),
        "close": (1 + np.arange(700) % 5 * np.float32(1.2e-7)).astype(np.float32),
        "sorted": np.sort(normal),
    }


@pytest.mark.parametrize("digit_bits", [8, 11])
@pytest.mark.parametrize("name", score_sets())
def test_digits_select_what_a_stable_sort_does(name: str, digit_bits: int, plans: Any) -> None:
    scores = score_sets()[name]
    n = len(scores)
    for k in sorted({0, 1, 2, n // 3, n // 2, n - 1, n} & set(range(n + 1))):
        assert plans.select_by_digits(scores, k, digit_bits) == highest(scores, k)


def test_row_kernels_are_chosen_by_argument_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMP_FAST_CUDA_ROWS", raising=False)
    assert CudaBackend().row_kernels == "auto"
    for name in ("auto", "plain", "shared", "cluster", "ring", "held"):
        assert CudaBackend(name).row_kernels == name
    with pytest.raises(ValueError, match=r"row_kernels must be one of .*'held'\], got 'magic'"):
        CudaBackend("magic")
    backend = CudaBackend("plain")
    backend.row_kernels = "cluster"
    assert backend.row_kernels == "cluster"
    with pytest.raises(ValueError, match="row_kernels"):
        backend.row_kernels = "magic"
    monkeypatch.setenv("EMP_FAST_CUDA_ROWS", "cluster")
    assert CudaBackend().row_kernels == "cluster"
    assert CudaBackend("plain").row_kernels == "plain"
    monkeypatch.setenv("EMP_FAST_CUDA_ROWS", "magic")
    with pytest.raises(ValueError, match=r"EMP_FAST_CUDA_ROWS must be .* got 'magic'"):
        CudaBackend()


@pytest.mark.usefixtures("kernels_built")
def test_the_backend_says_why_it_cannot_serve_the_cpu() -> None:
    backend: Backend = CudaBackend()
    assert "not cpu" in str(backend.why_not(torch.device("cpu")))


@pytest.mark.usefixtures("kernels_built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_backend_says_that_there_is_no_device() -> None:
    assert "no CUDA device" in str(CudaBackend().why_not(torch.device("cuda", 0)))


@pytest.mark.usefixtures("kernels_built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_failed_launch_raises_with_the_name_of_the_kernel() -> None:
    # In a process of its own: without a driver the first call fails, and nothing is dereferenced.
    code = (
        "import torch\n"
        "from emp_fast.backends.native import load_native\n"
        "try:\n"
        "    load_native().module.cuda.philox(256, 1, 0, 0, 0, 0, 0)\n"
        "except RuntimeError as error:\n"
        "    assert 'sample_bits_of' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
