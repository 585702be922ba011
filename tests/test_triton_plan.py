"""Which Triton kernels score rows, and the launch arithmetic, over every kind of shape."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from emp_fast.kernels import plan

ROWS = [1, 2, 3, 31, 128, 257, 1024, 1025, 65536, 10**9]
CLASSES = [1, 2, 3, 10, 16, 17, 31, 33, 64, 100, 127, 128, 129, 300, 1000, 1023, 1025, 4095, 4096]
LONG = [4097, 5000, 8191, 16383, 16384, 16385, 32000, 50257, 128256, 151936, 262144, 10**6, 10**8]
PADDING = [0, 1, 2, 3, 8]
MULTIPROCESSORS = [1, 4, 108, 132, 160]
BASE = 0x7F0000000000
PLAIN = plan.Loss(soft=False, smooth=False, softcap=False, weighted=False)


def addresses(itemsize: int) -> range:
    return range(BASE, BASE + plan.VECTOR_BYTES, itemsize)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_row_starts_and_ends_on_the_alignment(itemsize: int) -> None:
    for classes, padding, address in itertools.product(
        CLASSES + LONG, PADDING, addresses(itemsize)
    ):
        align = plan.alignment(classes, classes + padding, address, itemsize)
        edges = [(address // itemsize) + row * (classes + padding) for row in range(5)]
        edges += [edge + classes for edge in edges]
        assert all(edge % align == 0 for edge in edges)
        widest = plan.VECTOR_BYTES // itemsize
        assert align == widest or any(edge % (2 * align) for edge in edges)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_hold_every_row_and_class(itemsize: int) -> None:
    for rows, classes, address, crowded in itertools.product(
        ROWS, [*CLASSES, 5000, plan.TILE_CLASSES_GRAD], addresses(itemsize), (False, True)
    ):
        tile = plan.plan_tile(plan.Logits(rows, classes, classes, address, itemsize), crowded)
        shape = (rows, classes, address, crowded, tile)
        assert classes <= tile.block, shape
        assert tile.block < 2 * max(classes, 9), shape
        assert tile.segment <= tile.block, shape
        assert classes <= 16 or tile.segment * itemsize >= plan.SEGMENT_BYTES, shape
        assert tile.rows <= plan.TILE_ROWS, shape
        assert all(
            math.log2(n).is_integer() for n in (tile.rows, tile.block, tile.segment, tile.warps)
        ), shape
        assert (tile.grid - 1) * tile.rows < rows <= tile.grid * tile.rows, shape
        threads = 32 * tile.warps
        # No thread has nothing to read, and none so much that it spills.
        assert threads <= tile.rows * tile.block // tile.align, shape
        assert tile.rows * tile.block <= threads * (16 if crowded else 32), shape


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("grad", [False, True])
def test_steps_hold_every_row_once_and_fill_the_device(itemsize: int, grad: bool) -> None:
    most = plan.TILE_CLASSES_GRAD if grad else plan.TILE_CLASSES
    for rows, classes, address, multiprocessors in itertools.product(
        ROWS, [*CLASSES, most], addresses(itemsize), MULTIPROCESSORS
    ):
        logits = plan.Logits(rows, classes, classes, address, itemsize)
        taken = plan.plan_rows(logits, multiprocessors, grad)
        shape = (rows, classes, address, multiprocessors, taken)
        if taken is None:
            continue
        assert classes <= taken.block < 2 * classes, shape
        assert taken.segment <= taken.block, shape
        assert taken.segment * itemsize >= plan.SEGMENT_BYTES, shape
        assert all(
            math.log2(n).is_integer() for n in (taken.rows, taken.block, taken.segment, taken.warps)
        ), shape
        elements = taken.rows * taken.block // (32 * taken.warps)  # per thread
        long = (taken.align, itemsize) == (8, 2) and taken.block >= plan.ROWS_LONG_BLOCK
        assert elements == (plan.ROWS_ELEMENTS if long else plan.THREAD_ELEMENTS), shape
        assert taken.rows == 1 or taken.warps == 1, shape
        own = taken.rows * taken.tiles
        assert own <= plan.KEPT_ROWS, shape
        assert (taken.grid - 1) * own < rows <= taken.grid * own, shape
        # No more waves of programs than the rows that one keeps ask for, and the last as full.
        most_ahead = plan.ROWS_AHEAD_BLOCK_GRAD if grad else plan.TILE_CLASSES
        assert taken.ahead == (plan.ROWS_AHEAD_BLOCK <= taken.block <= most_ahead), shape
        if long:
            warps = plan.ROWS_WARPS_LONG_GRAD if grad else plan.ROWS_WARPS_LONG
        elif taken.ahead:
            warps = plan.ROWS_WARPS_AHEAD_GRAD if grad else plan.ROWS_WARPS_AHEAD
        elif grad:
            warps = plan.ROWS_WARPS_GRAD if taken.warps == 1 else plan.ROWS_WARPS_SHARED
        else:
            warps = plan.ROWS_WARPS
        # As many warps fit on a multiprocessor as it is planned for.
        assert bool(taken.registers) == (long and not grad), shape
        assert taken.registers * 32 * warps <= 65536, shape
        programs = multiprocessors * (warps // taken.warps)
        waves = plan.ceil_div(rows, programs * plan.KEPT_ROWS)
        assert taken.grid <= waves * programs, shape
        assert own - taken.rows < rows / (waves * programs), shape


def test_few_rows_and_short_ones_are_not_taken_in_steps() -> None:
    def taken(rows: int, classes: int, grad: bool = False) -> bool:
        return plan.plan_rows(plan.Logits(rows, classes, classes, BASE, 2), 132, grad) is not None

    assert taken(65536, 1000)
    assert taken(8192, 8192, grad=True)
    assert not taken(512, 1000)
    assert not taken(10**6, 10)
    assert taken(10**6, 64)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("option", [None, "smooth", "soft"])
def test_walks_cover_every_class_of_every_row(itemsize: int, option: str | None) -> None:
    vector = plan.VECTOR_BYTES // itemsize
    loss = PLAIN if option is None else PLAIN._replace(**{option: True})
    for rows, classes, padding, address, multiprocessors, grad in itertools.product(
        ROWS, LONG, PADDING, addresses(itemsize), MULTIPROCESSORS, (False, True)
    ):
        stride = classes + padding
        logits = plan.Logits(rows, classes, stride, address, itemsize)
        loop = plan.plan_loop(logits, multiprocessors, loss, grad)
        shape = (rows, classes, padding, address, multiprocessors, loop)
        heads = {(address // itemsize + row * stride) % vector for row in range(min(rows, vector))}
        assert loop.shift == address // itemsize % vector, shape
        if not loop.shifted:
            assert heads == {0}, shape
        longest = max(heads) + classes
        part = loop.part_tiles * loop.span
        assert (loop.parts - 1) * part < classes + vector - 1, shape
        assert longest <= loop.parts * part < 2**31, shape
        assert 1 <= loop.parts <= plan.MAX_PARTS, shape
        assert loop.parts <= plan.merge_lanes(loop.parts), shape
        if loss.soft or rows >= multiprocessors:
            assert loop.parts == 1, shape
        if loop.warps == 1:
            assert rows >= 28 * multiprocessors, shape
            assert not grad, shape
            assert not loss.dense, shape
        if loop.shifted_alike:
            gradient_heads = [row * classes % vector for row in range(vector)]
            assert gradient_heads == [row * stride % vector for row in range(vector)], shape
            assert loop.shift == 0, shape


def test_rows_that_start_on_the_grid_are_not_shifted() -> None:
    for padding, address, shifted in ((0, BASE, False), (8, BASE, False), (1, BASE, True)):
        logits = plan.Logits(4, 8000, 8000 + padding, address, 2)
        assert plan.plan_loop(logits, 132, PLAIN, grad=False).shifted == shifted


def test_no_device_is_so_wide_that_the_parts_of_a_row_cannot_be_merged() -> None:
    loop = plan.plan_loop(plan.Logits(1, 10**8, 10**8, BASE, 2), 1000, PLAIN, grad=False)
    assert 264 < loop.parts <= plan.MAX_PARTS


def test_more_classes_than_offsets_can_count_are_refused() -> None:
    most, beyond = (plan.Logits(1, n, n, BASE, 2) for n in (plan.MAX_CLASSES, 2**31 - 1))
    plan.plan_loop(most, 132, PLAIN, grad=False)
    with pytest.raises(ValueError, match=f"at most {plan.MAX_CLASSES} classes, got 2147483647"):
        plan.plan_loop(beyond, 132, PLAIN, grad=False)


def chosen(
    rows: int,
    classes: int,
    loss: plan.Loss = PLAIN,
    *,
    itemsize: int = 2,
    kernels: str = "auto",
    grad: bool = False,
    update: bool = False,
) -> plan.RowsPlan | plan.TilePlan | plan.LoopPlan:
    logits = plan.Logits(rows, classes, classes, BASE, itemsize)
    return plan.choose_scores(logits, 132, loss, grad=grad, update=update, kernels=kernels)


def test_rows_stay_on_chip_up_to_a_length() -> None:
    def longest(kind: type, loss: plan.Loss = PLAIN, grad: bool = False) -> int:
        lengths = (1000, 4096, 4097, 8192, 8193)
        return max(n for n in lengths if isinstance(chosen(512, n, loss, grad=grad), kind))

    assert longest(plan.TilePlan) == 4096
    assert longest(plan.TilePlan, grad=True) == 8192
    assert longest(plan.TilePlan, PLAIN._replace(softcap=True, weighted=True), grad=True) == 8192
    for dense in ("soft", "smooth"):
        assert longest(plan.TilePlan, PLAIN._replace(**{dense: True}), grad=True) == 4096
    assert isinstance(chosen(10**6, 8193, kernels="stepped"), plan.LoopPlan)


@pytest.mark.parametrize("rows", [512, 65536])
def test_the_backward_pass_walks_what_does_not_fit_a_tile(rows: int) -> None:
    for classes, kind in ((4096, plan.TilePlan), (4097, plan.LoopPlan)):
        logits = plan.Logits(rows, classes, classes, BASE, 2)
        assert isinstance(plan.choose_gradient(logits, 132, PLAIN), kind)


def test_many_plain_rows_are_taken_tile_after_tile_where_that_is_faster() -> None:
    def taken(*, rows: int = 65536, loss: plan.Loss = PLAIN, **wanted: Any) -> bool:
        return isinstance(chosen(rows, 1000, loss, **wanted), plan.RowsPlan)

    assert taken()
    assert taken(itemsize=4)
    assert taken(grad=True)
    assert not taken(grad=True, itemsize=4)
    assert taken(grad=True, itemsize=4, kernels="stepped")
    assert not taken(kernels="plain")
    assert not taken(rows=512, kernels="stepped")
    assert not taken(update=True, kernels="stepped")
    for option in PLAIN._fields:
        assert not taken(loss=PLAIN._replace(**{option: True}), kernels="stepped"), option


def test_only_rows_of_class_ids_are_split() -> None:
    for loss, split in ((PLAIN, True), (PLAIN._replace(soft=True), False)):
        walk = chosen(4, 10**6, loss)
        assert isinstance(walk, plan.LoopPlan)
        assert (walk.parts > 1) == split


def test_a_loss_whose_elements_take_registers_leaves_a_thread_fewer() -> None:
    def unroll(itemsize: int, grad: bool, **options: bool) -> int:
        walk = chosen(4, 10**5, PLAIN._replace(**options), itemsize=itemsize, grad=grad)
        assert isinstance(walk, plan.LoopPlan)
        return walk.unroll

    for itemsize, grad in itertools.product((2, 4), (False, True)):
        assert unroll(itemsize, grad) == unroll(itemsize, grad, weighted=True) == 4
        assert unroll(itemsize, grad, soft=True) == unroll(itemsize, grad, smooth=True) == 2
        # A softcap has slopes in the gradient alone, of twice as many 16-bit logits in a vector.
        assert unroll(itemsize, grad, softcap=True) == (2 if grad and itemsize == 2 else 4)
    logits = plan.Logits(512, 1000, 1000, BASE, 2)
    long = plan.Logits(512, 10**5, 10**5, BASE, 2)
    for option in PLAIN._fields:
        loss, crowded = PLAIN._replace(**{option: True}), option != "weighted"
        tile = plan.plan_tile(logits, crowded)
        assert chosen(512, 1000, loss) == plan.choose_gradient(logits, 132, loss) == tile
        walk = plan.choose_gradient(long, 132, loss)
        assert walk == chosen(512, 10**5, loss, grad=True), option


def test_one_warp_walks_a_row_where_rows_occupy_the_device() -> None:
    def warps(rows: int, classes: int = 32000, grad: bool = False) -> int:
        walk = chosen(rows, classes, grad=grad)
        assert isinstance(walk, plan.LoopPlan)
        return walk.warps

    assert [warps(rows) for rows in (1, 28 * 132 - 1, 28 * 132)] == [8, 8, 1]
    assert warps(10**6, grad=True) == 8
    assert [warps(132, classes) for classes in (16383, 16384)] == [4, 8]


def test_parts_of_few_rows_give_every_multiprocessor_two_programs() -> None:
    walks = [chosen(rows, 10**8) for rows in (1, 4, 131, 132)]
    assert [walk.parts for walk in walks if isinstance(walk, plan.LoopPlan)] == [260, 66, 3, 1]
