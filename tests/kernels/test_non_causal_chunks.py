"""non_causal_chunks on Triton: kernels/non_causal_chunks.py against the specification in ops/reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import launch
from condense_core.kernels import non_causal_chunks as kernel
from condense_core.ops import reference
from condense_core.ops.arguments import NonCausalChunksArgs

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")

# Relative to the reference in fp32 on the same rounded inputs, for products of 16-bit numbers are exact in fp32. A
# logit is a sum of up to 256 terms of order 1 (1e-6 in another order), and exp turns its absolute error into a relative
# one. A score is a sum of terms of one sign, so it keeps that; atol is below any of them. At a scale of 5 logits are a
# hundred times as large, and so is their absolute error.
TOLERANCES = {"usual": {"rtol": 1e-5, "atol": 1e-9}, "large scale": {"rtol": 1e-3, "atol": 1e-9}}

# Up to 32 keys in fp32 and 256 in 16 bits a chunk is one product, beyond that there are two.
BOTH_WAYS = pytest.mark.parametrize(
    "chunk_size", [pytest.param(32, id="one-product"), pytest.param(50, id="two-products-in-fp32")]
)


def draw(
    *,
    batch: int = 1,
    num_kv_heads: int = 1,
    group: int = 2,
    num_tokens: int = 100,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    chunk_size: int = 32,
    scale: float = 0.25,
    bounds: Tensor | None = None,
) -> NonCausalChunksArgs:
    """Arguments of the op, with keys that grow along the sequence."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, num_kv_heads * group, num_tokens, head_dim, generator=generator) * 2
    k = torch.randn(batch, num_kv_heads, num_tokens, head_dim, generator=generator)
    k *= torch.linspace(0.5, 1.5, max(num_tokens, 1))[:num_tokens, None]
    return NonCausalChunksArgs(
        q=q.to(DEVICE, dtype), k=k.to(DEVICE, dtype), chunk_size=chunk_size, scale=scale, bounds=bounds
    )


def check(args: NonCausalChunksArgs) -> Tensor:
    """The kernels' scores, after they were found right."""
    scores = kernel.forward(args)
    assert scores.dtype == torch.float32
    tolerances = TOLERANCES["large scale" if args.scale > 1 else "usual"]
    torch.testing.assert_close(scores, reference.non_causal_chunks(*args), equal_nan=True, **tolerances)
    return scores


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"batch": 2, "num_kv_heads": 2, "num_tokens": 96}, id="whole-chunks"),
        pytest.param({"group": 6, "num_tokens": 75, "head_dim": 20, "chunk_size": 16}, id="a-short-last-chunk"),
        pytest.param({"group": 1, "num_tokens": 50, "head_dim": 40, "chunk_size": 24}, id="no-powers-of-two"),
        pytest.param({"group": 3, "num_tokens": 130, "chunk_size": 64}, id="chunks-of-one-tile-of-queries"),
        pytest.param({"num_tokens": 300, "head_dim": 24, "chunk_size": 256}, id="the-longest-of-one-product"),
        pytest.param({"num_tokens": 330, "chunk_size": 300}, id="two-products"),
        pytest.param({"num_tokens": 45, "head_dim": 8, "chunk_size": 10**9}, id="one-chunk"),
        pytest.param({"num_tokens": 9, "chunk_size": 1}, id="chunks-of-one-token"),
        pytest.param({"group": 1, "num_tokens": 1, "head_dim": 1, "chunk_size": 7}, id="one-number"),
    ],
)
def test_shapes(shape: dict[str, int], dtype: torch.dtype) -> None:
    args = draw(**shape, dtype=dtype)
    # Every query gives one in all: what a chunk gets is its length.
    total = check(args).double().sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, args.k.shape[2]), rtol=1e-5, atol=0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    num_kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    num_tokens=st.integers(0, 150),
    head_dim=st.integers(1, 40),
    chunk_size=st.integers(8, 170),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    data=st.data(),
)
def test_any_shape_and_padding(batch: int, num_tokens: int, data: st.DataObject, **shape: Any) -> None:
    place = st.integers(-2, num_tokens + 2)
    bounds = data.draw(st.none() | st.lists(st.tuples(place, place), min_size=batch, max_size=batch))
    on_device = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    check(draw(batch=batch, num_tokens=num_tokens, bounds=on_device, **shape))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param([[40, 90], [9, 90]], id="left"),
        pytest.param([[17, 71], [0, 3]], id="right"),
        pytest.param([[7, 7], [30, 9]], id="no-real-token"),
        pytest.param([[-4, 10**6], [89, 10**6]], id="beyond-the-tensor"),
    ],
)
@BOTH_WAYS
def test_what_stands_in_the_padding_has_no_influence(
    bounds: list[list[int]], chunk_size: int, index_dtype: torch.dtype
) -> None:
    on_device = torch.tensor(bounds, dtype=index_dtype, device=DEVICE)
    args = draw(batch=2, num_tokens=90, chunk_size=chunk_size, bounds=on_device)
    scores = check(args)
    for b, (start, stop) in enumerate(bounds):
        start, stop = min(max(start, 0), 90), min(max(stop, 0), 90)
        for x in (args.q, args.k):
            x[b, :, :start], x[b, :, max(stop, start) :] = NAN, INF
    assert torch.equal(kernel.forward(args), scores)


