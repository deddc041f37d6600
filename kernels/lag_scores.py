"""lag_scores (LagKV): how far keys and values spread, relative to the next chunk's range, as a rank in their chunk.

After the sinks a sequence is cut into chunks of L = lag_size tokens. With x a key or value of chunk c, and for every
channel d the range of chunk c + 1:

    z_id = (x_id - min_d) / (max_d - min_d),   p_i = softmax over the chunk of the standard deviation of z_i over d,
    score_i = (how many tokens of the chunk have a smaller p^K + p^V) / L

Sinks, the last full chunk and what follows it score +inf, padding -inf; a sequence of less than two full chunks is
scored by its positions.

One launch, one program per chunk and head, which reads its own chunk and the next one of K and V. So every chunk is
read twice, the second time from L2: 2*B*G*N*D elements come from memory, about twice as many pass through L2. B*G*N
scores are written, 4 bytes each. About ten operations per element: bound by memory, or, on a short context, by the
latency of one program (14 chunks of 128 tokens and 8 heads are 112 programs at 2,048 tokens, less than one per
multiprocessor).

Channels go in tiles of [L, BLOCK_T], four at a time (own and next chunk, keys and values), by asynchronous copies
through shared memory, as many tiles ahead as it holds. With 32 channels at 128 tokens and two tiles of each on their
way, two programs of 8 warps fit on a multiprocessor, and any head_dim works. The range of a channel lies within one
tile. The variance over channels is merged from tile to tile (Chan et al.), which does not cancel as a difference of
sums would. Ranks come from comparing all pairs, a column block of the scores at a time, in registers: L^2 comparisons
are less work than the variances.

What is not scored (sinks, the last full chunk and the rest, padding) is written by the same programs: program c of a
head also fills the tokens [c*L, (c+1)*L) as far as they belong to no scored chunk.

Reference: condense_core/ops/reference/lag_scores.py. Tests: tests/kernels/test_lag_scores.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.common import LOG2E, contiguous, locate_head, rows_contiguous
from condense_core.kernels.launch import fitting, launch, target_of
from condense_core.ops.arguments import LagScoresArgs

# Elements of a tile: 16 per thread with 256 threads.
_TILE = 4096
_MAX_CHUNK = 1024
# Bytes of shared memory beside the tiles, for reductions and conversions, rounded up.
_SCRATCH = 16_384
_TINY = tl.constexpr(2.0**-126)


def unsupported(args: LagScoresArgs) -> str | None:
    """Why the kernel cannot take these, or None."""
    if args.lag_size > _MAX_CHUNK:
        return f"lag_size is {args.lag_size}, more than the {_MAX_CHUNK} tokens that one program holds"
    return None


@triton.jit
def _range(low, high, other_low, other_high):
    # The ordinary minimum and maximum drop NaN.
    low = tl.minimum(low, other_low, propagate_nan=tl.PropagateNan.ALL)
    return low, tl.maximum(high, other_high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _merge_tile(x, reference, row_ok, dim_ok, width, done, mean, m2):
    """The means and sums of squared deviations of the relative values over channels, after one more tile.

    `x` and `reference` are a tile, `[BLOCK_L, BLOCK_T]`, of the own chunk and of the next one; `width` is the channels
    in this tile, `done` those before it; `mean` and `m2` are `[BLOCK_L]`.
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
    logits = tl.where(counts, std * LOG2E, float("-inf"))
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
    k_ptr,  # (batch, num_kv_heads, num_tokens, HEAD_DIM)
    v_ptr,  # (batch, num_kv_heads, num_tokens, HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    scores_ptr,  # (batch, num_kv_heads, num_tokens) fp32
    num_tokens,
    num_kv_heads,
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
    batch_head = (tl.program_id(0) // programs).to(tl.int64)
    batch, kv_head, start, stop = locate_head(batch_head, num_kv_heads, bounds_ptr, num_tokens)
    length = stop - start
    scores_ptr += batch_head * num_tokens
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
    tl.store(scores_ptr + token, value, mask=row_ok & (token < num_tokens) & ~scored)

    if chunk < full - 1:
        token = begin + chunk * LAG + row
        k_own = k_ptr + batch * k_stride_b + kv_head * k_stride_h + token * k_stride_n
        v_own = v_ptr + batch * v_stride_b + kv_head * v_stride_h + token * v_stride_n
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
        tl.store(scores_ptr + token, tl.div_rn(rank, tl.full([BLOCK_L], LAG, tl.float32)), mask=row_ok)


def forward(args: LagScoresArgs) -> Tensor:
    """Scores `[B, G, N]` fp32."""
    k, v, lag_size = rows_contiguous(args.k), rows_contiguous(args.v), args.lag_size
    batch, num_kv_heads, num_tokens, head_dim = k.shape
    scores = k.new_empty(batch, num_kv_heads, num_tokens, dtype=torch.float32)
    block_l = triton.next_power_of_2(lag_size)
    # Rows of 16 channels at least are whole sectors of memory.
    block_t = min(triton.next_power_of_2(head_dim), max(_TILE // block_l, 16))
    tile = block_l * block_t
    num_warps = max(1, min(16, tile // 512))
    configs = [triton.Config({"STAGES": stages}, num_warps=num_warps, num_stages=stages) for stages in (3, 2, 1)]
    launch(
        _lag_kernel,
        (batch * num_kv_heads * triton.cdiv(num_tokens, lag_size),),
        *(k, v, contiguous(args.bounds), scores, num_tokens, num_kv_heads, args.sink, *k.stride()[:3], *v.stride()[:3]),
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
