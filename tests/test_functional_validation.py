"""Every argument of `emp_fast.functional`, wrong in every way: the error names it and its value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from emp_fast import functional

S, T, C, E, N = 6, 3, 10, 4, 12

IDS = torch.arange(S) % C
LOGITS = torch.linspace(-2, 2, S * C).view(S, C)
GROUPS = torch.arange(N) % 3

#: Good arguments of every public function; each test spoils one of them.
GOOD: dict[str, dict[str, Any]] = {
    "cross_entropy": {"logits": LOGITS, "target": IDS},
    "linear_cross_entropy": {
        "hidden": torch.ones(S, E),
        "classifier": torch.ones(C, E),
        "target": IDS,
    },
    "info_nce": {"query": torch.ones(S, E), "key": torch.ones(S, E)},
    "topk_indices": {"scores": torch.arange(float(N)), "k": 5},
}


class Bad(NamedTuple):
    """One wrong argument of one function."""

    function: str
    argument: str
    value: Any
    error: type[Exception]
    says: str  # of the value
    others: dict[str, Any] = {}  # noqa: RUF012  # to go with it

    def __str__(self) -> str:
        return f"{self.function}-{self.argument}-{self.says}"[:80]


def not_tensors(function: str, argument: str, none_is_wrong: bool = True) -> Iterator[Bad]:
    yield Bad(function, argument, np.ones(3, np.float32), TypeError, "got ndarray: array([1., 1.")
    yield Bad(function, argument, [0.5, 1.0], TypeError, "got list: [0.5, 1.0]")
    yield Bad(function, argument, 7, TypeError, "got int: 7")
    if none_is_wrong:
        yield Bad(function, argument, None, TypeError, "got NoneType: None")


def of_wrong_type(function: str, argument: str, good: torch.Tensor, *dtypes: str) -> Iterator[Bad]:
    for dtype in dtypes:
        bad = good.to(getattr(torch, dtype))
        yield Bad(function, argument, bad, TypeError, f"got torch.{dtype}")
    yield Bad(function, argument, good.to_sparse(), TypeError, "got layout torch.sparse_coo")


def of_wrong_shape(function: str, argument: str, *shapes: tuple[int, ...]) -> Iterator[Bad]:
    ids = argument in ("target", "offsets")
    for shape in shapes:
        bad = torch.zeros(shape, dtype=torch.int64 if ids else torch.float32)
        yield Bad(function, argument, bad, ValueError, f"got {shape}")


def elsewhere(function: str, argument: str, good: torch.Tensor) -> Bad:
    return Bad(function, argument, good.to("meta"), ValueError, "on cpu like")


def not_numbers(function: str, argument: str, *outside: float) -> Iterator[Bad]:
    for value in outside:
        yield Bad(function, argument, value, ValueError, f"got {value!r}")
    for value in ("a", True, [0.5], *([] if argument == "temperature" else [torch.tensor(0.5)])):
        yield Bad(function, argument, value, TypeError, f"got {value!r}")


def logits_and_hidden() -> Iterator[Bad]:
    for function, argument, width in (
        ("cross_entropy", "logits", C),
        ("linear_cross_entropy", "hidden", E),
    ):
        good = GOOD[function][argument]
        yield from not_tensors(function, argument)
        wrong = ("int64", "bool", "complex64", "float8_e4m3fn")
        yield from of_wrong_type(function, argument, good, *wrong)
        yield from of_wrong_shape(function, argument, (), (width,), (1, 1, S, width))
        yield Bad(
            *(function, argument, torch.zeros(S, T, width), ValueError, f"got ({S}, {T}, {width})"),
            {"offsets": torch.tensor([0, S])},
        )
    yield from of_wrong_shape("cross_entropy", "logits", (S, 0), (S, T, 0))


def target(function: str) -> Iterator[Bad]:
    yield from not_tensors(function, "target")
    yield from of_wrong_type(function, "target", IDS, "bool", "complex64", "uint64")
    yield from of_wrong_shape(function, "target", (), (S - 1,), (S, T), (S, 1))
    for shape in ((S,), (S, C + 1), (S + 1, C)):  # of probabilities
        yield Bad(function, "target", torch.zeros(shape), ValueError, f"got {shape}")
    yield elsewhere(function, "target", IDS)
    for row, value in ((0, C), (4, -1), (5, 2**40), (2, -101)):
        bad = IDS.clone()
        bad[row] = value
        yield Bad(function, "target", bad, IndexError, f"got {value} at position {row}")
    yield Bad(
        *(function, "target", torch.full((S,), -100), IndexError, "got -100 at position 0"),
        {"ignore_index": 3},
    )


def options(function: str) -> Iterator[Bad]:
    """What `cross_entropy` and `linear_cross_entropy` share."""
    weight = torch.ones(C)
    yield from not_tensors(function, "weight", none_is_wrong=False)
    yield from of_wrong_type(function, "weight", weight, "int64", "bool", "complex64")
    yield from of_wrong_shape(function, "weight", (), (C - 1,), (C + 1,), (1, C))
    yield elsewhere(function, "weight", weight)
    for value in (1.0, True, None, "a", torch.tensor(3)):
        yield Bad(function, "ignore_index", value, TypeError, f"got {value!r}")
    for value in (2**63, -(2**63) - 1):
        yield Bad(function, "ignore_index", value, ValueError, f"got {value}")
    outside = (-0.1, 1.0001, math.nan, math.inf)
    yield from not_numbers(function, "label_smoothing", *outside)
    yield Bad(function, "label_smoothing", None, TypeError, "got None")
    yield from not_numbers(function, "softcap", 0, -1.0, math.nan, math.inf)

    good = torch.tensor([0, S])
    yield from not_tensors(function, "offsets", none_is_wrong=False)
    yield from of_wrong_type(function, "offsets", good, "float32", "int16", "bool")
    yield from of_wrong_shape(function, "offsets", (), (0,), (1, 2))
    yield elsewhere(function, "offsets", good)
    for offsets, says in (
        ([1, S], f"got 1 and {S}"),
        ([0, S - 1], f"got 0 and {S - 1}"),
        ([0, S + 1], f"got 0 and {S + 1}"),
        ([0], "got 0 and 0"),
        ([0, 4, 2, S], "got 4 then 2 at position 2"),
        ([0, -1, S], "got 0 then -1 at position 1"),
    ):
        yield Bad(function, "offsets", torch.tensor(offsets), ValueError, says)


def linear() -> Iterator[Bad]:
    function = "linear_cross_entropy"
    classifier, bias = torch.ones(C, E), torch.ones(C)
    yield from not_tensors(function, "classifier")
    yield from of_wrong_type(function, "classifier", classifier, "int64", "bool", "float64")
    yield from of_wrong_shape(function, "classifier", (), (E,), (C, E + 1), (0, E), (1, C, E))
    yield elsewhere(function, "classifier", classifier)
    yield from not_tensors(function, "bias", none_is_wrong=False)
    yield from of_wrong_type(function, "bias", bias, "int64", "float16")
    yield from of_wrong_shape(function, "bias", (), (C - 1,), (C, 1))
    yield elsewhere(function, "bias", bias)


def contrastive() -> Iterator[Bad]:
    function, good = "info_nce", torch.ones(S, E)
    for argument in ("query", "key", "hidden"):
        yield from not_tensors(function, argument, none_is_wrong=argument != "hidden")
        yield from of_wrong_type(function, argument, good, "int64", "bool", "complex64")
        yield from of_wrong_shape(function, argument, (), (S,), (S, 0), (S, E, 1))
    yield from of_wrong_shape(function, "key", (S - 1, E), (S, E + 1))
    yield from of_wrong_shape(function, "hidden", (S - 1, E))
    yield Bad(function, "key", good.double(), TypeError, "got torch.float64")
    yield elsewhere(function, "key", good)
    yield elsewhere(function, "hidden", good)
    yield from not_numbers(function, "temperature", 0, -0.1, math.nan, math.inf)
    yield Bad(function, "temperature", None, TypeError, "got None")
    yield Bad(function, "temperature", torch.tensor(1), TypeError, "got torch.int64")
    yield Bad(function, "temperature", torch.ones(2), ValueError, r"got shape (2,) on cpu")
    yield Bad(function, "temperature", torch.tensor(-0.5), ValueError, "got -0.5")
    learnt = torch.nn.Parameter(torch.tensor(0.0))
    yield Bad(function, "temperature", learnt, ValueError, "got 0.0")
    yield elsewhere(function, "temperature", torch.tensor(0.5))
    for value in (None, 1, "no"):
        yield Bad(function, "symmetric", value, TypeError, f"got {value!r}")


def selection() -> Iterator[Bad]:
    function, scores = "topk_indices", torch.arange(float(N))
    yield from not_tensors(function, "scores")
    yield from of_wrong_type(function, "scores", scores, "int64", "bool", "complex64")
    yield from of_wrong_shape(function, "scores", (), (N, 1), (1, N))
    for value in (True, 1.0, None, "3", torch.tensor(3)):
        yield Bad(function, "k", value, TypeError, f"got {value!r}")
    for value in (-1, N + 1, 2**70):
        yield Bad(function, "k", value, ValueError, f"got {value}")

    quotas = {"group_k": [2, 2, 1]}
    for bad in not_tensors(function, "groups", none_is_wrong=False):
        yield bad._replace(others=quotas)
    for bad in of_wrong_type(function, "groups", GROUPS, "float32", "bool"):
        yield bad._replace(others=quotas)
    for shape in ((), (N - 1,), (N, 1)):
        groups = torch.zeros(shape, dtype=torch.int64)
        yield Bad(function, "groups", groups, ValueError, f"got {shape}", quotas)
    yield Bad(function, "groups", GROUPS - 1, ValueError, "got -1", quotas)
    yield Bad(function, "groups", GROUPS + 1, ValueError, "got 3", quotas)

    yield Bad(function, "group_k", [2, 2, 1], ValueError, "got group_k=[2, 2, 1] and groups=None")
    grouped = {"groups": GROUPS}
    for value, error, says in (
        (None, ValueError, "got group_k=None"),
        (5, ValueError, "got 5"),
        ([2, 2, 2], ValueError, "got [2, 2, 2], which sums to 6"),
        ([], ValueError, "got [], which sums to 0"),
        ([5], ValueError, "must lie in [0, 1), the length of group_k, got 2"),
        ([-1, 3, 3], ValueError, "got -1"),
        ([5, 0, 0], ValueError, "must lie in [0, 4], the size of group 0, got 5"),
        ([2.0, 2.0, 1.0], TypeError, "got [2.0, 2.0, 1.0]"),
        ([True, True, True], TypeError, "got [True, True, True]"),
        ([[2, 2, 1]], ValueError, "got [[2, 2, 1]]"),
        (["a", "b", "c"], TypeError, "got ['a', 'b', 'c']"),
        ([[1], [1, 2]], TypeError, "got [[1], [1, 2]]"),
        ([None, 3, 2], TypeError, "got [None, 3, 2]"),
        ([2**70, 0, 0], TypeError, f"got [{2**70}, 0, 0]"),
        (torch.tensor([2.0, 2.0, 1.0]), TypeError, "got tensor([2., 2., 1.])"),
        (torch.tensor([2, 2, 1]).to_sparse(), TypeError, "got layout torch.sparse_coo"),
    ):
        yield Bad(function, "group_k", value, error, says, grouped)


BAD = [
    *logits_and_hidden(),
    *(
        b
        for f in ("cross_entropy", "linear_cross_entropy")
        for g in (target, options)
        for b in g(f)
    ),
    *linear(),
    *contrastive(),
    *selection(),
]


def test_every_argument_of_every_function_is_tried() -> None:
    tried = {(bad.function, bad.argument) for bad in BAD}
    for name in functional.__all__:
        function: Callable[..., Any] = getattr(functional, name)
        if isinstance(function, type):
            continue
        code = function.__code__
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        assert {(name, argument) for argument in arguments} <= tried


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_the_error_names_the_argument_and_its_value(bad: Bad, backend: str) -> None:
    arguments = {**GOOD[bad.function], bad.argument: bad.value, **bad.others}
    with pytest.raises(bad.error, match=re.escape(bad.says)) as raised:
        getattr(functional, bad.function)(**arguments)
    assert re.search(rf"\b{bad.argument}\b", str(raised.value))


@pytest.mark.parametrize("function", GOOD)
def test_good_arguments_raise_nothing(function: str, backend: str) -> None:
    """Else the errors above would prove nothing."""
    getattr(functional, function)(**GOOD[function])


def test_the_position_of_a_bad_class_is_that_in_the_whole_target(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "_BLOCK_LOGITS", 2 * C)  # blocks of two rows
    bad = IDS.clone()
    bad[5] = C
    with pytest.raises(IndexError, match="got 10 at position 5"):
        functional.linear_cross_entropy(torch.ones(S, E), torch.ones(C, E), bad)


def test_a_refused_call_leaves_no_gradient_and_no_change(backend: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    bad = IDS.clone()
    bad[3] = C
    with pytest.raises(IndexError):
        functional.cross_entropy(logits, bad).loss.sum().backward()
    assert logits.grad is None
    assert torch.equal(logits.detach(), LOGITS)


def test_numbers_may_be_numpys(backend: str) -> None:
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    options: dict[str, Any] = {"ignore_index": 1, "label_smoothing": 0.125, "softcap": 2.0}
    numpys: dict[str, Any] = {
        "ignore_index": np.int64(1),
        "label_smoothing": np.float32(0.125),
        "softcap": np.float16(2.0),
    }
    wanted = functional.cross_entropy(logits, target, **options)
    assert torch.equal(functional.cross_entropy(logits, target, **numpys).loss, wanted.loss)
    assert functional.topk_indices(logits[:, 0], np.int32(4)).tolist() == [0, 1, 2, 3]
