"""value_projection_norm: the specification against a loop, the public function, and its registration."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference
from tests.ops.oracles import INF, Bounds, on_device, real_tokens

# The oracle sums the same fp64 numbers in another order.
TOLERANCES = {"rtol": 1e-12, "atol": 1e-12}
# In fp32 from 16-bit input, over 16 channels and 20 outputs.
TOLERANCES_FP32 = {"rtol": 1e-5, "atol": 1e-6}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


BOUNDS = {
    "all real": None,
    "padding on the right, on the left": [[0, 21], [5, 27]],
    "nothing real, crossed": [[4, 4], [9, 2]],
    "beyond the tokens": [[-3, 11], [26, 90]],
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
@pytest.mark.parametrize("group", [1, 3])
def test_it_is_the_norm_of_what_a_head_adds(bounds: Bounds, group: int) -> None:
    v = draw(2, 2, 27, 5, dtype=torch.float64)
    w_o = draw(11, 2 * group * 5, seed=1, dtype=torch.float64)
    expected = torch.full((2, 2, 27), -INF, dtype=torch.float64)
    for b in range(2):
        for i in real_tokens(bounds, b, 27):
            for h in range(2 * group):
                heads = torch.zeros(2 * group, 5, dtype=torch.float64)  # an attention output that holds head h alone
                heads[h] = v[b, h // group, i]
                added = (w_o @ heads.flatten()).abs().sum() / group
                expected[b, h // group, i] = added if h % group == 0 else expected[b, h // group, i] + added
    actual = reference.value_projection_norm(v=v, w_o=w_o, bounds=on_device(bounds))
    torch.testing.assert_close(actual, expected, **TOLERANCES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    v, w_o = draw(1, 2, 30, 16, dtype=dtype), draw(20, 64, seed=1, dtype=dtype)
    scores = ops.value_projection_norm(v, w_o)
    assert scores.dtype == torch.float32
    expected = reference.value_projection_norm(v.double(), w_o.double()).float()
    torch.testing.assert_close(scores, expected, **TOLERANCES_FP32)


def test_no_tokens_no_scores() -> None:
    bounds = torch.zeros(2, 2, dtype=torch.int64)
    scores = ops.value_projection_norm(torch.zeros(2, 3, 0, 4), torch.ones(6, 24), bounds=bounds)
    assert scores.shape == (2, 3, 0)
    assert scores.dtype == torch.float32


def test_padding_is_not_read() -> None:
    v, w_o, bounds = draw(2, 2, 27, 4), draw(6, 16, seed=1), torch.tensor([[0, 21], [5, 27]])
    clean = ops.value_projection_norm(v, w_o, bounds=bounds)
    v[0, :, 21:], v[1, :, :5] = float("nan"), INF
    assert torch.equal(ops.value_projection_norm(v, w_o, bounds=bounds), clean)


V, W_O = torch.zeros(2, 2, 9, 4), torch.zeros(6, 16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"v": V[0]}, ValueError, r"v has shape \[2, 9, 4\], expected \[B, G, N, D\]", id="rank of v"),
        pytest.param({"v": V.double()}, TypeError, "v has dtype torch.float64", id="dtype of v"),
        pytest.param({"v": V.tolist()}, TypeError, "v is a list, expected a torch.Tensor", id="v of list"),
        pytest.param(
            {"w_o": torch.zeros(6, 12)},
            ValueError,
            r"w_o has shape \[6, 12\].*D = 4 and H a multiple of v's 2",
            id="heads that do not divide",
        ),
        pytest.param({"w_o": torch.zeros(6, 0)}, ValueError, r"w_o has shape \[6, 0\]", id="no heads"),
        pytest.param({"w_o": torch.zeros(0, 8)}, ValueError, r"w_o has shape \[0, 8\]", id="no outputs"),
        pytest.param({"w_o": torch.zeros(16)}, ValueError, r"w_o has shape \[16\]", id="rank of w_o"),
        pytest.param(
            {"w_o": W_O.half()}, TypeError, "w_o has dtype torch.float16, expected torch.float32", id="mixed dtypes"
        ),
        pytest.param(
            {"w_o": W_O.to("meta")}, ValueError, "w_o is on meta, expected cpu, where v is", id="another device"
        ),
        pytest.param({"w_o": W_O.to_sparse()}, TypeError, "w_o has layout torch.sparse_coo", id="sparse"),
        pytest.param({"w_o": None}, TypeError, "w_o is a NoneType, expected a torch.Tensor", id="no w_o"),
        pytest.param({"bounds": [[0, 1]] * 2}, TypeError, "bounds is a list", id="bounds of list"),
        pytest.param(
            {"bounds": torch.zeros(3, 2).long()}, ValueError, r"bounds has shape \[3, 2\]", id="bounds of another batch"
        ),
        pytest.param({"bounds": torch.zeros(2, 2)}, TypeError, "bounds has dtype torch.float32", id="bounds of floats"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.value_projection_norm(**{"v": V, "w_o": W_O, **change})


def test_it_passes_opcheck() -> None:
    arguments = (draw(2, 2, 27, 8), draw(6, 32, seed=1), torch.tensor([[0, 21], [5, 27]]))
    torch.library.opcheck(torch.ops.condense_core.value_projection_norm.default, arguments)


def test_it_is_traced_without_a_break() -> None:
    def scores(v: Tensor, w_o: Tensor) -> Tensor:
        return ops.value_projection_norm(2 * v, w_o) + 1

    v, w_o = draw(2, 2, 27, 4), draw(6, 16, seed=1)
    assert torch.equal(torch.compile(scores, fullgraph=True, backend="eager")(v, w_o), scores(v, w_o))
