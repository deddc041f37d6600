"""non_causal_chunks: the specification against a loop, the public function, and its registration."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference
from tests.ops.oracles import INF, Bounds, attention, on_device, real_tokens

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

# Against the oracle in fp64 on the same rounded inputs. float64: sums of some dozens of terms in another order.
# float32, and the 16-bit types, which are computed in it: logits of order 10 carry 1e-6, which exp makes relative.
TOLERANCES = {
    torch.float64: {"atol": 1e-14, "rtol": 1e-11},
    torch.float32: {"atol": 1e-8, "rtol": 1e-5},
    torch.bfloat16: {"atol": 1e-8, "rtol": 1e-5},
    torch.float16: {"atol": 1e-8, "rtol": 1e-5},
}


def draw(
    *, heads: int = 4, kv_heads: int = 2, tokens: int, head_dim: int, dtype: torch.dtype, batch: int = 2
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, tokens, head_dim, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, tokens, head_dim, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def oracle(q: Tensor, k: Tensor, chunk_size: int, scale: float, bounds: Bounds) -> Tensor:
    """One query of one chunk after the other."""
    batch, heads, tokens, _ = q.shape
    kv_heads = k.shape[1]
    scores = torch.full((batch, kv_heads, tokens), -INF, dtype=torch.float64)
    for b in range(batch):
        real = real_tokens(bounds, b, tokens)
        scores[b, :, real] = 0
        for h in range(heads):
            g = h * kv_heads // heads
            for first in real[::chunk_size]:
                chunk = slice(first, min(first + chunk_size, real.stop))
                for query in q[b, h, chunk].double().tolist():
                    p = attention(query, k[b, g, chunk].double().tolist(), scale)
                    scores[b, g, chunk] += torch.tensor(p, dtype=torch.float64) * kv_heads / heads
    return scores


def check(q: Tensor, k: Tensor, chunk_size: int, scale: float | None, bounds: Bounds) -> None:
    actual = reference.non_causal_chunks(q=q, k=k, chunk_size=chunk_size, scale=scale, bounds=on_device(bounds))
    assert actual.dtype == (torch.float64 if k.dtype == torch.float64 else torch.float32)
    expected = oracle(q, k, chunk_size, k.shape[3] ** -0.5 if scale is None else scale, bounds)
    torch.testing.assert_close(actual.double(), expected, **TOLERANCES[k.dtype])


BOUNDS = {
    "all real": None,
    "padding on the right, on the left": [[0, 13], [4, 17]],
    "padding on both sides, three tokens": [[2, 12], [13, 16]],
    "nothing real, beyond the tokens": [[5, 5], [-3, 40]],
    "one token, crossed": [[16, 17], [9, 3]],
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
@pytest.mark.parametrize(
    "chunk_size",
    [
        pytest.param(1, id="chunks of one token"),
        pytest.param(4, id="a short last chunk"),
        pytest.param(17, id="one chunk"),
        pytest.param(10**12, id="a chunk wider than the tokens"),
    ],
)
def test_it_equals_a_walk_query_by_query(chunk_size: int, bounds: Bounds) -> None:
    q, k = draw(tokens=17, head_dim=6, dtype=torch.float64)
    check(q, k, chunk_size, None, bounds)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "scale"),
    [
        pytest.param(4, 2, None, id="grouped"),
        pytest.param(1, 1, 1.0, id="one head"),
        pytest.param(2, 2, -0.3, id="negative scale"),
    ],
)
def test_dtypes_and_heads(heads: int, kv_heads: int, scale: float | None, dtype: torch.dtype) -> None:
    q, k = draw(heads=heads, kv_heads=kv_heads, tokens=17, head_dim=6, dtype=dtype)
    check(q, k, 5, scale, [[0, 13], [4, 17]])


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 14),
    chunk_size=st.integers(1, 16),
    group=st.integers(1, 3),
    start=st.integers(-2, 8),
    stop=st.integers(0, 16),
)
def test_any_lengths(tokens: int, chunk_size: int, group: int, start: int, stop: int) -> None:
    q, k = draw(batch=1, heads=group, kv_heads=1, tokens=tokens, head_dim=3, dtype=torch.float64)
    check(q, k, chunk_size, None, [[start, stop]])


def test_scores_are_those_of_kvpress_where_no_chunk_is_short() -> None:
    """`NonCausalAttnPress.non_causal_chunked_attn`, version 0.5.5: repeated keys, no scale."""
    q, k = draw(batch=1, tokens=24, head_dim=8, dtype=torch.float32)
    chunks = [x.view(1, 4, 3, 8, 8) for x in (q, k.repeat_interleave(2, 1))]
    expected = (chunks[0] @ chunks[1].transpose(-2, -1)).softmax(-1).sum(-2).view(1, 2, 2, 24).mean(2)
    actual = ops.non_causal_chunks(q, k, chunk_size=8, scale=1.0)
    torch.testing.assert_close(actual, expected, **TOLERANCES[torch.float32])


def test_padding_is_not_read() -> None:
    bounds = torch.tensor([[3, 15], [14, 17]])
    q, k = draw(tokens=17, head_dim=6, dtype=torch.float32)
    clean = ops.non_causal_chunks(q, k, chunk_size=4, bounds=bounds)
    for b, (start, stop) in enumerate(bounds.tolist()):
        for x in (q, k):
            x[b, :, :start], x[b, :, stop:] = float("nan"), INF
    assert torch.equal(ops.non_causal_chunks(q, k, chunk_size=4, bounds=bounds), clean)


def test_no_tokens_no_scores() -> None:
    q, k = draw(tokens=0, head_dim=6, dtype=torch.float32)
    scores = ops.non_causal_chunks(q, k, bounds=torch.tensor([[0, 0], [3, 4]]))
    assert scores.shape == (2, 2, 0)
    assert scores.dtype == torch.float32


K = torch.ones(2, 2, 9, 8)
Q = torch.ones(2, 4, 9, 8)
EMPTY = K[:, :, :0]


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        pytest.param({"k": [1.0]}, TypeError, ["k is a list"], id="k of list"),
        pytest.param({"k": K.double()}, TypeError, ["k has dtype torch.float64"], id="dtype of k"),
        pytest.param({"k": K[0]}, ValueError, ["k has shape [2, 9, 8]", "[B, G, N, D]"], id="rank of k"),
        pytest.param({"k": K[..., :0]}, ValueError, ["k has shape [2, 2, 9, 0]", "D >= 1"], id="no channels"),
        pytest.param({"k": K.to("meta")}, ValueError, ["cpu", "meta"], id="two devices"),
        pytest.param({"k": K.half()}, TypeError, ["has dtype torch.float32, expected torch.float16"], id="two dtypes"),
        pytest.param({"k": K[:1]}, ValueError, ["B = 1"], id="another batch"),
        pytest.param({"k": K[..., :4]}, ValueError, ["D = 4"], id="another head_dim"),
        pytest.param({"k": torch.ones(2, 3, 9, 8)}, ValueError, ["4 heads", "a multiple of k's 3"], id="heads"),
        pytest.param({"k": EMPTY}, ValueError, ["q has 9 queries", "expected 0"], id="queries of no tokens"),
        pytest.param({"scale": INF}, ValueError, ["scale is inf"], id="infinite scale"),
        pytest.param({"scale": "1"}, TypeError, ["scale is '1' (str)"], id="scale of text"),
        pytest.param({"bounds": [[0, 9]]}, TypeError, ["bounds is a list"], id="bounds of list"),
        pytest.param({"bounds": torch.ones(2, 2)}, TypeError, ["dtype torch.float32"], id="bounds of floats"),
        pytest.param({"bounds": torch.ones(3, 2).long()}, ValueError, ["[3, 2]", "[2, 2]"], id="bounds of 3"),
        pytest.param(
            {"bounds": torch.ones(2, 2, device="meta").long()}, ValueError, ["bounds is on meta"], id="bounds elsewhere"
        ),
        pytest.param({"q": None}, TypeError, ["q is a NoneType"], id="no q"),
        pytest.param({"q": Q[0]}, ValueError, ["q has shape [4, 9, 8]"], id="rank of q"),
        pytest.param({"q": Q[:, :, :3]}, ValueError, ["q has 3 queries", "expected 9"], id="too few queries"),
        pytest.param({"q": Q[:, :, :0]}, ValueError, ["q has shape [2, 4, 0, 8]"], id="no queries"),
        pytest.param(
            {"q": Q[:, :3, :0], "k": EMPTY}, ValueError, ["3 heads", "a multiple of k's 2"], id="heads of no tokens"
        ),
        pytest.param({"q": [], "k": EMPTY}, TypeError, ["q is a list"], id="q of list and no tokens"),
        pytest.param({"chunk_size": 0}, ValueError, ["chunk_size is 0", ">= 1"], id="chunk_size of 0"),
        pytest.param({"chunk_size": 2.0}, TypeError, ["chunk_size is 2.0 (float)"], id="chunk_size of float"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as raised:
        ops.non_causal_chunks(**{"q": Q, "k": K, **change})
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def test_it_passes_opcheck() -> None:
    q, k = draw(tokens=9, head_dim=8, dtype=torch.float32)
    bounds = torch.tensor([[0, 7], [3, 9]])
    torch.library.opcheck(torch.ops.condense_core.non_causal_chunks.default, (q, k, 4, 0.3, bounds))


def test_it_is_traced_without_a_break() -> None:
    def scores(q: Tensor, k: Tensor) -> Tensor:
        return ops.non_causal_chunks(q, 2 * k, chunk_size=4) + 1

    q, k = draw(tokens=9, head_dim=8, dtype=torch.float32)
    assert torch.equal(torch.compile(scores, fullgraph=True, backend="eager")(q, k), scores(q, k))
