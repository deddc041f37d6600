"""num_windows and window_offsets: how many rows a pack gives, and where they stand."""

import math
from typing import Any

import pytest
import torch

from condense_core import ops
from tests.ops.oracles import cumulative


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([12], id="full windows"),
        pytest.param([13], id="a short last window"),
        pytest.param([3, 0, 9, 1], id="an empty sequence"),
        pytest.param([0, 0, 5], id="shorter than the ratio"),
    ],
)
def test_window_offsets(lengths: list[int], dtype: torch.dtype) -> None:
    for ratio in (1, 4, 10**30):
        offsets = ops.window_offsets(cumulative(lengths).to(dtype), ratio)
        assert offsets.dtype == dtype
        assert offsets.diff().tolist() == [math.ceil(length / ratio) for length in lengths]
        assert offsets[0] == 0


@pytest.mark.parametrize(("num_tokens", "ratio", "expected"), [(0, 4, 0), (1, 4, 1), (8, 4, 2), (9, 4, 3), (5, 99, 1)])
def test_num_windows(num_tokens: int, ratio: int, expected: int) -> None:
    assert ops.num_windows(num_tokens, ratio) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param((-1, 4), ValueError, "num_tokens is -1", id="negative tokens"),
        pytest.param((4, 0), ValueError, "ratio is 0", id="ratio of 0"),
        pytest.param((4.0, 2), TypeError, "num_tokens is 4.0", id="tokens of float"),
        pytest.param((4, True), TypeError, "ratio is True", id="ratio of bool"),
    ],
)
def test_bad_numbers_are_named(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        ops.num_windows(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        pytest.param([0, 4], id="a list"),
        pytest.param(torch.tensor([1, 4]), id="not from 0"),
        pytest.param(torch.tensor([0, 4, 2]), id="falling"),
        pytest.param(torch.tensor(4), id="one number"),
    ],
)
def test_bad_offsets_are_named(cu_seqlens: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="cu_seqlens"):
        ops.window_offsets(cu_seqlens, 2)
