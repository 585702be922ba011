"""What the distributed tests share: rules of every kind, stats, and a count of what is sent."""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from emp_fast import rules
from emp_fast.functional import SampleStats

N = 1003  # not a multiple of 8, nor of any number of ranks


class Mixed(rules.Rule):
    """A rule with buffers of many dtypes and shapes."""

    reads = ("loss",)

    def __repr__(self) -> str:
        return "Mixed()"

    def buffers(self, num_samples: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "half": torch.zeros(num_samples, 3, dtype=torch.bfloat16, device=device),
            "flag": torch.zeros(num_samples, dtype=torch.bool, device=device),
            "wide": torch.zeros(num_samples, 2, 2, dtype=torch.float64, device=device),
            "small": torch.zeros(num_samples, 5, dtype=torch.int16, device=device),
            "none": torch.zeros(num_samples, 0, device=device),
        }

    def step(self, stats: Any, state: Any) -> dict[str, Tensor]:
        loss = stats["loss"]
        return {
            "score": loss - state["score"].nan_to_num(posinf=1.0),
            "memory": state["memory"] * 0.5 + loss,
            "half": (state["half"] + loss[:, None]).bfloat16(),
            "flag": ~state["flag"] | (loss > 1),
            "wide": state["wide"] + loss.double()[:, None, None],
            "small": state["small"] + 1,
        }


RULES = [
    rules.EMP(0.7, decay=0.3),
    rules.AUM(),
    rules.UCB(0.5),
    rules.Forgetting(),
    rules.DynUnc(3),
    rules.RHO(torch.arange(N) / N),
    Mixed(),
]


def stats_of(indices: Tensor, step: int) -> SampleStats:
    """Stats that depend on the sample and the step alone, whoever computes them."""
    x = (indices * 2654435761 + step * 40503) % 1000003 / 1000003.0
    return SampleStats(
        loss=x.float() * 5,
        entropy=(1 - x).float(),
        el2n=x.float().sqrt(),
        margin=(x - 0.5).float() * 8,
        confidence=x.float(),
        correct=x > 0.4,
        count=torch.ones_like(indices, dtype=torch.int32),
    )


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Counts what is handed to the collectives, and how often."""
    counts = {"bytes": 0, "calls": 0}
    names = (
        "all_gather",
        "all_reduce",
        "all_to_all",
        "all_to_all_single",
        "broadcast",
        "all_gather_into_tensor",
        "all_gather_object",
        "send",
        "isend",
        "batch_isend_irecv",
    )
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = args[0] if name in ("all_reduce", "broadcast", "send", "isend") else args[1]
            counts["calls"] += 1
            counts["bytes"] += (
                sent.numel() * sent.element_size()
                if isinstance(sent, Tensor)
                else len(pickle.dumps(sent))
            )
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def bytes_on_the_wire() -> int:
    """What this process's TCP connections, Gloo's among them, have sent so far (Linux)."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed since, or no TCP connection
            continue
        total += int(struct.unpack_from("Q", info, _TCPI_BYTES_SENT)[0])
    return total


_TCPI_BYTES_SENT = 200  # its offset in struct tcp_info, linux/tcp.h, since Linux 4.19
