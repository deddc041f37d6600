"""The attention_pool kernels against the specification, forward and backward."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condense_core import ops
from condense_core.kernels import attention_pool as kernel
from condense_core.kernels import attention_pool_backward, common
from condense_core.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Against the fp32 reference on the same rounded inputs; outputs are averages of RMS-normed rows, of order 1. fp32:
# another order of summation over at most some hundred terms. 16 bits: both round once at the end, half a unit in the
# last place each, and a backward pass also reads the rounded output (delta), whose error the gradients inherit scaled
# by their size.
TOLERANCES = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 2e-3, "rtol": 2**-9},
    torch.bfloat16: {"atol": 1.6e-2, "rtol": 2**-6},
}

# Full last window, short one, one token, nothing, shorter than the ratio.
# Sequences of one length need no offsets in the kernels.
LENGTHS = [[12], [13], [1], [3, 0, 9, 1], [0, 0, 5], [2, 31, 6], [7, 7, 7], [0, 0]]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def draw(
    lengths: list[int],
    ratio: int,
    halo: int,
    heads: int,
    head_dim: int,
    *,
    static: bool,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of the op; rows of very different size, so that a missing norm cannot pass."""
    generator = torch.Generator().manual_seed(seed)
    tokens, d = sum(lengths), heads * head_dim
    size = torch.linspace(0.2, 8.0, max(tokens, 1))[:tokens, None]
    rows = () if static else (sum(-(-n // ratio) for n in lengths),)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": (normal(tokens, d) * size).to(device, dtype),
        "q": (2 * normal(*rows, heads, head_dim)).to(device, dtype),
        "ratio": ratio,
        "cu_seqlens": offsets(lengths) if len(lengths) > 1 else None,
        "halo": halo,
        "scale": head_dim**-0.5,
        "norm_weight": (1 + 0.3 * normal(d)).to(device, dtype),
        "window_bias": normal(heads, ratio + 2 * halo).to(device, dtype),
        "eps": 1e-5,
    }


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), **TOLERANCES[dtype], equal_nan=True)


def check_forward(arguments: dict[str, Any]) -> None:
    dtype = arguments["x"].dtype
    out, lse = kernel.forward(**arguments)
    expected, expected_lse = reference.attention_pool_with_lse(**arguments)
    assert_close(out, expected, dtype)
    torch.testing.assert_close(lse, expected_lse, **TOLERANCES[torch.float32])


def check_backward(arguments: dict[str, Any]) -> None:
    """Gradients of a random projection of the output, scaled to order 1, against autograd of the reference."""
    dtype = arguments["x"].dtype
    out, lse = reference.attention_pool_with_lse(**arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    names = ("x", "q", "norm_weight", "window_bias")
    rest = {name: value for name, value in arguments.items() if name not in ("x", "q")}
    actual = attention_pool_backward.backward(grad, arguments["x"], arguments["q"], out, lse, **rest)
    expected = reference.attention_pool_backward(grad, arguments["x"], arguments["q"], out, lse, **rest)
    for name, a, e in zip(names, actual, expected, strict=True):
        size = max(1.0, float(e.abs().max())) if e.numel() else 1.0
        assert a.shape == e.shape, name
        assert_close(a / size, e / size, dtype)


# 4 and 5 meet divisible and odd lengths, 1 makes every token its own window, 40 makes every sequence one window.
@pytest.mark.parametrize(("ratio", "halo"), [(4, 0), (5, 2), (1, 0), (40, 3), (2, 5)])
@pytest.mark.parametrize("static", [True, False], ids=["static", "per-window"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_against_the_reference(lengths: list[int], static: bool, ratio: int, halo: int, device: torch.device) -> None:
    arguments = draw(lengths, ratio, halo, 3, 5, static=static, dtype=torch.float32, device=device)
    check_forward(arguments)
    check_backward(arguments)


def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    for static, halo in ((True, 0), (False, 2)):
        arguments = draw([7, 20], 4, halo, 2, 8, static=static, dtype=dtype, device=device)
        check_forward(arguments)
        check_backward(arguments)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 1), (1, 48), (8, 16), (6, 20)])
def test_widths(heads: int, head_dim: int, device: torch.device) -> None:
    arguments = draw([11], 4, 1, heads, head_dim, static=False, dtype=torch.float32, device=device)
    check_forward(arguments)
    check_backward(arguments)