def test_no_tokens() -> None:
    assert kernel.forward(draw(batch=2, num_kv_heads=2, num_tokens=0)).shape == (2, 2, 0)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 5.0])
@BOTH_WAYS
def test_any_scale(scale: float, chunk_size: int) -> None:
    assert check(draw(num_tokens=70, chunk_size=chunk_size, scale=scale)).isfinite().all()


@BOTH_WAYS
def test_strides_do_not_matter(chunk_size: int) -> None:
    bounds = torch.tensor([[1, 60], [20, 57]], device=DEVICE)
    args = draw(batch=2, num_kv_heads=2, num_tokens=60, head_dim=24, chunk_size=chunk_size, bounds=bounds)
    expected = kernel.forward(args)

    def views(x: Tensor) -> dict[str, Tensor]:
        return {
            "as a projection leaves it": x.transpose(1, 2).contiguous().transpose(1, 2),
            "half of a row": torch.cat([x, x], 3)[..., 24:],
            "half of the tokens": torch.cat([x, x], 2)[:, :, x.shape[2] :],
            "channels apart": x.transpose(2, 3).contiguous().transpose(2, 3),
        }

    k_views = views(args.k)
    for name, q_view in views(args.q).items():
        assert torch.equal(kernel.forward(args._replace(q=q_view, k=k_views[name])), expected), name
    columns = bounds.t().contiguous().t()
    assert torch.equal(kernel.forward(args._replace(bounds=columns)), expected)


@BOTH_WAYS
def test_nan_stays_in_its_chunk(chunk_size: int) -> None:
    args = draw(batch=2, num_kv_heads=2, num_tokens=110, chunk_size=chunk_size)
    clean = kernel.forward(args)
    args.q[0, 1, chunk_size + 2, 3] = NAN  # a query of the first group
    args.k[1, 1, 109, 0] = NAN  # a key of the last, short chunk
    scores = check(args)
    expected = clean.clone()
    expected[0, 0, chunk_size : 2 * chunk_size] = NAN
    expected[1, 1, 109 // chunk_size * chunk_size :] = NAN
    assert torch.equal(scores.isnan(), expected.isnan())
    assert torch.equal(scores.nan_to_num(0), expected.nan_to_num(0))


@BOTH_WAYS
def test_keys_at_infinity_are_as_in_the_reference(chunk_size: int) -> None:
    args = draw(num_tokens=110, chunk_size=chunk_size)
    for x in (args.q, args.k):
        x.copy_(x.abs() + 0.1)
    args.k[0, 0, [5, 108]] = -INF  # no attention
    scores = check(args)
    assert scores[0, 0, [5, 108]].eq(0).all()
    assert scores.isfinite().all()
    args.k[0, 0, 7] = INF
    assert check(args)[0, 0, :chunk_size].isnan().all()


@BOTH_WAYS
def test_the_same_bits_every_time(chunk_size: int, dtype: torch.dtype) -> None:
    args = draw(batch=2, num_tokens=110, chunk_size=chunk_size, dtype=dtype)
    assert torch.equal(kernel.forward(args), kernel.forward(args))


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it_or_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[NonCausalChunksArgs] = []
    monkeypatch.setattr(kernel, "forward", lambda args, run=kernel.forward: seen.append(args) or run(args))
    narrow, wide = draw(num_tokens=40), draw(num_tokens=6, head_dim=257)
    for args in (narrow, wide):
        actual = ops.non_causal_chunks(args.q, args.k, scale=args.scale)
        expected = reference.non_causal_chunks(*args._replace(chunk_size=256))
        torch.testing.assert_close(actual, expected, **TOLERANCES["usual"])
    assert [(args.chunk_size, args.scale, args.bounds) for args in seen] == [(40, 0.25, None)]
    assert "head_dim is 257" in str(kernel.unsupported(wide))


@pytest.mark.parametrize("chunk_size", [256, 1024])
def test_temporaries_are_linear_in_the_tokens(chunk_size: int) -> None:
    """No tensor of chunk_size^2: at the shapes of Mistral-7B a fraction of the keys' own 4 MB."""
    q, k = (torch.empty(1, heads, 2048, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    args = NonCausalChunksArgs(q=q, k=k, chunk_size=chunk_size, scale=128**-0.5, bounds=None)
    for target in launch.TARGETS.values():
        with launch.record(target) as launches:
            kernel.forward(args)
        tensors = {id(x): x for made in launches for x in made.args if isinstance(x, Tensor)}
        assert sum(x.nbytes for x in tensors.values() if x is not q and x is not k) <= 2**19
