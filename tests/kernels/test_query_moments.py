"""The query_moments kernels against the specification."""

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import query_moments as kernel
from condense_core.ops import reference

# Moments of queries of order 1. fp32: another order of summation. 16 bits: the kernel rounds what it multiplies,
# relative to a nearby mean, to the dtype: twice the unit roundoff (2^-12, 2^-9) of sqrt(cov_ii cov_jj), here of order
# 1, and some to spare.
TOLERANCES = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float16: {"atol": 1.5e-3, "rtol": 1e-3},
    torch.bfloat16: {"atol": 1.2e-2, "rtol": 8e-3},
}


def draw(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int], *, mean: float = 0.5, std: float = 1.0
) -> Tensor:
    """Queries `[B, H, N, D]` whose channels are correlated, around a mean of their own."""
    generator = torch.Generator().manual_seed(0)
    d = shape[-1]
    mix = torch.eye(d) + 0.3 * torch.randn(d, d, generator=generator)
    x = torch.randn(shape, generator=generator) @ mix / (1 + 0.3 * d**0.5)
    return (mean * torch.randn(shape[1], 1, d, generator=generator).sign() + std * x).to(device, dtype)


def rotation(device: torch.device, tokens: int, head_dim: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin `[1, N, D]` as rotary embeddings give them; a factor other than 1 is YaRN's."""
    frequency = 100.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    angle = (torch.arange(tokens)[:, None] * frequency).repeat(1, 2)[None]
    return (factor * angle.cos()).to(device), (factor * angle.sin()).to(device)


def check(q: Tensor, *arguments: object, scale: float = 1.0) -> None:
    actual, expected = kernel.forward(q, *arguments), reference.query_moments(q.float(), *arguments)
    tolerance = TOLERANCES[q.dtype]
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, atol=scale * tolerance["atol"], rtol=tolerance["rtol"])


# Splits of several tiles, a short last one, fewer tokens than a tile, one token, none; widths beside powers of two.
@pytest.mark.parametrize("tokens", [130, 37, 1, 0])
@pytest.mark.parametrize("head_dim", [16, 20])
def test_shapes(tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    q = draw(device, dtype, (2, 3, tokens, head_dim))
    check(q, None, None, 0, None)
    check(q, *rotation(device, tokens, head_dim), 4, None)


def test_an_odd_width_without_a_rotation(device: torch.device) -> None:
    check(draw(device, torch.float32, (1, 2, 40, 7)), None, None, 2, None)


def test_a_head_too_wide_for_one_program(device: torch.device) -> None:
    q = draw(device, torch.float32, (1, 1, 40, 136))
    check(q, *rotation(device, 40, 136), 4, None)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_padding(index: torch.dtype, device: torch.device) -> None:
    q = draw(device, torch.float32, (5, 2, 50, 16))
    # Left, right, fewer real tokens than sinks, none, and bounds outside of the tensor.
    bounds = torch.tensor([[7, 50], [0, 33], [10, 13], [20, 20], [-3, 99]], dtype=index, device=device)
    q[0, :, :7], q[1, :, 33:] = float("nan"), float("inf")
    q[2, :, :10] = q[2, :, 13:] = q[3] = float("nan")
    mu, cov = kernel.forward(q, None, None, 4, bounds)
    expected_mu, expected_cov = reference.query_moments(q, None, None, 4, bounds)
    torch.testing.assert_close(mu, expected_mu, **TOLERANCES[torch.float32])
    torch.testing.assert_close(cov, expected_cov, **TOLERANCES[torch.float32])
    assert not mu[2:4].any()
    assert not cov[2:4].any()


def test_a_mean_far_from_zero_does_not_cancel(dtype: torch.dtype, device: torch.device) -> None:
    """About zero, second moments of 2,500 would leave nothing of a covariance of 0.01 in fp32 or less."""
    q = draw(device, dtype, (1, 2, 200, 16), mean=50.0, std=0.1 if dtype == torch.float32 else 3.0)
    mu, cov = kernel.forward(q, None, None, 0, None)
    expected_mu, expected_cov = reference.query_moments(q.double(), None, None, 0, None)
    torch.testing.assert_close(mu.double(), expected_mu, atol=TOLERANCES[dtype]["atol"], rtol=1e-5)
    size = expected_cov.diagonal(dim1=-2, dim2=-1).max()
    torch.testing.assert_close(cov.double() / size, expected_cov / size, **TOLERANCES[dtype])


def test_a_factor_on_the_rotation_is_taken_out(device: torch.device) -> None:
    p = draw(device, torch.float32, (1, 2, 60, 16))
    cos, sin = rotation(device, 60, 16, factor=1.3)
    low, high = p.chunk(2, -1)
    q = p * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
    for a, e in zip(kernel.forward(q, cos, sin, 4, None), kernel.forward(p, None, None, 4, None), strict=True):
        torch.testing.assert_close(a, e, atol=5e-6, rtol=1e-5)


def test_strided_inputs_and_the_same_bits_every_time(device: torch.device) -> None:
    q = draw(device, torch.float32, (2, 3, 40, 16))
    cos, sin = rotation(device, 40, 16)
    expected = kernel.forward(q, cos, sin, 4, None)
    as_projected = q.transpose(1, 2).contiguous().transpose(1, 2)
    last = q.mT.contiguous().mT
    for strided in (q, as_projected, last):
        for a, e in zip(kernel.forward(strided, cos, sin, 4, None), expected, strict=True):
            assert torch.equal(a, e)


def test_nan_stays_with_its_head(device: torch.device) -> None:
    q = draw(device, torch.float32, (1, 2, 40, 16))
    clean = kernel.forward(q, None, None, 4, None)
    q[0, 1, 20, 3] = float("nan")
    for a, e in zip(kernel.forward(q, None, None, 4, None), clean, strict=True):
        assert torch.equal(a[:, 0], e[:, 0])
        assert a[:, 1].isnan().any()


@pytest.mark.usefixtures("triton_backend")
def test_through_the_public_op(device: torch.device) -> None:
    q = draw(device, torch.float32, (1, 4, 40, 16))
    cos, sin = rotation(device, 40, 16)
    expected = reference.query_moments(q, cos, sin, 4)
    for a, e in zip(ops.query_moments(q, cos, sin), expected, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCES[torch.float32])
    assert "more than 256" in (kernel.unsupported(torch.empty(1, 1, 1, 257)) or "")
