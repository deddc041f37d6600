"""key_norm on Triton: kernels/key_norm.py against condense_core/ops/reference/key_norm.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import key_norm as kernel
from condense_core.ops import reference
from condense_core.ops.arguments import KeyNormArgs

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")

# Kernel and reference square and add in fp32 what is the same input, so the dtype does not matter: another order of at
# most 256 terms of one sign, some units of 2^-24 each, then a correctly rounded root.
TOLERANCES = {"rtol": 3e-6, "atol": 0.0}


def draw(
    *,
    batch: int = 2,
    num_kv_heads: int = 2,
    num_tokens: int = 40,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> KeyNormArgs:
    """Arguments of the op, with keys of very different norm from token to token."""
    k = torch.randn(batch, num_kv_heads, num_tokens, head_dim, generator=torch.Generator().manual_seed(0))
    k *= torch.linspace(0.1, 6.0, max(num_tokens, 1))[:num_tokens, None]
    return KeyNormArgs(k=k.to(DEVICE, dtype), sink=0, window=0, bounds=None)._replace(**changes)


def check(args: KeyNormArgs) -> Tensor:
    """The kernel's scores, after they were found right."""
    scores = kernel.forward(args)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reference.key_norm(*args), equal_nan=True, **TOLERANCES)
    return scores


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"num_tokens": 70, "head_dim": 128}, id="three-tiles-of-32-tokens"),
        pytest.param({"num_tokens": 33, "head_dim": 80}, id="head_dim-no-power-of-two"),
        pytest.param({"num_tokens": 17, "head_dim": 256}, id="head_dim-256"),
        pytest.param({"batch": 1, "num_kv_heads": 1, "num_tokens": 1, "head_dim": 1}, id="one-number"),
        pytest.param({"num_tokens": 0}, id="no-tokens"),
    ],
)
def test_shapes(shape: dict[str, int]) -> None:
    check(draw(**shape))


def test_dtypes(dtype: torch.dtype) -> None:
    check(draw(dtype=dtype))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    num_kv_heads=st.integers(1, 3),
    num_tokens=st.integers(1, 70),
    head_dim=st.integers(1, 40),
    sink=st.integers(0, 80),
    window=st.integers(0, 80),
    bounds=st.lists(st.tuples(st.integers(-3, 75), st.integers(-3, 75)), min_size=2, max_size=2),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_shape_padding_and_forced_tokens(
    batch: int,
    num_kv_heads: int,
    num_tokens: int,
    head_dim: int,
    sink: int,
    window: int,
    bounds: list[tuple[int, int]],
    index_dtype: torch.dtype,
) -> None:
    args = draw(batch=batch, num_kv_heads=num_kv_heads, num_tokens=num_tokens, head_dim=head_dim)
    on_device = torch.tensor(bounds[:batch], dtype=index_dtype, device=DEVICE)
    check(args._replace(sink=sink, window=window, bounds=on_device))


def test_what_stands_in_the_padding_has_no_influence() -> None:
    args = draw(sink=2, window=3, bounds=torch.tensor([[5, 40], [0, 33]], device=DEVICE))
    scores = check(args)
    args.k[0, :, :5], args.k[1, :, 33:] = NAN, INF
    assert torch.equal(kernel.forward(args), scores)


def test_strides_do_not_matter() -> None:
    args = draw(num_tokens=21, head_dim=24, sink=1, window=2, bounds=torch.tensor([[1, 5], [20, 21]], device=DEVICE))
    expected, k = kernel.forward(args), args.k
    views = {
        "as a projection leaves it": k.transpose(1, 2).contiguous().transpose(1, 2),
        "half of a row": torch.cat([k, k], 3)[..., 24:],
        "half of the tokens": torch.cat([k, k], 2)[:, :, 21:],
        "channels apart": k.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, view in views.items():
        assert torch.equal(kernel.forward(args._replace(k=view)), expected), name
    columns = args.bounds.t().contiguous().t()
    assert torch.equal(kernel.forward(args._replace(bounds=columns)), expected)


def test_nan_and_infinity_stay_with_their_token() -> None:
    args = draw(batch=1, sink=1, bounds=torch.tensor([[0, 39]], device=DEVICE))
    for head, token, bad in [(1, 3, NAN), (0, 8, INF), (0, 0, NAN), (0, 39, NAN)]:
        args.k[0, head, token, 5] = bad
    scores = check(args)
    assert scores.isnan().nonzero().tolist() == [[0, 1, 3]]
    assert scores[0, 0, 8] == -INF
    assert scores[0, 0, 0] == INF, "a sink"
    assert scores[0, 0, 39] == -INF, "padding"


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it() -> None:
    args = draw(num_tokens=35, sink=2, window=3, bounds=torch.tensor([[0, 30], [4, 35]], device=DEVICE))
    actual = ops.key_norm(args.k, sink=args.sink, window=args.window, bounds=args.bounds)
    assert torch.equal(actual, kernel.forward(args))


def test_a_row_too_long_for_a_tile_is_declined() -> None:
    assert kernel.unsupported(draw(batch=1, num_tokens=1, head_dim=4096)) is None
    assert "4097" in str(kernel.unsupported(draw(batch=1, num_tokens=1, head_dim=4097)))
