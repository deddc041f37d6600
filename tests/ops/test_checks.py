"""Bad arguments: every one raises, and the message names the argument, what came and what was expected."""

from typing import Any

import pytest
import torch

from condense_core import ops

X = torch.ones(10, 8)
Q = torch.ones(2, 4)  # static
QK = torch.ones(3, 2, 4)  # one per window at ratio 4

# (arguments that differ from a good call, error, what its message must contain)
BAD_POOL = [
    ({"x": [[1.0]]}, TypeError, ["x is a list", "torch.Tensor"]),
    ({"x": X.double()}, TypeError, ["x has dtype torch.float64", "float32, bfloat16, float16"]),
    ({"x": X.long()}, TypeError, ["x has dtype torch.int64"]),
    ({"x": X.to_sparse()}, TypeError, ["x has layout torch.sparse_coo"]),
    ({"x": X[0]}, ValueError, ["x has shape [8]", "[T, d]"]),
    ({"x": X[None]}, ValueError, ["x has shape [1, 10, 8]", "[T, d]"]),
    ({"x": torch.ones(10, 0)}, ValueError, ["x has shape [10, 0]", "d >= 1"]),
    ({"q": None}, TypeError, ["q is a NoneType"]),
    ({"q": Q.int()}, TypeError, ["q has dtype torch.int32"]),
    ({"q": torch.ones(8)}, ValueError, ["q has shape [8]", "[heads, d/heads] or [K, heads, d/heads]"]),
    ({"q": QK[None]}, ValueError, ["q has shape [1, 3, 2, 4]"]),
    ({"q": Q.to("meta")}, ValueError, ["q is on meta", "cpu"]),
    ({"q": torch.ones(3, 2)}, ValueError, ["q has 3 heads", "divisor of d = 8"]),
    ({"q": torch.ones(0, 4)}, ValueError, ["q has 0 heads", "divisor of d = 8"]),
    ({"q": torch.ones(2, 5)}, ValueError, ["q has shape [2, 5]", "d/heads = 4"]),
    ({"q": torch.ones(4, 2, 4)}, ValueError, ["q has 4 rows", "expected 3"]),
    ({"heads": 4}, ValueError, ["q has shape [2, 4] but heads is 4"]),
    ({"heads": 2.0}, TypeError, ["heads is 2.0 (float)"]),
    ({"ratio": 0}, ValueError, ["ratio is 0", "int >= 1"]),
    ({"ratio": -4}, ValueError, ["ratio is -4", "int >= 1"]),
    ({"ratio": 4.0}, TypeError, ["ratio is 4.0 (float)", "int >= 1"]),
    ({"ratio": True}, TypeError, ["ratio is True (bool)"]),
    ({"ratio": "4"}, TypeError, ["ratio is '4' (str)"]),
    ({"halo": -1}, ValueError, ["halo is -1", "int >= 0"]),
    ({"halo": False}, TypeError, ["halo is False (bool)"]),
    ({"scale": float("nan")}, ValueError, ["scale is nan", "finite"]),
    ({"scale": float("inf")}, ValueError, ["scale is inf", "finite"]),
    ({"scale": "1"}, TypeError, ["scale is '1' (str)"]),
    ({"eps": 0.0}, ValueError, ["eps is 0.0", "positive"]),
    ({"eps": float("nan")}, ValueError, ["eps is nan", "positive"]),
    ({"eps": None}, TypeError, ["eps is None"]),
    ({"norm_weight": torch.ones(4)}, ValueError, ["norm_weight has shape [4]", "[8]"]),
    ({"norm_weight": torch.ones(8).int()}, TypeError, ["norm_weight has dtype torch.int32"]),
    ({"norm_weight": torch.ones(8).to("meta")}, ValueError, ["norm_weight is on meta"]),
    ({"window_bias": torch.ones(2, 5)}, ValueError, ["window_bias has shape [2, 5]", "[2, 4]"]),
    ({"window_bias": torch.ones(2, 4), "halo": 1}, ValueError, ["window_bias has shape [2, 4]", "[2, 6]"]),
    ({"window_bias": torch.ones(2, 4).bool()}, TypeError, ["window_bias has dtype torch.bool"]),
    ({"cu_seqlens": [0, 10]}, TypeError, ["cu_seqlens is a list", "[S+1]"]),
    ({"cu_seqlens": torch.tensor([0.0, 10.0])}, TypeError, ["cu_seqlens has dtype torch.float32", "int32"]),
    ({"cu_seqlens": torch.tensor([[0, 10]])}, ValueError, ["cu_seqlens has shape [1, 2]", "[S+1]"]),
    ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, ValueError, ["cu_seqlens has shape [0]"]),
    ({"cu_seqlens": torch.tensor(10)}, ValueError, ["cu_seqlens has shape []"]),
    ({"cu_seqlens": torch.tensor([1, 10])}, ValueError, ["cu_seqlens starts at 1", "0"]),
    ({"cu_seqlens": torch.tensor([0, 7, 5, 10])}, ValueError, ["cu_seqlens falls from 7 to 5 at sequence 1"]),
    ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, ["cu_seqlens ends at 9", "expected 10"]),
    ({"cu_seqlens": torch.tensor([0, 11])}, ValueError, ["cu_seqlens ends at 11", "expected 10"]),
]

