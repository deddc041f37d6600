"""The CPU kernel of ragged_decode_attention against the specification."""

from collections.abc import Callable
from typing import NamedTuple

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


class Cache(NamedTuple):
    rows: list[int]  # of each KV head of each sequence
    num_heads: int
    head_dim: int
    batch: int = 1


CACHES = {
    "a group of 4, whole splits of rows and a rest": Cache(rows=[512, 1300], num_heads=8, head_dim=128),
    "two sequences, a head without rows": Cache(rows=[7, 0, 1, 33, 2, 16], num_heads=3, head_dim=80, batch=2),
    "a group of 5, head_dim below a vector": Cache(rows=[40], num_heads=5, head_dim=7),
    "a group of 9": Cache(rows=[9, 515], num_heads=18, head_dim=96),
    "one channel": Cache(rows=[1, 3], num_heads=2, head_dim=1),
    "no rows at all": Cache(rows=[0, 0, 0], num_heads=1, head_dim=64, batch=3),
    "the widest heads": Cache(rows=[70], num_heads=4, head_dim=256),
}


def arguments(cache: Cache, dtype: torch.dtype = torch.float32) -> RaggedDecodeAttentionArgs:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(cache.batch, cache.num_heads, cache.head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(sum(cache.rows), cache.head_dim, generator=generator).to(dtype) for _ in range(2))
    cu_seqlens = torch.tensor([0, *cache.rows]).cumsum(0)
    scale = cache.head_dim**-0.5
    return RaggedDecodeAttentionArgs(q=q, k=k, v=v, cu_seqlens=cu_seqlens, lengths=None, scale=scale)


def check(args: RaggedDecodeAttentionArgs) -> Tensor:
    out, expected = ragged_decode_attention(args), reference.ragged_decode_attention(*args)
    torch.testing.assert_close(out, expected, equal_nan=True, **TOLERANCES[args.q.dtype])
    return out


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_it_equals_the_reference(cache: Cache, dtype: torch.dtype) -> None:
    args = arguments(cache, dtype)
    for scale in (args.scale, 0.0, -0.3):
        check(args._replace(scale=scale))
    check(args._replace(cu_seqlens=args.cu_seqlens.int(), lengths=torch.tensor(cache.rows).int() // 2))


# Offsets and length of one head in a cache of 60 rows, of which those from 50 on are NaN and must not be read.
ROOMS = {
    "length beyond the room": ([-9, 50], 99),
    "room beyond the cache": ([20, 70], 30),
    "falling offsets": ([30, 10], 5),
    "room behind the cache": ([70, 90], 5),
    "negative length": ([0, 50], -3),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("offsets", "length"), ROOMS.values(), ids=ROOMS)
def test_offsets_and_lengths_are_clamped(offsets: list[int], length: int, index: torch.dtype) -> None:
    args = arguments(Cache(rows=[60], num_heads=4, head_dim=24))
    args.k[50:], args.v[50:] = float("nan"), float("nan")
    out = check(
        args._replace(
            cu_seqlens=torch.tensor(offsets, dtype=index), lengths=torch.tensor([length], dtype=index), scale=0.2
        )
    )
    assert not out.isnan().any()


@pytest.mark.usefixtures("isa")
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    args = arguments(Cache(rows=[40, 33], num_heads=6, head_dim=48), dtype)
    both = torch.cat([args.k, args.v], 1)  # keys and values of a token next to each other
    strided = args._replace(
        q=args.q.transpose(0, 1).contiguous().transpose(0, 1),
        k=both[:, :48],
        v=both[:, 48:],
        cu_seqlens=torch.stack([args.cu_seqlens, args.cu_seqlens], 1)[:, 0],
        lengths=torch.tensor([20, 1, 30])[::2],
    )
    check(strided)
    every_other = strided._replace(q=args.q[..., ::2], k=both[:, :48:2], v=args.v[:, ::2])
    copied = every_other._replace(**{name: getattr(every_other, name).contiguous() for name in ("q", "k", "v")})
    assert torch.equal(ragged_decode_attention(every_other), ragged_decode_attention(copied))


@pytest.mark.usefixtures("isa")
def test_infinite_logits_and_nan() -> None:
    args = arguments(Cache(rows=[600, 600, 30, 30, 30], num_heads=5, head_dim=16))
    args.q[0], args.k[:, 0] = args.q[0].abs(), args.k[:, 0].abs()
    args.k[3, 0] = float("-inf")  # no weight
    args.k[600:1112, 0] = float("-inf")  # a whole split
    args.k[1200:1230, 0] = float("-inf")  # a whole head: nothing to divide by
    args.k[1240, 3] = float("nan")
    args.k[1265, 0] = float("inf")
    out = check(args)
    assert not out[0, :2].isnan().any()
    assert out[0, 2:].isnan().all()


@pytest.mark.usefixtures("isa")
def test_threads_do_not_change_a_bit(threads_agree: Callable[..., None]) -> None:
    args = arguments(Cache(rows=[1500, 700], num_heads=8, head_dim=64))
    threads_agree(lambda: [ragged_decode_attention(args)], 1, 2, 7)
