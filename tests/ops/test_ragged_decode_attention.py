"""ragged_decode_attention: the specification against a loop, the public function, and its registration."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference
from tests.ops.oracles import attention

pytest.importorskip("hypothesis")

from hypothesis import example, given, settings
from hypothesis import strategies as st

# The oracle is Python's double arithmetic. fp64: rounding of sums over some ten terms. fp32: likewise, of values of
# order 1. 16 bits: the same after one rounding of the output, half a unit in the last place.
TOLERANCES = {
    torch.float64: {"atol": 1e-13, "rtol": 1e-13},
    torch.float32: {"atol": 2e-6, "rtol": 2e-6},
    torch.float16: {"atol": 1e-5, "rtol": 2**-11 + 1e-5},
    torch.bfloat16: {"atol": 1e-5, "rtol": 2**-8 + 1e-5},
}


def draw(
    offsets: list[int], *, batch: int = 2, heads: int = 4, head_dim: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in ((batch, heads), (20,), (20,)))
    return q, k, v, torch.tensor(offsets)


def oracle(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], lengths: list[int] | None, scale: float) -> Tensor:
    """One number after the other, from the definition."""
    batch, heads, _ = q.shape
    kv_heads = (len(offsets) - 1) // batch
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            n = b * kv_heads + h * kv_heads // heads
            start, stop = (min(max(end, 0), len(k)) for end in offsets[n : n + 2])
            rows = range(start, stop if lengths is None else min(stop, start + max(lengths[n], 0)))
            weights = attention(q[b, h].tolist(), [k[i].tolist() for i in rows], scale)
            for weight, i in zip(weights, rows, strict=True):
                out[b, h] += weight * v[i].double()
    return out.to(q.dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("offsets", "lengths"),
    [
        pytest.param([0, 5, 6, 13, 20], None, id="every row valid"),
        pytest.param([0, 0, 12, 12, 20], None, id="heads without rows"),
        pytest.param([2, 9, 9, 15, 18], [3, 4, 0, 9], id="room to append to"),
        pytest.param([0, 7, 20], [7, 1], id="MQA"),
        pytest.param([0, 1, 2, 4, 8, 9, 15, 18, 20], None, id="MHA"),
    ],
)
def test_it_equals_a_walk_row_by_row(offsets: list[int], lengths: list[int] | None, dtype: torch.dtype) -> None:
    q, k, v, cu_seqlens = draw(offsets, dtype=dtype)
    valid = None if lengths is None else torch.tensor(lengths)
    for scale in (None, 2.0, -0.3):
        out = reference.ragged_decode_attention(q=q, k=k, v=v, cu_seqlens=cu_seqlens, lengths=valid, scale=scale)
        expected = oracle(q, k, v, offsets, lengths, 3**-0.5 if scale is None else scale)
        torch.testing.assert_close(out, expected, **TOLERANCES[dtype])


@settings(max_examples=40, deadline=None)
@given(
    offsets=st.lists(st.integers(-5, 30), min_size=5, max_size=5),
    lengths=st.none() | st.lists(st.integers(-2, 25), min_size=4, max_size=4),
)
@example(offsets=[-3, 7, 99, 12, 2], lengths=None)
@example(offsets=[0, 7, 9, 9, 20], lengths=[-2, 2, 0, 30])
def test_offsets_and_lengths_are_clamped(offsets: list[int], lengths: list[int] | None) -> None:
    q, k, v, cu_seqlens = draw(offsets)
    out = ops.ragged_decode_attention(q, k, v, cu_seqlens, lengths=None if lengths is None else torch.tensor(lengths))
    torch.testing.assert_close(out, oracle(q, k, v, offsets, lengths, 3**-0.5), **TOLERANCES[torch.float32])


def test_integers_of_32_bits_and_a_scale() -> None:
    q, k, v, cu_seqlens = draw([0, 7, 9, 9, 20])
    lengths = torch.tensor([4, 2, 0, 30], dtype=torch.int32)
    out = ops.ragged_decode_attention(q, k, v, cu_seqlens.int(), lengths=lengths, scale=0.5)
    expected = oracle(q, k, v, [0, 7, 9, 9, 20], [4, 2, 0, 30], 0.5)
    torch.testing.assert_close(out, expected, **TOLERANCES[torch.float32])


def test_equals_dense_attention_when_every_head_kept_the_same() -> None:
    batch, heads, kv_heads, tokens, head_dim = 2, 6, 2, 9, 5
    q, k, v = (torch.randn(batch, n, t, head_dim) for n, t in ((heads, 1), (kv_heads, tokens), (kv_heads, tokens)))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    offsets = tokens * torch.arange(batch * kv_heads + 1)
    out = ops.ragged_decode_attention(q[:, :, 0], k.view(-1, head_dim), v.view(-1, head_dim), offsets)
    torch.testing.assert_close(out, expected[:, :, 0], **TOLERANCES[torch.float32])


def test_rows_beyond_the_lengths_do_not_matter() -> None:
    q, k, v, offsets = draw([0, 7, 9, 14, 20])
    lengths = torch.tensor([4, 2, 0, 1])
    expected = ops.ragged_decode_attention(q, k, v, offsets, lengths=lengths)
    beyond = [4, 5, 6, *range(9, 14), *range(15, 20)]
    k[beyond] = v[beyond] = float("nan")
    assert torch.equal(ops.ragged_decode_attention(q, k, v, offsets, lengths=lengths), expected)


Q, K, OFFSETS = torch.zeros(2, 4, 3), torch.zeros(20, 3), torch.tensor([0, 5, 10, 15, 20])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"q": [1.0]}, TypeError, "q is a list, expected a torch.Tensor", id="q of list"),
        pytest.param(
            {"q": Q.double()},
            TypeError,
            "q has dtype torch.float64, expected one of float32, bfloat16, float16",
            id="dtype of q",
        ),
        pytest.param({"q": Q.to_sparse()}, TypeError, "q has layout torch.sparse_coo, expected a dense", id="sparse q"),
        pytest.param(
            {"q": Q[0]}, ValueError, r"q has shape \[4, 3\], expected \[B, H, D\] with B, H and D >= 1", id="rank of q"
        ),
        pytest.param({"q": Q[:0]}, ValueError, r"q has shape \[0, 4, 3\], expected \[B, H, D\]", id="no sequences"),
        pytest.param({"k": None}, TypeError, "k is a NoneType, expected a torch.Tensor", id="no k"),
        pytest.param(
            {"k": K.half()}, TypeError, "k has dtype torch.float16, expected torch.float32, as q has", id="two dtypes"
        ),
        pytest.param(
            {"k": K[None]}, ValueError, r"k has shape \[1, 20, 3\], expected \[T, D\] with D >= 1", id="rank of k"
        ),
        pytest.param(
            {"k": K[:, :2]}, ValueError, r"k has shape \[20, 2\], expected \[T, D\] with D = 3", id="width of k"
        ),
        pytest.param(
            {"v": K[:, :2]}, ValueError, r"v has shape \[20, 2\], expected \[20, 3\], as k has", id="width of v"
        ),
        pytest.param({"v": K.to("meta")}, ValueError, "v is on meta, expected cpu, where k is", id="v elsewhere"),
        pytest.param({"v": K[1:]}, ValueError, r"v has shape \[19, 3\], expected \[20, 3\], as k has", id="rows of v"),
        pytest.param(
            {"cu_seqlens": [0, 20]},
            TypeError,
            r"cu_seqlens is a list, expected an integer tensor \[B\*G\+1\]",
            id="offsets of list",
        ),
        pytest.param(
            {"cu_seqlens": OFFSETS.float()},
            TypeError,
            "cu_seqlens has dtype torch.float32, expected torch.int32 or",
            id="offsets of floats",
        ),
        pytest.param(
            {"cu_seqlens": OFFSETS.to("meta")},
            ValueError,
            "cu_seqlens is on meta, expected cpu, where q is",
            id="offsets elsewhere",
        ),
        pytest.param(
            {"cu_seqlens": OFFSETS[None]},
            ValueError,
            r"cu_seqlens has shape \[1, 5\], expected \[B\*G\+1\]",
            id="rank of offsets",
        ),
        pytest.param(
            {"cu_seqlens": OFFSETS[:0]},
            ValueError,
            r"cu_seqlens has 0 entries, expected B\*G \+ 1 with B = 2",
            id="no offsets",
        ),
        pytest.param(
            {"cu_seqlens": OFFSETS[:1]},
            ValueError,
            r"cu_seqlens has 1 entries, expected B\*G \+ 1 with B = 2",
            id="no heads",
        ),
        pytest.param(
            {"cu_seqlens": OFFSETS[:4]},
            ValueError,
            r"cu_seqlens has 4 entries, expected B\*G \+ 1 with B = 2",
            id="heads of half a sequence",
        ),
        pytest.param(
            {"cu_seqlens": torch.arange(7)},
            ValueError,
            "cu_seqlens has 7 entries, expected .* G dividing H = 4",
            id="heads that do not divide",
        ),
        pytest.param(
            {"lengths": 3}, TypeError, r"lengths is a int, expected an integer tensor \[B\*G\]", id="lengths of int"
        ),
        pytest.param(
            {"lengths": torch.ones(4)},
            TypeError,
            "lengths has dtype torch.float32, expected torch.int32 or torch.int64",
            id="lengths of floats",
        ),
        pytest.param(
            {"lengths": OFFSETS[:4].to("meta")},
            ValueError,
            "lengths is on meta, expected cpu, where q is",
            id="lengths elsewhere",
        ),
        pytest.param(
            {"lengths": OFFSETS[:4].view(2, 2)},
            ValueError,
            r"lengths has shape \[2, 2\], expected \[B\*G\] = \[4\]",
            id="rank of lengths",
        ),
        pytest.param(
            {"lengths": OFFSETS},
            ValueError,
            r"lengths has shape \[5\], expected \[B\*G\] = \[4\]",
            id="one length too many",
        ),
        pytest.param({"scale": float("nan")}, ValueError, "scale is nan, expected a finite number", id="scale of NaN"),
        pytest.param({"scale": "1"}, TypeError, "scale is '1'", id="scale of text"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.ragged_decode_attention(**{"q": Q, "k": K, "v": K, "cu_seqlens": OFFSETS, **change})


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 0, 9, 5])], ids=["all valid", "lengths"])
def test_it_passes_opcheck(lengths: Tensor | None) -> None:
    op = torch.ops.condense_core.ragged_decode_attention.default
    torch.library.opcheck(op, (*draw([0, 7, 9, 9, 20]), lengths, 0.5))


def test_it_is_traced_without_a_break() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, lengths: Tensor) -> Tensor:
        return ops.ragged_decode_attention(q * 2, k, v, offsets, lengths=lengths) + 1

    arguments = (*draw([0, 7, 9, 9, 20]), torch.tensor([2, 0, 9, 5]))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), step(*arguments))
