"""key_similarity (KeyDiff): how little a key points where the mean of its head's normed keys points.

    score_i = -cos(k_i, mean_j k_j / ||k_j||);   +inf for `sink` and `window`, -inf for padding, as in key_norm

The mean must be complete before the first score, so there are two launches, and k is read twice: 2*B*G*N*D elements,
the second time from L2 where it fits. B*G*N scores are written, 4 bytes each. Each reading does a handful of operations
per element: bound by memory.

Both launches have the same programs. The tokens of a head are cut into `splits` runs, so that there are about four
programs per multiprocessor, and a program walks through its run BLOCK_N tokens at a time. Tiles come through shared
memory by asynchronous copies, two ahead of the one in use. The first launch writes the sum of k_i / ||k_i|| over each
run, B*G*splits*D elements in fp32. In the second, every program adds up the sums of its head, in the order of the runs,
and scores its own run. Without atomics the result has the same bits every time.

Reference: condense_core/ops/reference/key_similarity.py. Tests: tests/kernels/test_key_similarity.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.common import contiguous, force, load_tile, locate_head, rows_contiguous
from condense_core.kernels.launch import launch, target_of
from condense_core.ops.arguments import KeySimilarityArgs

# Elements of a tile of keys: 32 per thread with 128 threads, next to as many of the running sum.
_TILE = 4096
_NORMALIZE_EPS = tl.constexpr(1e-12)  # torch.nn.functional.normalize
_COSINE_EPS = tl.constexpr(1e-8)  # torch.nn.functional.cosine_similarity


def unsupported(args: KeySimilarityArgs) -> str | None:
    """Why the kernels cannot take these, or None."""
    head_dim = args.k.shape[3]
    if triton.next_power_of_2(head_dim) > _TILE:
        return f"head_dim is {head_dim}, more than the {_TILE} elements of a tile"
    return None


@triton.jit
def _key_sums_kernel(
    k_ptr,  # (batch, num_kv_heads, num_tokens, HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    sums_ptr,  # (batch, num_kv_heads, splits, HEAD_DIM) fp32
    num_tokens,
    num_kv_heads,
    splits,
    run,  # tokens of a split, a multiple of BLOCK_N
    k_stride_b,
    k_stride_h,
    k_stride_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0).to(tl.int64)  # counted over the heads of the batch
    batch, kv_head, start, stop = locate_head(split // splits, num_kv_heads, bounds_ptr, num_tokens)
    first = (split % splits) * run
    low, high = tl.maximum(first, start), tl.minimum(first + run, stop)

    k_ptr += batch * k_stride_b + kv_head * k_stride_h
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for tile in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        token = tile + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, token, token < high, k_stride_n, HEAD_DIM, BLOCK_D).to(tl.float32)
        norm = tl.maximum(tl.sqrt_rn(tl.sum(k * k, 1)), _NORMALIZE_EPS)
        total += k * tl.div_rn(1.0, norm)[:, None]
    dim = tl.arange(0, BLOCK_D)
    tl.store(sums_ptr + split * HEAD_DIM + dim, tl.sum(total, 0), mask=dim < HEAD_DIM)


@triton.jit
def _cosines_kernel(
    k_ptr,  # (batch, num_kv_heads, num_tokens, HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    sums_ptr,  # (batch, num_kv_heads, splits, HEAD_DIM) fp32
    scores_ptr,  # (batch, num_kv_heads, num_tokens) fp32
    num_tokens,
    num_kv_heads,
    splits,
    run,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    sink,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0).to(tl.int64)
    batch_head = split // splits
    batch, kv_head, start, stop = locate_head(batch_head, num_kv_heads, bounds_ptr, num_tokens)
    first = (split % splits) * run

    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for s in range(0, splits, BLOCK_N):
        other = s + tl.arange(0, BLOCK_N)
        sums += load_tile(sums_ptr, batch_head * splits + other, other < splits, HEAD_DIM, HEAD_DIM, BLOCK_D)
    anchor = tl.sum(sums, 0) / tl.maximum(stop - start, 1).to(tl.float32)
    anchor *= 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(anchor * anchor, 0)), _COSINE_EPS)

    k_ptr += batch * k_stride_b + kv_head * k_stride_h
    for tile in tl.range(first, tl.minimum(first + run, num_tokens), BLOCK_N, num_stages=STAGES):
        token = tile + tl.arange(0, BLOCK_N)
        real = (token >= start) & (token < stop)
        k = load_tile(k_ptr, token, real, k_stride_n, HEAD_DIM, BLOCK_D).to(tl.float32)
        norm = tl.maximum(tl.sqrt_rn(tl.sum(k * k, 1)), _COSINE_EPS)
        scores = -tl.sum(k * anchor[None], 1) / norm
        scores = force(scores, token, start, stop, sink, window)
        # Runs are whole tiles, so no token is another program's.
        tl.store(scores_ptr + batch_head * num_tokens + token, scores, mask=token < num_tokens)


def forward(args: KeySimilarityArgs) -> Tensor:
    """Scores `[B, G, N]` fp32."""
    k, bounds = rows_contiguous(args.k), contiguous(args.bounds)
    batch, num_kv_heads, num_tokens, head_dim = k.shape
    block_d = triton.next_power_of_2(head_dim)
    block_n = _TILE // block_d
    # Two tiles at least: a shorter run would cost as many bytes of sums as of keys.
    programs = 4 * target_of(k.device).num_sms
    tiles = triton.cdiv(num_tokens, block_n)
    run = block_n * max(2, triton.cdiv(tiles * batch * num_kv_heads, programs))
    splits = triton.cdiv(num_tokens, run)
    sums = k.new_empty(batch, num_kv_heads, splits, head_dim, dtype=torch.float32)
    scores = k.new_empty(batch, num_kv_heads, num_tokens, dtype=torch.float32)
    grid = (batch * num_kv_heads * splits,)
    shape = (num_tokens, num_kv_heads, splits, run, *k.stride()[:3])
    configs = [triton.Config({}, num_warps=4, num_stages=3)]
    options = {"HEAD_DIM": head_dim, "BLOCK_N": block_n, "BLOCK_D": block_d, "STAGES": 3}
    launch(_key_sums_kernel, grid, k, bounds, sums, *shape, configs=configs, **options)
    forced = (args.sink, args.window)
    launch(_cosines_kernel, grid, k, bounds, sums, scores, *shape, *forced, configs=configs, **options)
    return scores
