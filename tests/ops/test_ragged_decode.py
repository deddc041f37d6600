"""ragged_decode_attention: the specification against a slow oracle, bad input, and torch.library."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference

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


def oracle(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: list[int] | None, scale: float) -> Tensor:
    """One number after the other, from the definition."""
    batch, heads, head_dim = q.shape
    kv_heads = (len(cu_seqlens) - 1) // batch
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            n = b * kv_heads + h * kv_heads // heads
            start, stop = cu_seqlens[n].item(), cu_seqlens[n + 1].item()
            rows = range(start, stop if lengths is None else min(stop, start + lengths[n]))
            weights = [math.exp(scale * sum(q[b, h, d].item() * k[i, d].item() for d in range(head_dim))) for i in rows]
            for d in range(head_dim):
                total = sum(w * v[i, d].item() for w, i in zip(weights, rows, strict=True))
                out[b, h, d] = total / sum(weights) if weights else 0.0
    return out.to(q.dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("offsets", "lengths"),
    [
        ([0, 5, 6, 13, 20], None),
        ([0, 0, 12, 12, 20], None),
        ([2, 9, 9, 15, 18], [3, 4, 0, 9]),
        ([0, 7, 20], [7, 1]),  # MQA
        ([0, 1, 2, 4, 8, 9, 15, 18, 20], None),  # MHA
    ],
)
def test_the_specification_against_the_oracle(
    offsets: list[int], lengths: list[int] | None, dtype: torch.dtype
) -> None:
    arguments = draw(offsets, dtype=dtype)
    valid = None if lengths is None else torch.tensor(lengths)
    for scale in (None, 2.0, -0.3):
        out = reference.ragged_decode_attention(*arguments, valid, scale)
        expected = oracle(*arguments, lengths, 3**-0.5 if scale is None else scale)
        torch.testing.assert_close(out, expected, **TOLERANCES[dtype])


def test_the_public_op_is_the_specification() -> None:
    q, k, v, offsets = draw([0, 7, 9, 9, 20])
    lengths = torch.tensor([4, 2, 0, 30], dtype=torch.int32)
    expected = oracle(q, k, v, offsets, [4, 2, 0, 30], 0.5)
    out = ops.ragged_decode_attention(q, k, v, offsets.int(), lengths=lengths, scale=0.5)
    torch.testing.assert_close(out, expected, **TOLERANCES[torch.float32])
    default = ops.ragged_decode_attention(q, k, v, offsets)
    torch.testing.assert_close(default, oracle(q, k, v, offsets, None, 3**-0.5), **TOLERANCES[torch.float32])


def test_equals_dense_attention_when_every_head_kept_the_same() -> None:
    batch, heads, kv_heads, tokens, head_dim = 2, 6, 2, 9, 5
    q, k, v = (torch.randn(batch, n, t, head_dim) for n, t in ((heads, 1), (kv_heads, tokens), (kv_heads, tokens)))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    offsets = tokens * torch.arange(batch * kv_heads + 1)
    out = ops.ragged_decode_attention(q[:, :, 0], k.view(-1, head_dim), v.view(-1, head_dim), offsets)
    torch.testing.assert_close(out, expected[:, :, 0], **TOLERANCES[torch.float32])


def test_offsets_out_of_range_are_clamped() -> None:
    q, k, v, _ = draw([0])
    out = ops.ragged_decode_attention(q, k, v, torch.tensor([-3, 7, 99, 12, 2]))
    # Rows [0, 7), [7, 20), none (12 < 20), none.
    expected = oracle(q, k, v, torch.tensor([0, 7, 20, 20, 20]), None, 3**-0.5)
    expected[1, 2:] = 0
    torch.testing.assert_close(out, expected[:, :], **TOLERANCES[torch.float32])


def test_rows_beyond_the_lengths_do_not_matter() -> None:
    q, k, v, offsets = draw([0, 7, 9, 14, 20])
    lengths = torch.tensor([4, 2, 0, 1])
    expected = ops.ragged_decode_attention(q, k, v, offsets, lengths=lengths)
    beyond = [4, 5, 6, *range(9, 14), *range(15, 20)]
    k[beyond] = v[beyond] = float("nan")
    assert torch.equal(ops.ragged_decode_attention(q, k, v, offsets, lengths=lengths), expected)


Q, K, OFFSETS = torch.zeros(2, 4, 3), torch.zeros(20, 3), torch.tensor([0, 5, 10, 15, 20])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q is a list, expected a torch.Tensor"),
        ({"q": Q.double()}, TypeError, "q has dtype torch.float64, expected one of float32, bfloat16, float16"),
        ({"q": Q.to_sparse()}, TypeError, "q has layout torch.sparse_coo, expected a dense"),
        ({"q": Q[0]}, ValueError, r"q has shape \[4, 3\], expected \[B, H, D\] with B, H and D >= 1"),
        ({"q": Q[:0]}, ValueError, r"q has shape \[0, 4, 3\], expected \[B, H, D\]"),
        ({"k": None}, TypeError, "k is a NoneType, expected a torch.Tensor"),
        ({"k": K.half()}, TypeError, "k has dtype torch.float16, expected torch.float32, as q has"),
        ({"k": K[None]}, ValueError, r"k has shape \[1, 20, 3\], expected \[T, D\] with D >= 1"),
        ({"k": K[:, :2]}, ValueError, r"k has shape \[20, 2\], expected \[T, D\] with D = 3"),
        ({"v": K[:, :2]}, ValueError, r"v has shape \[20, 2\], expected \[20, 3\], as k has"),
        ({"v": K.to("meta")}, ValueError, "v is on meta, expected cpu, where k is"),
        ({"v": K[1:]}, ValueError, r"v has shape \[19, 3\], expected \[20, 3\], as k has"),
        ({"cu_seqlens": [0, 20]}, TypeError, r"cu_seqlens is a list, expected an integer tensor \[B\*G\+1\]"),
        ({"cu_seqlens": OFFSETS.float()}, TypeError, "cu_seqlens has dtype torch.float32, expected torch.int32 or"),
        ({"cu_seqlens": OFFSETS.to("meta")}, ValueError, "cu_seqlens is on meta, expected cpu, where q is"),
        ({"cu_seqlens": OFFSETS[None]}, ValueError, r"cu_seqlens has shape \[1, 5\], expected \[B\*G\+1\]"),
        ({"cu_seqlens": OFFSETS[:0]}, ValueError, "cu_seqlens has 0 entries, expected B\\*G \\+ 1 with B = 2"),
        ({"cu_seqlens": OFFSETS[:1]}, ValueError, "cu_seqlens has 1 entries, expected B\\*G \\+ 1 with B = 2"),
        ({"cu_seqlens": OFFSETS[:4]}, ValueError, "cu_seqlens has 4 entries, expected B\\*G \\+ 1 with B = 2"),
        ({"cu_seqlens": torch.arange(7)}, ValueError, "cu_seqlens has 7 entries, expected .* G dividing H = 4"),
        ({"lengths": 3}, TypeError, r"lengths is a int, expected an integer tensor \[B\*G\]"),
        ({"lengths": torch.ones(4)}, TypeError, "lengths has dtype torch.float32, expected torch.int32 or torch.int64"),
        ({"lengths": OFFSETS[:4].to("meta")}, ValueError, "lengths is on meta, expected cpu, where q is"),
        ({"lengths": OFFSETS[:4].view(2, 2)}, ValueError, r"lengths has shape \[2, 2\], expected \[B\*G\] = \[4\]"),
        ({"lengths": OFFSETS}, ValueError, r"lengths has shape \[5\], expected \[B\*G\] = \[4\]"),
        ({"scale": float("nan")}, ValueError, "scale is nan, expected a finite number"),
        ({"scale": "1"}, TypeError, "scale is '1'"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"q": Q, "k": K, "v": K, "cu_seqlens": OFFSETS} | changes
    positional = [arguments.pop(name) for name in ("q", "k", "v", "cu_seqlens")]
    with pytest.raises(error, match=message):
        ops.ragged_decode_attention(*positional, **arguments)


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 0, 9, 5])])
def test_passes_opcheck(lengths: Tensor | None) -> None:
    op = torch.ops.condense_core.ragged_decode_attention.default
    torch.library.opcheck(op, (*draw([0, 7, 9, 9, 20]), lengths, 0.5))


def test_is_traced_without_a_break() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, lengths: Tensor) -> Tensor:
        return ops.ragged_decode_attention(q * 2, k, v, offsets, lengths=lengths) + 1

    arguments = (*draw([0, 7, 9, 9, 20]), torch.tensor([2, 0, 9, 5]))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), step(*arguments))
