"""key_norm: the specification against a loop, the public function, and its registration."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference
from tests.ops.oracles import INF, Bounds, norm, on_device, score_sequences

# The oracle sums the same fp64 numbers in another order.
TOLERANCES = {"rtol": 1e-12, "atol": 1e-12}
# In fp32 from 16-bit input, over 16 terms.
TOLERANCES_FP32 = {"rtol": 1e-5, "atol": 1e-6}


def keys(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


BOUNDS = {
    "all real": None,
    "padding on the right, on the left": [[0, 21], [5, 27]],
    "nothing real, crossed": [[4, 4], [9, 2]],
    "beyond the tokens": [[-3, 11], [26, 90]],
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
@pytest.mark.parametrize(
    ("sink", "window"),
    [
        pytest.param(0, 0, id="nothing forced"),
        pytest.param(2, 3, id="both ends forced"),
        pytest.param(40, 0, id="more sinks than tokens"),
    ],
)
def test_it_equals_a_walk_token_by_token(bounds: Bounds, sink: int, window: int) -> None:
    k = keys(2, 2, 27, 5, dtype=torch.float64)
    k[0, 0, 7] = 0.0
    actual = reference.key_norm(k=k, sink=sink, window=window, bounds=on_device(bounds))
    expected = score_sequences(lambda rows: [-norm(x) for x in rows], k, bounds=bounds, sink=sink, window=window)
    torch.testing.assert_close(actual, expected, **TOLERANCES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    k = keys(1, 2, 30, 16, dtype=dtype)
    scores = ops.key_norm(k)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reference.key_norm(k.double()).float(), **TOLERANCES_FP32)


def test_no_tokens_no_scores() -> None:
    scores = ops.key_norm(torch.zeros(2, 3, 0, 4), bounds=torch.zeros(2, 2, dtype=torch.int64))
    assert scores.shape == (2, 3, 0)
    assert scores.dtype == torch.float32


def test_padding_is_not_read() -> None:
    k, bounds = keys(2, 2, 27, 4), torch.tensor([[0, 21], [5, 27]])
    clean = ops.key_norm(k, bounds=bounds)
    k[0, :, 21:], k[1, :, :5] = float("nan"), INF
    assert torch.equal(ops.key_norm(k, bounds=bounds), clean)


def test_more_sinks_than_64_bits_count_are_all_tokens() -> None:
    assert (ops.key_norm(keys(1, 1, 5, 4), sink=10**30) == INF).all()
    assert (ops.key_norm(keys(1, 1, 5, 4), window=10**30) == INF).all()


K = torch.zeros(2, 2, 9, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"k": K[0]}, ValueError, r"k has shape \[2, 9, 4\], expected \[B, G, N, D\]", id="rank"),
        pytest.param({"k": K.double()}, TypeError, "k has dtype torch.float64", id="dtype"),
        pytest.param({"k": K.tolist()}, TypeError, "k is a list, expected a torch.Tensor", id="no tensor"),
        pytest.param({"sink": -1}, ValueError, "sink is -1, expected an int >= 0", id="negative sink"),
        pytest.param({"sink": 1.0}, TypeError, r"sink is 1.0 \(float\)", id="sink of float"),
        pytest.param({"window": True}, TypeError, r"window is True \(bool\)", id="window of bool"),
        pytest.param({"bounds": [[0, 1]] * 2}, TypeError, "bounds is a list", id="bounds of list"),
        pytest.param(
            {"bounds": torch.zeros(3, 2).long()}, ValueError, r"bounds has shape \[3, 2\]", id="bounds of another batch"
        ),
        pytest.param({"bounds": torch.zeros(2, 2)}, TypeError, "bounds has dtype torch.float32", id="bounds of floats"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.key_norm(**{"k": K, **change})


def test_it_passes_opcheck() -> None:
    bounds = torch.tensor([[0, 21], [5, 27]])
    torch.library.opcheck(torch.ops.condense_core.key_norm.default, (keys(2, 2, 27, 8), 2, 3, bounds))


def test_it_is_traced_without_a_break() -> None:
    def scores(k: Tensor) -> Tensor:
        return ops.key_norm(2 * k, sink=1) + 1

    k = keys(2, 2, 27, 4)
    assert torch.equal(torch.compile(scores, fullgraph=True, backend="eager")(k), scores(k))