@pytest.mark.parametrize("halo", [0, 3])
def test_windows_of_several_chunks(halo: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small chunk, windows go chunk by chunk, and rows go round the persistent programs more than once."""
    monkeypatch.setattr(kernel, "CHUNK", 64)
    monkeypatch.setattr(attention_pool_backward, "CHUNK", 64)
    arguments = draw([50, 3, 33], 9, halo, 2, 8, static=True, dtype=torch.float32, device=device)
    check_forward(arguments)
    check_backward(arguments)


def test_without_weight_and_bias(device: torch.device) -> None:
    arguments = draw([10], 4, 0, 2, 8, static=True, dtype=torch.float32, device=device)
    arguments |= {"norm_weight": None, "window_bias": None}
    check_forward(arguments)
    check_backward(arguments)


def test_a_bias_may_close_places(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK", 64)
    monkeypatch.setattr(attention_pool_backward, "CHUNK", 64)
    arguments = draw([24], 12, 0, 2, 8, static=True, dtype=torch.float32, device=device)
    arguments["window_bias"][:, :8] = float("-inf")  # the first chunks have nothing to look at
    check_forward(arguments)
    check_backward(arguments)


def test_strided_inputs(device: torch.device) -> None:
    plain = draw([10], 4, 0, 2, 8, static=False, dtype=torch.float32, device=device)
    expected, _ = kernel.forward(**plain)
    rows = torch.cat([plain["x"], plain["x"]], 1)[:, :16]  # a row stride of 32
    columns = plain["x"].t().contiguous().t()  # a column stride of 10
    queries = torch.stack([plain["q"], plain["q"]], -1)[..., 0]
    for change in ({"x": rows}, {"x": columns}, {"q": queries}):
        assert torch.equal(kernel.forward(**(plain | change))[0], expected)
        check_backward(plain | change)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("halo", [0, 2])
def test_a_bad_token_spoils_only_windows_that_see_it(bad: float, halo: int, device: torch.device) -> None:
    arguments = draw([16, 8], 4, halo, 2, 8, static=True, dtype=torch.float32, device=device)
    clean, _ = kernel.forward(**arguments)
    arguments["x"][6, 3] = bad  # in window 1, tokens 4 to 7; with a halo of 2 also in window 2, tokens 6 to 13
    out, lse = kernel.forward(**arguments)
    seen = [1, 2] if halo else [1]
    others = [row for row in range(6) if row not in seen]
    assert out[seen].isnan().any(1).all()
    assert torch.equal(out[others], clean[others])
    rest = {name: value for name, value in arguments.items() if name not in ("x", "q")}
    dx, *_ = attention_pool_backward.backward(torch.ones_like(out), arguments["x"], arguments["q"], out, lse, **rest)
    sharing = range(2, 14) if halo else range(4, 8)  # tokens in one window with the bad one
    assert dx[[i for i in range(24) if i not in sharing]].isfinite().all()


def test_the_same_bits_every_time(device: torch.device) -> None:
    arguments = draw([50, 3], 4, 2, 2, 8, static=True, dtype=torch.float32, device=device)
    out, lse = kernel.forward(**arguments)
    assert torch.equal(out, kernel.forward(**arguments)[0])
    rest = {name: value for name, value in arguments.items() if name not in ("x", "q")}
    first, second = (
        attention_pool_backward.backward(out, arguments["x"], arguments["q"], out, lse, **rest) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 4), st.randoms())
def test_sequences_may_be_packed_in_any_order(lengths: list[int], ratio: int, halo: int, random: Any) -> None:
    arguments = draw(lengths, ratio, halo, 2, 4, static=True, dtype=torch.float32, device=torch.device("cpu"))
    arguments = {k: v.to(DEVICE) if isinstance(v, Tensor) and k != "cu_seqlens" else v for k, v in arguments.items()}
    order = random.sample(range(len(lengths)), len(lengths))
    parts = arguments["x"].split(lengths)
    rows = [-(-n // ratio) for n in lengths]
    out, _ = kernel.forward(**arguments | {"cu_seqlens": offsets(lengths)})
    shuffled = arguments | {
        "x": torch.cat([parts[s] for s in order]),
        "cu_seqlens": offsets([lengths[s] for s in order]),
    }
    pieces = out.split(rows)
    assert torch.equal(kernel.forward(**shuffled)[0], torch.cat([pieces[s] for s in order]))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.floats(0.01, 100.0))
def test_zero_queries_give_the_mean_and_the_norm_forgets_the_size(n: int, ratio: int, size: float) -> None:
    arguments = draw([n], ratio, 0, 2, 4, static=True, dtype=torch.float32, device=DEVICE)
    zero = arguments | {"q": torch.zeros_like(arguments["q"]), "window_bias": None}
    r = reference.rms_norm(arguments["x"], arguments["norm_weight"], 1e-5)
    means = torch.stack([window.mean(0) for window in r.split(ratio)])
    torch.testing.assert_close(kernel.forward(**zero)[0], means, **TOLERANCES[torch.float32])
    scaled = arguments | {"x": arguments["x"] * size, "eps": 1e-5 * size * size}
    torch.testing.assert_close(kernel.forward(**scaled)[0], kernel.forward(**arguments)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("halo", [0, 1])
def test_through_the_public_op(halo: int, device: torch.device) -> None:
    arguments = draw([9, 4], 4, halo, 2, 4, static=False, dtype=torch.float32, device=device)
    x, q = arguments.pop("x").requires_grad_(), arguments.pop("q").requires_grad_()
    out = ops.attention_pool(x, q, **arguments)
    actual = torch.autograd.grad(out.square().sum(), (x, q))
    expected = reference.attention_pool(x, q, **arguments)
    assert_close(out, expected, torch.float32)
    for a, e in zip(actual, torch.autograd.grad(expected.square().sum(), (x, q)), strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)


def test_offsets_are_not_captured_into_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays would read host memory that is gone. One sequence, or several of one length, need no copy."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cu_seqlens differ between sequences while a CUDA graph is captured"):
        common.upload(torch.zeros(2), cuda)
    x = SimpleNamespace(device=cuda, __len__=lambda: 14)
    for offsets_of_one_length in ([0, 7, 14], [0, 14]):
        (cu_seqlens, rows), count, _ = kernel.packing(x, torch.tensor(offsets_of_one_length), 4)
        assert cu_seqlens is None
        assert rows is None
        assert count == 4
    with pytest.raises(RuntimeError, match="cu_seqlens differ"):
        kernel.packing(x, torch.tensor([0, 6, 14]), 4)


def test_rows_too_wide_for_a_chunk_are_declined() -> None:
    assert kernel.unsupported(torch.empty(3, 16384), torch.empty(1, 16384)) is None
    assert "16384" in kernel.unsupported(torch.empty(3, 16400), torch.empty(1, 16400))
