"""The bytes that the sweep's work cannot do without: inputs read once, outputs written once."""

from __future__ import annotations

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
#: Of a row besides its logits, and how often its logits move.
_ROW_BYTES = {"scores": (28, 1), "step": (56, 2), "backward": (28, 2)}
_UPDATE_BYTES = 36  # a row


def floor_bytes(case: str) -> int:
    """Of a case by its name, as benchmarks/sweep.py spells it.

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
