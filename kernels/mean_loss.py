"""The end of a fused step: the mean of its losses, and the scaling of its gradient.

Contracts: `Backend.mean_loss` and `Backend.scale_`. Three kernels:

    sum_losses      for many rows: each program sums its blocks into one total and one count
    mean_loss       one program sums all rows, or the totals of sum_losses, and divides
    scale_gradient  each program scales block after block; none if the factors' product is 1

The number of rows alone decides the number of programs, and what each of them sums in which order.
A run therefore repeats bit for bit, on any device. Sums are float64.

Traffic: 8 bytes per row, 12 with weights. The gradient is read and written once, or not at all.
"""

import triton
import triton.language as tl

from ._jit import kernel


@triton.jit
def _sums(loss_ptr, count_ptr, row_scale_ptr, num_rows, BLOCK: tl.constexpr):
    """The sums of the losses and of the counts over every `num_programs`-th block."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    counted = tl.zeros([BLOCK], tl.int64)
    for start in range(first, num_rows, step):
        row = start + lane
        row_ok = row < num_rows
        loss = tl.load(loss_ptr + row, mask=row_ok, other=0.0).to(tl.float64)
        if row_scale_ptr is not None:
            loss *= tl.load(row_scale_ptr + row, mask=row_ok, other=0.0)
        total += loss
        counted += tl.load(count_ptr + row, mask=row_ok, other=0)
    return tl.sum(total, axis=0), tl.sum(counted, axis=0)


@kernel
def sum_losses(
    loss_ptr,  # [S] float32
    count_ptr,  # [S] int32
    row_scale_ptr,  # [S] float32 or None
    totals_ptr,  # [programs] float64
    counts_ptr,  # [programs] int64
    num_rows: tl.int64,
    BLOCK: tl.constexpr,
):
    """Grid: any."""
    total, counted = _sums(loss_ptr, count_ptr, row_scale_ptr, num_rows, BLOCK)
    tl.store(totals_ptr + tl.program_id(0), total)
    tl.store(counts_ptr + tl.program_id(0), counted)


@kernel
def mean_loss(
    loss_ptr,  # [S] float32, or the totals of sum_losses
    count_ptr,  # [S] int32, or its counts
    row_scale_ptr,  # [S] float32 or None
    mean_ptr,  # [] float32
    factor_ptr,  # [] float32
    num_sums: tl.int64,  # S, or the programs of sum_losses
    num_rows: tl.int64,  # S
    BLOCK: tl.constexpr,
):
    """Grid: 1."""
    total, counted = _sums(loss_ptr, count_ptr, row_scale_ptr, num_sums, BLOCK)
    divisor = tl.maximum(counted, 1).to(tl.float64)
    rows = tl.maximum(num_rows, 1).to(tl.float64)
    tl.store(mean_ptr, (total / divisor).to(tl.float32))
    tl.store(factor_ptr, (rows / divisor).to(tl.float32))


@kernel
def scale_gradient(
    grad_ptr,  # [n] contiguous
    grad_mean_ptr,  # [] float32
    factor_ptr,  # [] float32 or None
    num_units: tl.int64,  # n / ALIGN
    ALIGN: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiplies the gradient by both factors; does not touch it if their product is 1.

    Grid: any. Address and n are multiples of `ALIGN` elements, which decides the width of loads.
    """
    scale = tl.load(grad_mean_ptr)
    if factor_ptr is not None:
        scale *= tl.load(factor_ptr)
    if scale != 1.0:
        n = num_units * ALIGN
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, n, step):
            i = start + tl.arange(0, BLOCK)
            address = tl.multiple_of(grad_ptr + i, ALIGN_BYTES)
            grad = tl.load(address, mask=i < n)
            tl.store(address, grad.to(tl.float32) * scale, mask=i < n)
