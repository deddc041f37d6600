"""The non_causal_chunks kernels against the specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condense_core import ops
from condense_core.kernels import launch
from condense_core.kernels import non_causal_chunks as kernel
from condense_core.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Relative to the reference in fp32 on the same rounded inputs, for products of 16-bit numbers are exact in fp32. A
# logit is a sum of up to 256 terms of order 1 (1e-6 in another order), and exp turns its absolute error into a relative
# one. A score is a sum of terms of one sign, so it keeps that; atol is below any of them. At a scale of 5 logits are a
# hundred times as large, and so is their absolute error.
TOLERANCES = {"usual": {"rtol": 1e-5, "atol": 1e-9}, "large scale": {"rtol": 1e-3, "atol": 1e-9}}
INF, NAN = float("inf"), float("nan")


def draw(
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, tokens, head_dim, generator=generator) * 2
    k = torch.randn(batch, kv_heads, tokens, head_dim, generator=generator)
    k *= torch.linspace(0.5, 1.5, max(tokens, 1))[:tokens, None]
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


def check(q: Tensor, k: Tensor, chunk_size: int, scale: float, bounds: Tensor | None = None) -> Tensor:
    actual = kernel.forward(q, k, chunk_size, scale, bounds)
    assert actual.dtype == torch.float32
    expected = reference.non_causal_chunks(q, k, chunk_size, scale, bounds)
    torch.testing.assert_close(actual, expected, equal_nan=True, **TOLERANCES["large scale" if scale > 1 else "usual"])
    return actual


# Up to 32 keys in fp32 and 256 in 16 bits a chunk is one product, beyond that two launches; full chunks and a short
# one; one chunk, and one that is wider than the sequence; divided into parts and not.
SHAPES = {
    "full": (2, 4, 2, 96, 16, 32),
    "short last": (1, 6, 2, 75, 20, 16),
    "odd": (2, 2, 2, 50, 40, 24),
    "64": (1, 3, 1, 130, 16, 64),
    "256": (1, 4, 2, 300, 24, 256),
    "two launches": (1, 2, 1, 420, 16, 300),
    "one chunk": (1, 2, 2, 45, 8, 10**9),
    "each its own": (1, 2, 1, 9, 16, 1),
    "one token": (1, 1, 1, 1, 1, 7),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k = draw(*shape[:5], dtype=dtype)
    chunk_size, tokens = shape[5], shape[3]
    scores = check(q, k, chunk_size, shape[4] ** -0.5)
    # Every query gives one in all: what a chunk gets is its length.
    total = scores.double().sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, tokens), rtol=1e-5, atol=0)


BOUNDS = {
    "left": [[40, 90], [9, 90]],
    "right": [[0, 80], [0, 3]],
    "both": [[17, 71], [80, 81]],
    "empty": [[7, 7], [30, 9]],
    "beyond": [[-4, 10**6], [89, 10**6]],
}


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("chunk_size", [16, 50])
def test_padding(bounds: list[list[int]], chunk_size: int, index: torch.dtype, dtype: torch.dtype) -> None:
    q, k = draw(2, 2, 1, 90, 16, dtype=dtype)
    on_device = torch.tensor(bounds, dtype=index, device=DEVICE)
    scores = check(q, k, chunk_size, 0.25, on_device)
    for b, (start, stop) in enumerate(bounds):  # what stands in the padding has no influence
        start, stop = min(max(start, 0), 90), min(max(stop, 0), 90)
        for x in (q, k):
            x[b, :, :start], x[b, :, max(stop, start) :] = NAN, INF
    assert torch.equal(kernel.forward(q, k, chunk_size, 0.25, on_device), scores)


def test_no_tokens() -> None:
    q, k = draw(2, 4, 2, 0, 16)
    assert kernel.forward(q, k, 256, 0.25, None).shape == (2, 2, 0)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 5.0])
@pytest.mark.parametrize("chunk_size", [32, 60])
def test_any_scale(scale: float, chunk_size: int, dtype: torch.dtype) -> None:
    q, k = draw(1, 4, 2, 100, 16, dtype=dtype)
    assert check(q, k, chunk_size, scale).isfinite().all()


@pytest.mark.parametrize("chunk_size", [32, 80])
def test_strides_do_not_matter(chunk_size: int) -> None:
    q, k = draw(2, 4, 2, 90, 24)
    bounds = torch.tensor([[1, 90], [20, 77]], device=DEVICE)
    expected = kernel.forward(q, k, chunk_size, 0.25, bounds)

    def views(x: Tensor) -> list[Tensor]:
        return [
            x.transpose(1, 2).contiguous().transpose(1, 2),  # [B, N, G, D] in memory, as a projection leaves it
            torch.cat([x, x], 3)[..., 24:],
            torch.cat([x, x], 2)[:, :, x.shape[2] :],
            x.transpose(2, 3).contiguous().transpose(2, 3),  # the head dimension is not contiguous
        ]

    for q_view, k_view in zip(views(q), views(k), strict=True):
        assert torch.equal(kernel.forward(q_view, k_view, chunk_size, 0.25, bounds), expected)
    assert torch.equal(kernel.forward(q, k, chunk_size, 0.25, bounds.t().contiguous().t()), expected)


@pytest.mark.parametrize("chunk_size", [32, 50])
def test_nan_stays_in_its_chunk(chunk_size: int, dtype: torch.dtype) -> None:
    q, k = draw(2, 4, 2, 110, 16, dtype=dtype)
    clean = kernel.forward(q, k, chunk_size, 0.25, None)
    q[0, 1, chunk_size + 2, 3] = NAN  # a query of the first group
    k[1, 1, 109, 0] = NAN  # a key of the last, short chunk
    scores = check(q, k, chunk_size, 0.25)
    expected = clean.clone()
    expected[0, 0, chunk_size : 2 * chunk_size] = NAN
    expected[1, 1, 109 // chunk_size * chunk_size :] = NAN
    assert torch.equal(scores.isnan(), expected.isnan())
    assert torch.equal(scores.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("chunk_size", [32, 50])
def test_keys_at_infinity_are_as_in_the_reference(chunk_size: int, dtype: torch.dtype) -> None:
    q, k = (x.abs() + 0.1 for x in draw(1, 2, 1, 110, 16, dtype=dtype))
    k[0, 0, 5], k[0, 0, 108] = -INF, -INF  # no attention
    scores = check(q, k, chunk_size, 0.25)
    assert scores[0, 0, [5, 108]].eq(0).all()
    assert scores.isfinite().all()
    k[0, 0, 7] = INF
    assert check(q, k, chunk_size, 0.25)[0, 0, :chunk_size].isnan().all()


@pytest.mark.parametrize("chunk_size", [32, 80])
def test_two_runs_agree_to_the_bit(chunk_size: int, dtype: torch.dtype) -> None:
    q, k = draw(2, 4, 2, 150, 16, dtype=dtype)
    assert torch.equal(kernel.forward(q, k, chunk_size, 0.25, None), kernel.forward(q, k, chunk_size, 0.25, None))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, kv_heads, group, head_dim, tokens = number(1, 2), number(1, 2), number(1, 3), number(1, 40), number(0, 150)
    q, k = draw(
        *(batch, kv_heads * group, kv_heads, tokens, head_dim),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16])),
    )
    bounds = None
    if data.draw(st.booleans()):
        bounds = torch.tensor([[number(-2, tokens + 2), number(-2, tokens + 2)] for _ in range(batch)], device=DEVICE)
    check(q, k, number(8, 170), head_dim**-0.5, bounds)


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = draw(1, 2, 1, 40, 16)
    calls = []
    monkeypatch.setattr(kernel, "forward", lambda *args, run=kernel.forward: calls.append(args[2:]) or run(*args))
    torch.testing.assert_close(ops.non_causal_chunks(q, k), reference.non_causal_chunks(q, k), **TOLERANCES["usual"])
    assert calls == [(40, 0.25, None)]
    wide = draw(1, 1, 1, 6, 257)
    torch.testing.assert_close(ops.non_causal_chunks(*wide), reference.non_causal_chunks(*wide), **TOLERANCES["usual"])
    assert len(calls) == 1
    assert "head_dim is 257" in str(kernel.unsupported(*wide))


@pytest.mark.parametrize("chunk_size", [256, 1024])
def test_temporaries_are_linear_in_the_tokens(chunk_size: int) -> None:
    """No tensor of chunk_size^2: at the shapes of Mistral-7B a fraction of the keys' own 4 MB."""
    q, k = (torch.empty(1, h, 2048, 128, dtype=torch.bfloat16, device="meta") for h in (32, 8))
    for target in launch.TARGETS.values():
        with launch.record(target) as launches:
            kernel.forward(q, k, chunk_size, 128**-0.5, None)
        tensors = {id(x): x for made in launches for x in made.args if isinstance(x, Tensor)}
        assert sum(x.nbytes for x in tensors.values() if x is not q and x is not k) <= 2**19
