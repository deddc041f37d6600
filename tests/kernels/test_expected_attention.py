"""The expected_attention kernels against the specification."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condense_core import ops
from condense_core.kernels import expected_attention as kernel
from condense_core.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative, since the scores of a long sequence are small. fp32: another order of summation, through an exponential of
# logits of order 5. 16 bits: k enters both with the same bits, but a GPU multiplies in TF32, off by 2^-9 of a quadratic
# term of order 1 in the logit; the interpreter multiplies in fp32.
TOLERANCES = {
    torch.float32: {"atol": 1e-7, "rtol": 2e-5},
    torch.float16: {"atol": 1e-6, "rtol": 1e-2},
    torch.bfloat16: {"atol": 1e-6, "rtol": 1e-2},
}


def draw(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    kv_heads: int = 2,
    group: int = 2,
    tokens: int = 70,
    head_dim: int = 16,
    rotation: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments in the order of the op."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    heads = kv_heads * group
    root = normal(batch, heads, head_dim, head_dim) / head_dim**0.5
    angle = normal(head_dim // 2).repeat(2)
    return {
        "k": normal(batch, kv_heads, tokens, head_dim).to(dtype),
        "v": normal(batch, kv_heads, tokens, head_dim).to(dtype),
        "mu": normal(batch, heads, head_dim),
        "cov": root @ root.mT,
        "mean_cos": 0.8 * angle.cos() if rotation else None,
        "mean_sin": 0.8 * angle.sin() if rotation else None,
        "scale": head_dim**-0.5,
        "epsilon": 0.0,
        "sink": 4,
        "bounds": None,
    }


def check(arguments: dict[str, Any]) -> Tensor:
    """The kernel's scores, after they were found right."""
    dtype = arguments["k"].dtype
    actual = kernel.forward(**arguments)
    expected = reference.expected_attention(**arguments)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, **TOLERANCES[dtype])
    return actual


# Several tiles with a short last one, less than a tile, nothing but sinks, one token, none; widths beside powers of
# two.
@pytest.mark.parametrize("tokens", [150, 33, 3, 1, 0])
@pytest.mark.parametrize("head_dim", [16, 20])
def test_shapes(tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    check(draw(dtype, batch=2, tokens=tokens, head_dim=head_dim))


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_heads(kv_heads: int, group: int) -> None:
    check(draw(torch.float32, kv_heads=kv_heads, group=group))


@pytest.mark.parametrize("head_dim", [7, 72, 136])
def test_widths(head_dim: int) -> None:
    check(draw(torch.float32, tokens=20, kv_heads=1, head_dim=head_dim, rotation=head_dim % 2 == 0))


def test_what_may_be_left_out() -> None:
    arguments = draw(torch.float32)
    for name in ("v", "cov", "bounds"):
        check(arguments | {name: None})
    check(arguments | {"mean_cos": None, "mean_sin": None})
    check(arguments | {"epsilon": 0.01, "scale": -0.3, "sink": 0})


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_padding(index: torch.dtype) -> None:
    arguments = draw(torch.float32, batch=5, tokens=50)
    bounds = torch.tensor([[7, 50], [0, 33], [10, 13], [20, 20], [-3, 99]], dtype=index, device=DEVICE)
    k, v = arguments["k"], arguments["v"]
    for tensor in (k, v):
        tensor[0, :, :7], tensor[1, :, 33:] = float("nan"), float("inf")
        tensor[2, :, :10] = tensor[2, :, 13:] = tensor[3] = float("nan")
    scores = check(arguments | {"bounds": bounds})
    infinity = float("inf")
    assert (scores[0, :, :7] == -infinity).all()
    assert (scores[0, :, 7:11] == infinity).all()
    assert scores[0, :, 11:].isfinite().all()
    assert (scores[2, :, 10:13] == infinity).all()
    assert (scores[3] == -infinity).all()


def test_large_logits_do_not_overflow() -> None:
    arguments = draw(torch.float32, tokens=150)
    arguments["mu"] *= 300.0
    scores = check(arguments | {"v": None})
    assert scores[:, :, 4:].isfinite().all()


def test_nan_and_infinity_stay_with_their_head() -> None:
    arguments = draw(torch.float32)
    clean = kernel.forward(**arguments)
    for bad in (float("nan"), float("inf")):
        spoiled = arguments["k"].clone()
        spoiled[0, 1, 20, 3] = bad
        scores = kernel.forward(**arguments | {"k": spoiled})
        assert torch.equal(scores[:, 0], clean[:, 0])
        assert scores[:, 1, 4:].isnan().all(), "a softmax over all tokens of the head"
        worthless = arguments["v"].clone()
        worthless[0, 1, 20, 3] = bad
        scores = kernel.forward(**arguments | {"v": worthless})
        others = [i for i in range(70) if i != 20]
        assert torch.equal(scores[:, :, others], clean[:, :, others])


def test_strided_inputs_and_the_same_bits_every_time() -> None:
    arguments = draw(torch.float32)
    expected = kernel.forward(**arguments)
    for change in (
        {},
        {"k": arguments["k"].transpose(1, 2).contiguous().transpose(1, 2)},
        {"v": arguments["v"].mT.contiguous().mT},
        {"cov": arguments["cov"].mT.contiguous().mT},
    ):
        assert torch.equal(kernel.forward(**arguments | change), expected)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 80), st.integers(0, 6), st.integers(0, 100))
def test_without_values_the_scores_are_shares_of_one(tokens: int, sink: int, seed: int) -> None:
    arguments = draw(torch.float32, tokens=tokens, seed=seed) | {"v": None, "sink": sink}
    scores = check(arguments)[:, :, min(sink, tokens) :]
    if tokens > sink:
        torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("triton_backend")
def test_through_the_public_op() -> None:
    arguments = draw(torch.float32)
    torch.testing.assert_close(
        ops.expected_attention(**arguments), reference.expected_attention(**arguments), **TOLERANCES[torch.float32]
    )
    assert "more than 256" in (kernel.unsupported(torch.empty(1, 1, 1, 257)) or "")
