"""What a fused step leaves to do: the mean of its losses, and the scaling of its gradient.

Contracts: `Backend.mean_loss` and `Backend.scale_`. Two kernels:

    mean_loss       one program walks over all rows, so the order of the sums is fixed. Millions of
                    rows go at one multiprocessor's pace, and lose no digits: it sums in float64.
    scale_gradient  a program scales block after block, and none when the factors make 1.

Traffic: 8 bytes a row, 12 with weights. The gradient read and written once, or not at all.
"""

import triton.language as tl

from ._jit import kernel


@kernel
def mean_loss(
    loss_ptr,  # [S] float32
    count_ptr,  # [S] int32
    row_scale_ptr,  # [S] float32 or None
    mean_ptr,  # [] float32
    factor_ptr,  # [] float32
    num_rows: tl.int64,
    BLOCK: tl.constexpr,
):
    """Grid: 1."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    counted = tl.zeros([BLOCK], tl.int64)
    for start in range(0, num_rows, BLOCK):
        row = start + lane
        row_ok = row < num_rows
        loss = tl.load(loss_ptr + row, mask=row_ok, other=0.0).to(tl.float64)
        if row_scale_ptr is not None:
            loss *= tl.load(row_scale_ptr + row, mask=row_ok, other=0.0)
        total += loss
        counted += tl.load(count_ptr + row, mask=row_ok, other=0)
    divisor = tl.maximum(tl.sum(counted, axis=0), 1).to(tl.float64)
    rows = tl.maximum(num_rows, 1).to(tl.float64)
    tl.store(mean_ptr, (tl.sum(total, axis=0) / divisor).to(tl.float32))
    tl.store(factor_ptr, (rows / divisor).to(tl.float32))


@kernel
def scale_gradient(
    grad_ptr,  # [n] contiguous
    factor_ptr,  # [] float32
    also_ptr,  # [] float32 or None
    num_units: tl.int64,  # n / ALIGN
    ALIGN: tl.constexpr,
    ALIGN_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Address and n are multiples of `ALIGN` elements, which says how wide to load."""
    factor = tl.load(factor_ptr)
    if also_ptr is not None:
        factor *= tl.load(also_ptr)
    if factor != 1.0:
        n = num_units * ALIGN
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, n, step):
            i = start + tl.arange(0, BLOCK)
            address = tl.multiple_of(grad_ptr + i, ALIGN_BYTES)
            grad = tl.load(address, mask=i < n)
            tl.store(address, grad.to(tl.float32) * factor, mask=i < n)
