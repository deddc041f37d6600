"""lag_scores (LagKV): how far keys and values spread beyond the range of the next chunk, ranked in their chunk.

Specification: `condense_core.ops.reference.lag_scores`.

One launch, one program per chunk of `lag_size` tokens and head. It reads its own chunk and the next one of K and V:
every chunk is read twice, the second time from L2 (2*B*G*N*D elements from memory, twice that from L2), and B*G*N
scores in fp32 are written. About ten operations per element: bound by memory, or, on a short context, by the latency of
one program (14 chunks of 128 tokens and 8 heads are 112 programs at 2,048 tokens, less than one per multiprocessor).

Channels go in tiles of [chunk, BLOCK_T], four at a time (own and next chunk, keys and values), by asynchronous copies
through shared memory, as many tiles ahead as it holds. 32 channels at 128 tokens, two tiles of each on their way, keep
two programs of 8 warps on a multiprocessor, and any head_dim works. The range of a channel lies within one tile; the
variance over channels is merged from tile to tile (Chan et al.), which does not cancel as a difference of sums would.
Ranks come from comparing all pairs, a column block of the scores at a time, in registers: lag_size^2 comparisons are
less work than the variances.

What is not scored (sinks, the last full chunk and the rest, padding) is written by the same programs: program c of a
head also fills the tokens [c*lag_size, (c+1)*lag_size) as far as they are no scored chunk's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.bounds import load_bounds
from condense_core.kernels.launch import fitting, launch, target_of

# Elements of a tile: 16 per thread with 256 threads.
_TILE = 4096
_MAX_CHUNK = 1024
# Bytes of shared memory beside the tiles, for reductions and conversions, rounded up.
_SCRATCH = 16_384
_LOG2E = tl.constexpr(1.4426950408889634)
_TINY = tl.constexpr(2.0**-126)


def unsupported(k: Tensor, v: Tensor, lag_size: int, *_: object) -> str | None:
    """Why the kernel cannot take these, or None."""
    if lag_size > _MAX_CHUNK:
        return f"lag_size is {lag_size}, more than the {_MAX_CHUNK} tokens that one program holds"
    return None


@triton.jit
def _range(low, high, other_low, other_high):
    # The ordinary minimum and maximum drop NaN.
    low = tl.minimum(low, other_low, propagate_nan=tl.PropagateNan.ALL)
    return low, tl.maximum(high, other_high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _merge_tile(x, reference, row_ok, dim_ok, width, done, mean, m2):
    """Mean and sum of squared deviations over channels, `[BLOCK_L]` each, of the relative values after one more tile.

    Args:
        x, reference: `[BLOCK_L, BLOCK_T]`, a tile of the own chunk and of the next one.
        width, done: channels in this tile and in those before it.
    """
    reference = reference.to(tl.float32)
    low, high = tl.reduce(
        (tl.where(row_ok[:, None], reference, float("inf")), tl.where(row_ok[:, None], reference, float("-inf"))),
        0,
        _range,
    )
    span = high - low  # (BLOCK_T,)
    # Without a range, as outside of head_dim, a channel contributes 0. NaN is a range: it must reach the scores.
    flat = span < _TINY
    z = (x.to(tl.float32) - low[None]) * (1.0 / tl.where(flat, 1.0, span))[None]
    z = tl.where(flat[None] | ~dim_ok[None], 0.0, z)
    tile_mean = tl.sum(z, 1) / width
    deviation = tl.where(dim_ok[None], z - tile_mean[:, None], 0.0)
    delta = tile_mean - mean
    m2 += tl.sum(deviation * deviation, 1) + delta * delta * (done * width / (done + width))
    return mean + delta * (width / (done + width)), m2


@triton.jit
def _softmax(m2, row_ok, HEAD_DIM: tl.constexpr):
    """Softmax over the chunk of the standard deviations, without those that are not finite; and which were."""
    std = tl.sqrt_rn(m2 / max(HEAD_DIM - 1, 1))
    counts = row_ok & (std < float("inf"))  # false for NaN
    logits = tl.where(counts, std * _LOG2E, float("-inf"))
    top = tl.max(logits, 0)
    p = tl.exp2(logits - tl.where(top == float("-inf"), 0.0, top))
    return p / tl.sum(p, 0), counts


@triton.jit
def _rank(score, row, LAG: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr):
    """How many of the first LAG scores stand below each, `[BLOCK_L]`; of equal ones the later stands below."""
    score = tl.where(row < LAG, score, float("inf"))  # not below any
    rank = tl.zeros([BLOCK_L], tl.int32)
    for r in range(BLOCK_L // BLOCK_R):
        column = r * BLOCK_R + tl.arange(0, BLOCK_R)
        other = tl.gather(score, column, 0)
        later = column[None] > row[:, None]
        below = (other[None] < score[:, None]) | ((other[None] == score[:, None]) & later)
        rank += tl.sum(below.to(tl.int32), 1)
    return rank


@triton.jit
def _lag_kernel(
    k_ptr,  # (batch, num_heads, num_tokens, HEAD_DIM)
    v_ptr,  # (batch, num_heads, num_tokens, HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    out_ptr,  # (batch, num_heads, num_tokens) fp32
    num_tokens,
    num_heads,
    sink,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    HEAD_DIM: tl.constexpr,
    LAG: tl.constexpr,
    BLOCK_L: tl.constexpr,  # LAG, rounded up to a power of two
    BLOCK_T: tl.constexpr,  # channels of a tile
    BLOCK_R: tl.constexpr,  # scores of a column block
    STAGES: tl.constexpr,
):
    programs = tl.cdiv(num_tokens, LAG)
    chunk = (tl.program_id(0) % programs).to(tl.int64)
    head = (tl.program_id(0) // programs).to(tl.int64)  # counted over the batch
    b = head // num_heads
    start, stop = load_bounds(bounds_ptr, b, num_tokens)
    length = stop - start
    out_head = out_ptr + head * num_tokens
    row = tl.arange(0, BLOCK_L)
    row_ok = row < LAG

    # Chunks that are scored: [begin, end). All full ones but the last, and no full one where there is only one.
    full = tl.maximum(length - sink, 0) // LAG
    begin = start + sink
    end = begin + tl.maximum(full - 1, 0) * LAG

    token = chunk * LAG + row
    place = token - begin  # counted from the end of the sinks
    rest = tl.maximum(length - sink, 1)
    value = tl.where(
        (full < 2) & (place >= 0),
        tl.div_rn(place.to(tl.float32), rest.to(tl.float32) + tl.zeros_like(row)),
        float("inf"),
    )
    value = tl.where((token >= start) & (token < stop), value, float("-inf"))
    scored = (token >= begin) & (token < end)
    tl.store(out_head + token, value, mask=row_ok & (token < num_tokens) & ~scored)

    if chunk < full - 1:
        token = begin + chunk * LAG + row
        head_in_batch = head % num_heads
        k_own = k_ptr + b * k_stride_b + head_in_batch * k_stride_h + token * k_stride_n
        v_own = v_ptr + b * v_stride_b + head_in_batch * v_stride_h + token * v_stride_n
        following = tl.zeros([], tl.int64) + LAG  # a stride times LAG may pass 32 bits
        k_mean = tl.zeros([BLOCK_L], tl.float32)
        k_m2 = tl.zeros([BLOCK_L], tl.float32)
        v_mean = tl.zeros([BLOCK_L], tl.float32)
        v_m2 = tl.zeros([BLOCK_L], tl.float32)
        for before in tl.range(0, HEAD_DIM, BLOCK_T, num_stages=STAGES):
            dim = before + tl.arange(0, BLOCK_T)
            dim_ok = dim < HEAD_DIM
            mask = row_ok[:, None] & dim_ok[None]
            k_reference = tl.load((k_own + following * k_stride_n)[:, None] + dim[None], mask=mask, other=0.0)
            v_reference = tl.load((v_own + following * v_stride_n)[:, None] + dim[None], mask=mask, other=0.0)
            k = tl.load(k_own[:, None] + dim[None], mask=mask, other=0.0)
            v = tl.load(v_own[:, None] + dim[None], mask=mask, other=0.0)
            done = tl.zeros([], tl.float32) + before
            width = tl.minimum(HEAD_DIM - done, BLOCK_T)
            k_mean, k_m2 = _merge_tile(k, k_reference, row_ok, dim_ok, width, done, k_mean, k_m2)
            v_mean, v_m2 = _merge_tile(v, v_reference, row_ok, dim_ok, width, done, v_mean, v_m2)
        k_score, k_counts = _softmax(k_m2, row_ok, HEAD_DIM)
        v_score, v_counts = _softmax(v_m2, row_ok, HEAD_DIM)
        score = tl.where(k_counts & v_counts, (k_score + v_score) * 0.5, -1.0)  # below any softmax
        rank = _rank(score, row, LAG, BLOCK_L, BLOCK_R).to(tl.float32)
        tl.store(out_head + token, tl.div_rn(rank, tl.full([BLOCK_L], LAG, tl.float32)), mask=row_ok)


def forward(k: Tensor, v: Tensor, lag_size: int, sink: int, bounds: Tensor | None) -> Tensor:
    """`[B, G, N, D]` twice `-> [B, G, N]` fp32."""
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    batch, heads, tokens, head_dim = k.shape
    scores = k.new_empty(batch, heads, tokens, dtype=torch.float32)
    block_l = triton.next_power_of_2(lag_size)
    # Rows of 16 channels at least are whole sectors of memory.
    block_t = min(triton.next_power_of_2(head_dim), max(_TILE // block_l, 16))
    tile = block_l * block_t
    num_warps = max(1, min(16, tile // 512))
    configs = [triton.Config({"STAGES": stages}, num_warps=num_warps, num_stages=stages) for stages in (3, 2, 1)]
    launch(
        _lag_kernel,
        (batch * heads * triton.cdiv(tokens, lag_size),),
        *(k, v, None if bounds is None else bounds.contiguous(), scores, tokens, heads, sink),
        *(k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2)),
        # Stages are chosen, not tuned: as many as fit.
        configs=fitting(
            configs,
            target_of(k.device),
            lambda config: (config.num_stages - 1) * 4 * tile * k.element_size() + _SCRATCH,
        )[:1],
        HEAD_DIM=head_dim,
        LAG=lag_size,
        BLOCK_L=block_l,
        BLOCK_T=block_t,
        BLOCK_R=min(block_l, max(_TILE // block_l, 16)),
    )
    return scores
