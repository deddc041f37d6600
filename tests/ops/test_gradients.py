"""The written-out gradients of the reference backend against autograd of the specification."""

import itertools

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference

# float32 against float32: two orders of the same sums.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def autograd(run, grad: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """Gradients of `run(*inputs)`; an empty tensor for an input of None."""
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in inputs]
    run(*leaves).backward(grad)
    return [grad.new_empty(0) if leaf is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize("lengths", [[12], [13], [3, 0, 9, 1], [0]], ids=str)
@pytest.mark.parametrize(("ratio", "halo"), [(4, 0), (3, 2), (50, 60)])
@pytest.mark.parametrize("static", [True, False], ids=["static", "per-window"])
@pytest.mark.parametrize("extras", [True, False], ids=["norm-and-bias", "plain"])
def test_attention_pool(lengths: list[int], ratio: int, halo: int, static: bool, extras: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = sum(-(-n // ratio) for n in lengths)
    x = 3 * torch.randn(sum(lengths), 8, generator=generator)
    q = torch.randn(*[rows] * (not static), 2, 4, generator=generator)
    weight = torch.randn(8, generator=generator) if extras else None
    bias = torch.randn(2, ratio + 2 * halo, generator=generator) if extras else None
    grad = torch.randn(rows, 8, generator=generator)
    positional = (ratio, offsets(lengths), halo, 0.7, weight, bias, 1e-5)
    out, lse = reference.attention_pool_with_lse(x, q, *positional)
    actual = reference.attention_pool_backward(grad, x, q, out, lse, *positional)
    options = {"ratio": ratio, "cu_seqlens": offsets(lengths), "halo": halo, "scale": 0.7, "eps": 1e-5}
    expected = autograd(
        lambda x, q, w, b: reference.attention_pool(x, q, norm_weight=w, window_bias=b, **options),
        *(grad, x, q, weight, bias),
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


@pytest.mark.parametrize(("lengths", "queries"), [([12], [3]), ([3, 0, 9, 1], [2, 2, 0, 1]), ([0], [2]), ([4], [0])])
@pytest.mark.parametrize("norm", [True, False])
def test_cross_pool(lengths: list[int], queries: list[int], norm: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(sum(lengths), 8, generator=generator)
    q = torch.randn(sum(queries), 2, 4, generator=generator)
    weight = torch.randn(8, generator=generator) if norm else None
    grad = torch.randn(sum(queries), 8, generator=generator)
    positional = (offsets(lengths), offsets(queries), 0.7, weight, 1e-5)
    out, lse = reference.cross_pool_with_lse(x, q, *positional)
    actual = reference.cross_pool_backward(grad, x, q, out, lse, *positional)
    options = {"cu_seqlens": offsets(lengths), "cu_queries": offsets(queries), "scale": 0.7, "eps": 1e-5}
    expected = autograd(lambda x, q, w: reference.cross_pool(x, q, norm_weight=w, **options), grad, x, q, weight)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


def test_the_log_sum_exp_is_that_of_the_logits() -> None:
    x, q = torch.randn(6, 8), torch.randn(2, 4)
    r = reference.rms_norm(x, None, 1e-5).view(3, 2, 2, 4)  # windows of 2
    logits = 0.7 * torch.einsum("kwhd,hd->kwh", r, q)
    _, lse = reference.attention_pool_with_lse(x, q, 2, None, 0, 0.7, None, None, 1e-5)
    torch.testing.assert_close(lse, logits.exp().sum(1).log(), **TOLERANCE)
