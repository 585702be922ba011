"""The least traffic of the sweep's work: inputs read once, outputs written once."""

from __future__ import annotations

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
#: Bytes per row besides its logits, and how often the logits are read or written.
_ROW_BYTES = {"scores": (28, 1), "step": (56, 2), "backward": (28, 2)}
_UPDATE_BYTES = 36  # per row


def floor_bytes(case: str) -> int:
    """The floor of a case in bytes, by its name as in benchmarks/sweep.py.

    "scores 512 x 1000 bfloat16" (or "step", "backward"), "select 30% of 1e+06", "update 4096".
    """
    work, *rest = case.split()
    if work == "select":
        share, _, number = rest
        n = int(float(number))
        return 4 * n + 8 * int(int(share.removesuffix("%")) / 100 * n)
    if work == "update":
        return _UPDATE_BYTES * int(rest[0])
    rows, _, classes, dtype = rest
    beside, moves = _ROW_BYTES[work]
    return int(rows) * (moves * int(classes) * _ITEM_BYTES[dtype] + beside)
