"""query_moments on Triton: kernels/query_moments.py against condense_core/ops/reference/query_moments.py."""

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import query_moments as kernel
from condense_core.ops import reference
from condense_core.ops.arguments import QueryMomentsArgs

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")

# Moments of queries of order 1. fp32: another order of summation. 16 bits: the kernel rounds what it multiplies,
# relative to a nearby mean, to the dtype: twice the unit roundoff (2^-12, 2^-9) of sqrt(cov_ii cov_jj), here of order
# 1, and some to spare.
TOLERANCES = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float16: {"atol": 1.5e-3, "rtol": 1e-3},
    torch.bfloat16: {"atol": 1.2e-2, "rtol": 8e-3},
}


def draw(
    *,
    batch: int = 1,
    num_heads: int = 2,
    num_tokens: int = 40,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.5,
    std: float = 1.0,
    rotated: bool = False,
    factor: float = 1.0,
    sink: int = 4,
    bounds: Tensor | None = None,
) -> QueryMomentsArgs:
    """Arguments of the op: queries whose channels are correlated, around a mean of their own.

    Those of `rotated` queries have cos and sin, as rotary embeddings give them; a factor other than 1 is YaRN's.
    """
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(head_dim) + 0.3 * torch.randn(head_dim, head_dim, generator=generator)
    q = torch.randn(batch, num_heads, num_tokens, head_dim, generator=generator) @ mix / (1 + 0.3 * head_dim**0.5)
    q = mean * torch.randn(num_heads, 1, head_dim, generator=generator).sign() + std * q
    frequency = 100.0 ** (-torch.arange(head_dim // 2) / max(head_dim // 2, 1))
    angle = (torch.arange(num_tokens)[:, None] * frequency).repeat(1, 2)[None]
    cos, sin = (factor * angle.cos()).to(DEVICE), (factor * angle.sin()).to(DEVICE)
    return QueryMomentsArgs(
        q=q.to(DEVICE, dtype), cos=cos if rotated else None, sin=sin if rotated else None, sink=sink, bounds=bounds
    )


def check(args: QueryMomentsArgs) -> tuple[Tensor, Tensor]:
    """The kernels' mu and cov, after they were found right."""
    actual = kernel.forward(args)
    expected = reference.query_moments(*args._replace(q=args.q.float()))
    for name, a, e in zip(("mu", "cov"), actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, **TOLERANCES[args.q.dtype], msg=lambda m, name=name: f"{name}: {m}")
    return actual


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"num_tokens": 130}, id="splits-of-several-tiles"),
        pytest.param({"batch": 2, "num_tokens": 37, "head_dim": 20}, id="head_dim-no-power-of-two"),
        pytest.param({"num_tokens": 5}, id="one-token-after-the-sinks"),
        pytest.param({"num_tokens": 1}, id="only-a-sink"),
        pytest.param({"num_tokens": 0}, id="no-tokens"),
        pytest.param({"num_heads": 1, "head_dim": 136}, id="a-covariance-in-three-programs"),
    ],
)
def test_shapes(shape: dict[str, int], rotated: bool, dtype: torch.dtype) -> None:
    check(draw(**shape, rotated=rotated, dtype=dtype))


def test_an_odd_width_without_a_rotation() -> None:
    check(draw(head_dim=7))


@settings(max_examples=10, deadline=None)
@given(
    num_tokens=st.integers(0, 60),
    half=st.integers(1, 12),
    rotated=st.booleans(),
    sink=st.integers(0, 70),
    bounds=st.lists(st.tuples(st.integers(-3, 65), st.integers(-3, 65)), min_size=2, max_size=2),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_shape_and_padding(
    num_tokens: int, half: int, rotated: bool, sink: int, bounds: list[tuple[int, int]], index_dtype: torch.dtype
) -> None:
    on_device = torch.tensor(bounds, dtype=index_dtype, device=DEVICE)
    shape = {"batch": 2, "num_heads": 1, "num_tokens": num_tokens, "head_dim": 2 * half}
    check(draw(**shape, rotated=rotated, sink=sink, bounds=on_device))


def test_padding_is_not_read() -> None:
    # Left, right, fewer real tokens than sinks, none, and bounds outside of the tensor.
    bounds = torch.tensor([[7, 50], [0, 33], [10, 13], [20, 20], [-3, 99]], device=DEVICE)
    args = draw(batch=5, num_tokens=50, bounds=bounds)
    args.q[0, :, :7], args.q[1, :, 33:] = NAN, INF
    args.q[2, :, :10] = args.q[2, :, 13:] = args.q[3] = NAN
    mu, cov = check(args)
    assert not mu[2:4].any()
    assert not cov[2:4].any()


def test_a_mean_far_from_zero_does_not_cancel(dtype: torch.dtype) -> None:
    """About zero, second moments of 2,500 would leave nothing of a covariance of 0.01 in fp32 or less."""
    args = draw(num_tokens=200, dtype=dtype, mean=50.0, std=0.1 if dtype == torch.float32 else 3.0, sink=0)
    mu, cov = kernel.forward(args)
    expected_mu, expected_cov = reference.query_moments(*args._replace(q=args.q.double()))
    torch.testing.assert_close(mu.double(), expected_mu, atol=TOLERANCES[dtype]["atol"], rtol=1e-5)
    size = expected_cov.diagonal(dim1=-2, dim2=-1).max()
    torch.testing.assert_close(cov.double() / size, expected_cov / size, **TOLERANCES[dtype])


def test_a_factor_on_the_rotation_is_taken_out() -> None:
    before = draw(num_tokens=60, rotated=True, factor=1.3)
    low, high = before.q.chunk(2, -1)
    rotated = before.q * before.cos[:, None] + torch.cat([-high, low], -1) * before.sin[:, None]
    expected = kernel.forward(before._replace(cos=None, sin=None))
    for a, e in zip(kernel.forward(before._replace(q=rotated)), expected, strict=True):
        torch.testing.assert_close(a, e, atol=5e-6, rtol=1e-5)


def test_strided_inputs_and_the_same_bits_every_time() -> None:
    args = draw(batch=2, rotated=True)
    expected, q = kernel.forward(args), args.q
    views = {
        "itself": q,
        "as a projection leaves it": q.transpose(1, 2).contiguous().transpose(1, 2),
        "channels apart": q.mT.contiguous().mT,
    }
    for name, view in views.items():
        for a, e in zip(kernel.forward(args._replace(q=view)), expected, strict=True):
            assert torch.equal(a, e), name


def test_nan_stays_with_its_head() -> None:
    args = draw()
    clean = kernel.forward(args)
    args.q[0, 1, 20, 3] = NAN
    for a, e in zip(kernel.forward(args), clean, strict=True):
        assert torch.equal(a[:, 0], e[:, 0])
        assert a[:, 1].isnan().any()


@pytest.mark.usefixtures("triton_backend")
def test_through_the_public_op() -> None:
    args = draw(rotated=True)
    expected = reference.query_moments(*args)
    for a, e in zip(ops.query_moments(args.q, args.cos, args.sin), expected, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCES[torch.float32])
    assert "more than 256" in str(kernel.unsupported(draw(num_tokens=1, head_dim=257)))
