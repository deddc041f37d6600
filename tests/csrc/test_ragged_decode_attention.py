"""The CPU kernel of ragged_decode_attention against the specification."""

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import RaggedDecodeAttentionArgs
from condense_core.ops.cpu.ragged_decode_attention import ragged_decode_attention

# Logits of order 1 over at most 256 channels are off by some 1e-6, which the exponential makes relative; the sums over
# at most 1,300 rows go in another order. Then one rounding to the dtype, which the reference does as well: neighbours.
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 3e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-5},
}


def cache(
    batch: int, q_heads: int, counts: list[int], head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, q_heads, head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(sum(counts), head_dim, generator=generator).to(dtype) for _ in range(2))
    return q, k, v, torch.tensor([0, *counts]).cumsum(0)


def check(*arguments: object, dtype: torch.dtype = torch.float32) -> Tensor:
    actual = ragged_decode_attention(RaggedDecodeAttentionArgs(*arguments))
    torch.testing.assert_close(
        actual, reference.ragged_decode_attention(*arguments), equal_nan=True, **TOLERANCES[dtype]
    )
    return actual


# (sequences, query heads, rows of each KV head, head_dim): groups of 4, of 1, of 5, of 9; splits that are whole, that
# are not, none; rows of whole vectors, of a part, of one element.
CASES = [
    (1, 8, [512, 1300], 128),
    (2, 3, [7, 0, 1, 33, 2, 16], 80),
    (1, 5, [40], 7),
    (1, 18, [9, 515], 96),
    (1, 2, [1, 3], 1),
    (3, 1, [0, 0, 0], 64),
    (1, 4, [70], 256),
]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_reference(case: tuple[int, int, list[int], int], dtype: torch.dtype) -> None:
    q, k, v, cu_seqlens = cache(*case, dtype=dtype)
    for scale in (case[3] ** -0.5, 0.0, -0.3):
        check(q, k, v, cu_seqlens, None, scale, dtype=dtype)
    check(q, k, v, cu_seqlens.int(), torch.tensor(case[2]).int() // 2, 0.1, dtype=dtype)


@pytest.mark.usefixtures("isa")
def test_offsets_and_lengths_are_clamped() -> None:
    q, k, v, _ = cache(1, 4, [60], 24)
    k[50:], v[50:] = float("nan"), float("nan")  # never read
    for index in (torch.int32, torch.int64):
        for offsets, lengths in (([-9, 50], [99]), ([20, 70], [30]), ([30, 10], [5]), ([70, 90], [5]), ([0, 50], [-3])):
            out = check(q, k, v, torch.tensor(offsets, dtype=index), torch.tensor(lengths, dtype=index), 0.2)
            assert not out.isnan().any()


@pytest.mark.usefixtures("isa")
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    q, k, v, cu_seqlens = cache(1, 6, [40, 33], 48, dtype=dtype)
    offsets = torch.stack([cu_seqlens, cu_seqlens], 1)[:, 0]
    wide = torch.cat([k, v], 1)
    expected = ragged_decode_attention(
        RaggedDecodeAttentionArgs(q[..., ::2].clone(), k[:, :24], v[:, ::2].clone(), offsets, None, 1.0)
    )
    out = ragged_decode_attention(RaggedDecodeAttentionArgs(q[..., ::2], wide[:, :24], v[:, ::2], offsets, None, 1.0))
    assert torch.equal(out, expected)
    transposed = q.transpose(0, 1).contiguous().transpose(0, 1)
    check(transposed, wide[:, :48], wide[:, 48:], offsets, torch.tensor([20, 1, 30])[::2], 0.1, dtype=dtype)


@pytest.mark.usefixtures("isa")
def test_infinite_logits_and_nan() -> None:
    q, k, v, cu_seqlens = cache(1, 5, [600, 600, 30, 30, 30], 16)
    q[0], k[:, 0] = q[0].abs(), k[:, 0].abs()
    k[3, 0] = float("-inf")  # no weight
    k[600:1112, 0] = float("-inf")  # a whole split
    k[1200:1230, 0] = float("-inf")  # a whole head: nothing to divide by
    k[1240, 3] = float("nan")
    k[1265, 0] = float("inf")
    expected = check(q, k, v, cu_seqlens, None, 0.25)
    assert not expected[0, :2].isnan().any()
    assert expected[0, 2:].isnan().all()


@pytest.mark.usefixtures("isa")
def test_threads_do_not_change_a_bit() -> None:
    q, k, v, cu_seqlens = cache(1, 8, [1500, 700], 64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(ragged_decode_attention(RaggedDecodeAttentionArgs(q, k, v, cu_seqlens, None, 0.125)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
