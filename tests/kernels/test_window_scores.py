"""The window_scores kernels against the specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condense_core import ops
from condense_core.kernels import launch
from condense_core.kernels import window_scores as kernel
from condense_core.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Relative to the reference in fp32 on the same rounded inputs, for products of 16-bit numbers are exact in fp32. A
# logit is a sum of up to 256 terms of order 1 (1e-6 in another order), and exp turns its absolute error into a relative
# one; the sum of another order over the keys adds little. Scores far below the largest keep that relative error; atol
# is below any of them. At a scale of 5 logits are a hundred times as large, and so is their absolute error.
TOLERANCES = {"usual": {"rtol": 1e-5, "atol": 1e-9}, "large scale": {"rtol": 1e-3, "atol": 1e-9}}
INF, NAN = float("inf"), float("nan")


def draw(
    batch: int,
    heads: int,
    kv_heads: int,
    window: int,
    tokens: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, window, head_dim, generator=generator) * 2
    k = torch.randn(batch, kv_heads, tokens, head_dim, generator=generator) * torch.linspace(0.5, 1.5, tokens)[:, None]
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


def check(q: Tensor, k: Tensor, scale: float, kernel_size: int, bounds: Tensor | None = None) -> Tensor:
    actual = kernel.forward(q, k, scale, kernel_size, bounds)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        actual,
        reference.window_scores(q, k, scale, kernel_size, bounds),
        equal_nan=True,
        **TOLERANCES["large scale" if scale > 1 else "usual"],
    )
    return actual


SHAPES = {
    "gqa": (2, 4, 2, 8, 300, 16),  # several splits and ranges
    "mha, odd head_dim": (1, 3, 3, 5, 131, 20),
    "one kv head, two row tiles": (1, 4, 1, 40, 200, 24),
    "three row tiles of 128": (1, 5, 1, 62, 150, 16),
    "tova": (2, 2, 1, 1, 97, 40),
    "all forced but one": (1, 2, 1, 64, 65, 16),
    "all forced": (1, 2, 1, 33, 33, 8),
    "one token": (1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k = draw(*shape, dtype=dtype)
    scores = check(q, k, shape[-1] ** -0.5, 5)
    window, tokens = shape[3:5]
    assert torch.isposinf(scores[..., tokens - window :]).all()
    assert scores[..., : tokens - window].isfinite().all()


# A window of 8: many keys left of it, few, one, none; nothing at all; beyond what is there.
BOUNDS = {
    "left": [[40, 200], [150, 200]],
    "right": [[0, 150], [0, 9]],
    "both": [[63, 130], [100, 109]],
    "short": [[60, 68], [3, 6]],
    "empty": [[7, 7], [30, 9]],
    "beyond": [[-4, 10**6], [199, 10**6]],
}


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_padding(bounds: list[list[int]], index: torch.dtype, dtype: torch.dtype) -> None:
    q, k = draw(2, 2, 1, 8, 200, 16, dtype=dtype)
    on_device = torch.tensor(bounds, dtype=index, device=DEVICE)
    scores = check(q, k, 0.25, 3, on_device)
    # What stands in the padding, and in rows of q that do not exist, has no influence.
    for b, (start, stop) in enumerate(bounds):
        start, stop = min(max(start, 0), 200), min(max(stop, 0), 200)
        k[b, :, :start], k[b, :, max(stop, start) :] = NAN, NAN
        q[b, :, : max(0, 8 - max(stop - start, 0))] = NAN
    assert torch.equal(kernel.forward(q, k, 0.25, 3, on_device), scores)


@pytest.mark.parametrize("kernel_size", [1, 3, 7, 65, 131, 999, 10**9 + 1])
def test_pooling_crosses_tiles(kernel_size: int) -> None:
    q, k = draw(1, 4, 2, 8, 270, 16)
    check(q, k, 0.25, kernel_size)
    check(q, k, 0.25, kernel_size, torch.tensor([[30, 240]], device=DEVICE))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 5.0])
def test_any_scale(scale: float, dtype: torch.dtype) -> None:
    q, k = draw(1, 4, 2, 8, 200, 16, dtype=dtype)
    assert check(q, k, scale, 5)[..., :192].isfinite().all()


def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    q, k = draw(2, 4, 2, 6, 150, 24, dtype=dtype)
    bounds = torch.tensor([[1, 150], [20, 120]], device=DEVICE)
    expected = kernel.forward(q, k, 0.25, 5, bounds)

    def views(x: Tensor) -> list[Tensor]:
        return [
            x.transpose(1, 2).contiguous().transpose(1, 2),  # [B, N, G, D] in memory, as a projection leaves it
            torch.cat([x, x], 3)[..., 24:],
            torch.cat([x, x], 2)[:, :, x.shape[2] :],
            x.transpose(2, 3).contiguous().transpose(2, 3),  # the head dimension is not contiguous
        ]

    for q_view, k_view in zip(views(q), views(k), strict=True):
        assert torch.equal(kernel.forward(q_view, k_view, 0.25, 5, bounds), expected)
    assert torch.equal(kernel.forward(q, k, 0.25, 5, bounds.t().contiguous().t()), expected)


def test_nan_reaches_what_depends_on_it_and_no_more(dtype: torch.dtype) -> None:
    q, k = draw(2, 4, 2, 8, 200, 16, dtype=dtype)
    clean = kernel.forward(q, k, 0.25, 5, None)
    for token in (3, 195, 199):  # a key before the window, one inside, the last one, which only the last row sees
        poisoned = k.clone()
        poisoned[1, 0, token, 7] = NAN
        scores = check(q, poisoned, 0.25, 5)
        assert scores[1, 0, :192].isnan().all()
        assert torch.isposinf(scores[1, 0, 192:]).all()
        assert torch.equal(scores[0], clean[0])
        assert torch.equal(scores[1, 1], clean[1, 1])
    q[0, 3, 2, 0] = NAN
    scores = check(q, k, 0.25, 5)
    assert scores[0, 1, :192].isnan().all()
    assert torch.equal(scores[0, 0], clean[0, 0])


def test_keys_at_infinity_are_as_in_the_reference() -> None:
    q, k = draw(1, 1, 1, 2, 140, 16)
    q, k = q.abs(), k.abs()
    k[0, 0, 5], k[0, 0, 64:128] = -INF, -INF  # no attention; a whole tile without any
    assert check(q, k, 0.25, 1)[0, 0, 64:128].eq(0).all()
    k[0, 0, 7] = INF
    assert check(q, k, 0.25, 1)[0, 0, :138].isnan().all()


def test_two_runs_agree_to_the_bit(dtype: torch.dtype) -> None:
    q, k = draw(2, 4, 2, 8, 300, 16, dtype=dtype)
    assert torch.equal(kernel.forward(q, k, 0.25, 5, None), kernel.forward(q, k, 0.25, 5, None))


def test_without_pooling_the_scores_are_what_the_window_leaves() -> None:
    """Attention sums to one: that on the scored keys, and that inside the window, made small here by its keys."""
    q, k = draw(1, 1, 1, 4, 180, 16)
    k[:, :, 176:] = -8 * q[0, 0].mean(0) / q[0, 0].mean(0).norm()
    inside = (q[0, 0] @ k[0, 0].t() * 0.25).softmax(-1)[:, 176:].sum(-1)
    total = kernel.forward(q, k, 0.25, 1, None)[0, 0, :176].sum()
    assert inside.max() < 0.5
    assert 0.5 < float(total) < 1.0


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, kv_heads, group, head_dim, tokens = number(1, 2), number(1, 2), number(1, 3), number(1, 40), number(1, 220)
    window = number(1, min(tokens, 30))
    q, k = draw(
        batch,
        kv_heads * group,
        kv_heads,
        window,
        tokens,
        head_dim,
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16])),
    )
    bounds = None
    if data.draw(st.booleans()):
        bounds = torch.tensor([[number(-2, tokens + 2), number(-2, tokens + 2)] for _ in range(batch)], device=DEVICE)
    check(q, k, head_dim**-0.5, 2 * number(0, 6) + 1, bounds)


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = draw(1, 2, 1, 4, 40, 16)
    calls = []
    monkeypatch.setattr(kernel, "forward", lambda *args, run=kernel.forward: calls.append(args[2:]) or run(*args))
    torch.testing.assert_close(ops.window_scores(q, k), reference.window_scores(q, k), **TOLERANCES["usual"])
    assert calls == [(0.25, 5, None)]
    wide = draw(1, 1, 1, 2, 6, 257)
    torch.testing.assert_close(ops.window_scores(*wide), reference.window_scores(*wide), **TOLERANCES["usual"])
    assert len(calls) == 1
    assert "head_dim is 257" in str(kernel.unsupported(*wide))


@pytest.mark.parametrize(("heads", "window", "limit"), [(32, 64, 2**20), (64, 64, 2**21)])
def test_temporaries_are_small(heads: int, window: int, limit: int) -> None:
    """No tensor of every row and key: all that a call allocates, at the shapes of Mistral-7B and at twice the heads."""
    q = torch.empty(1, heads, window, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 8, 2048, 128, dtype=torch.bfloat16, device="meta")
    for target in launch.TARGETS.values():
        with launch.record(target) as launches:
            kernel.forward(q, k, 128**-0.5, 5, None)
        assert len(launches) == 2
        tensors = {id(x): x for made in launches for x in made.args if isinstance(x, Tensor)}
        temporaries = [x for x in tensors.values() if x is not q and x is not k and x.shape != k.shape[:3]]
        assert sum(x.nbytes for x in temporaries) <= limit
