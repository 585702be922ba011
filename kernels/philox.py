"""Counter-based random bits of consecutive samples: word 0 of Philox4x32-10.

Contract: `Backend.philox`, bit for bit. J. Salmon et al., "Parallel random numbers: as easy as 1,
2, 3", SC 2011. Traffic: 4 bytes written per sample. Tiles: `BLOCK` samples per program.
"""

import triton.language as tl

from ._jit import kernel


@kernel
def philox(
    bits_ptr,  # [n] int32
    n: tl.int64,
    start: tl.int64,
    key_low: tl.int64,  # the words of key and counter are uint32 values
    key_high: tl.int64,
    epoch: tl.int64,
    stream: tl.int64,
    BLOCK: tl.constexpr,
):
    """Sample ``start + i`` has the counter (index low, index high, epoch, stream)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = start + i
    c0 = index.to(tl.uint32)
    c1 = (index >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + epoch.to(tl.uint32)
    c3 = tl.zeros_like(c0) + stream.to(tl.uint32)
    k0 = tl.zeros_like(c0) + key_low.to(tl.uint32)
    k1 = tl.zeros_like(c0) + key_high.to(tl.uint32)
    m0 = tl.full([BLOCK], 0xD2511F53, tl.uint32)
    m1 = tl.full([BLOCK], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(m0, c0), m0 * c0
        high1, low1 = tl.umulhi(m1, c2), m1 * c2
        c0, c1 = high1 ^ c1 ^ k0, low1
        c2, c3 = high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    tl.store(bits_ptr + i, c0.to(tl.int32, bitcast=True), mask=i < n)
