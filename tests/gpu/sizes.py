"""What is large on the device of this run."""

from __future__ import annotations

import os
from typing import NamedTuple

DRY_RUN = os.environ.get("EMP_FAST_GPU_DRY_RUN") == "1"


class Sizes(NamedTuple):
    """Sizes at which kernels go wrong if they do at all."""

    classes: tuple[int, ...]
    many_rows: int  # times 10 classes: a long batch of short rows
    elements: int  # of one matrix of logits
    scores: int


_FULL = Sizes((50257, 128256, 151936, 262144), 2**24 + 3, 2**31 + 2**20, 10**9)
_DRY = Sizes((1031, 4099), 2**10 + 3, 2**16, 10**5)
SIZES = _DRY if DRY_RUN else _FULL