BAD_CROSS = [
    ({"q": Q}, ValueError, ["q has shape [2, 4]", "[K, heads, d/heads]"]),
    ({"cu_seqlens": torch.tensor([0, 4, 10])}, ValueError, ["cu_queries is None", "2 sequences"]),
    ({"cu_queries": torch.tensor([0, 1, 3])}, ValueError, ["cu_queries is 2 sequences", "1 sequences"]),
    ({"cu_queries": torch.tensor([0, 2])}, ValueError, ["cu_queries ends at 2", "expected 3"]),
    ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, ["cu_seqlens ends at 2", "expected 10"]),
    ({"x": X.double()}, TypeError, ["x has dtype torch.float64"]),
    ({"norm_weight": torch.ones(3)}, ValueError, ["norm_weight has shape [3]"]),
    ({"scale": float("-inf")}, ValueError, ["scale is -inf"]),
    ({"eps": -1.0}, ValueError, ["eps is -1.0"]),
    ({"heads": 3}, ValueError, ["heads is 3"]),
]


def assert_one_line(error: pytest.ExceptionInfo[Exception], parts: list[str]) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("change", "error", "parts"), BAD_POOL, ids=lambda value: str(value)[:40])
def test_attention_pool(change: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    arguments = {"x": X, "q": Q, "ratio": 4} | change
    with pytest.raises(error) as caught:
        ops.attention_pool(arguments.pop("x"), arguments.pop("q"), **arguments)
    assert_one_line(caught, parts)


@pytest.mark.parametrize(("change", "error", "parts"), BAD_CROSS, ids=lambda value: str(value)[:40])
def test_cross_pool(change: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    arguments = {"x": X, "q": QK} | change
    with pytest.raises(error) as caught:
        ops.cross_pool(arguments.pop("x"), arguments.pop("q"), **arguments)
    assert_one_line(caught, parts)


def test_the_calls_that_the_bad_ones_differ_from_are_good() -> None:
    assert ops.attention_pool(X, Q, ratio=4).shape == (3, 8)
    assert ops.attention_pool(X, QK, ratio=4, heads=2, cu_seqlens=torch.tensor([0, 10]).int()).shape == (3, 8)
    assert ops.attention_pool(X, Q, ratio=4, halo=1, window_bias=torch.ones(2, 6)).shape == (3, 8)
    assert ops.cross_pool(X, QK).shape == (3, 8)


def test_per_window_queries_are_counted_per_sequence() -> None:
    ends = torch.tensor([0, 5, 10])  # 2 + 2 windows, where one sequence of 10 would have 3
    assert ops.attention_pool(X, torch.ones(4, 2, 4), ratio=4, cu_seqlens=ends).shape == (4, 8)
    with pytest.raises(ValueError, match=r"q has 3 rows .* expected 4"):
        ops.attention_pool(X, QK, ratio=4, cu_seqlens=ends)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ((-1, 4), ValueError, ["num_tokens is -1"]),
        ((4, 0), ValueError, ["ratio is 0"]),
        ((4.0, 2), TypeError, ["num_tokens is 4.0"]),
        ((4, True), TypeError, ["ratio is True"]),
    ],
)
def test_num_windows(arguments: tuple[Any, Any], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        ops.num_windows(*arguments)
    assert_one_line(caught, parts)


@pytest.mark.parametrize("cu_seqlens", [[0, 4], torch.tensor([1, 4]), torch.tensor([0, 4, 2]), torch.tensor(4)])
def test_window_offsets(cu_seqlens: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="cu_seqlens"):
        ops.window_offsets(cu_seqlens, 2)
