"""query_moments: mean and covariance of each head's queries, with their rotary embedding undone on the way.

With p_i = R_i^T q_i, R_i the rotation of token i, over the n real tokens after the sinks:

    mu = sum_i p_i / n,   cov = sum_i (p_i - mu)(p_i - mu)^T / n

Reads q once, B*H*N*D elements, and half of cos and sin, which come from L2 for all heads but the first. Writes
B*H*D^2 numbers in fp32. The products take 2*B*H*N*D^2 FLOPs, or three quarters of that (see below), undoing the
rotation about 8 fp32 operations per element. At Mistral-7B's shapes (H 32, N 2048, D 128) that is 16.8 MB and 1.6
GFLOP: bound by memory.

A head's tokens are divided among a few programs, about one per multiprocessor in all, so that the partial covariances,
written by the first launch and added up by the second in a fixed order, stay small beside q. RoPE pairs the two halves
of the width, so a program holds a tile as two halves `a` and `b`, [BLOCK_N, D/2], and the covariance as three blocks
aa, ab, bb: it is symmetric, and the fourth block is neither computed nor stored. Each block is one product over the
tile, `a^T b`, of 16-bit operands for 16-bit q. Blocks larger than 64 x 64 (D > 128) do not all fit the registers: a
program then makes one of the three.

Second moments about zero would cancel where |mu| is large against the spread, so a program measures its tokens from the
mean r of its first tile: `y = p - r`, rounded to q's dtype. The results are moments of the rounded `r + y`: with u the
unit roundoff (2^-9 bf16, 2^-12 fp16), off by at most u * mean|y| for mu, and 2u * sqrt(M_ii M_jj) for cov, M the second
moments about r. Input of the same dtype is itself off by u |q|, which is more. The moments of programs s are merged by

    cov = sum_s (M_s - n_s d_s d_s^T + n_s (m_s - m)(m_s - m)^T) / n,
    d_s = mean of y,   m_s = r_s + d_s,   m = sum_s n_s m_s / n,

with every m_s taken relative to the first r, for the same reason.

Reference: condense_core/ops/reference/query_moments.py. Tests: tests/kernels/test_query_moments.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.common import contiguous, dot_size, load_bounds, rows_contiguous
from condense_core.kernels.launch import TRITON_VERSION, launch, target_of
from condense_core.ops.arguments import QueryMomentsArgs

_MAX_HEAD_DIM = 256
# A program of n tokens reads 2 n D bytes and writes 3 D^2: with so many tokens at least it reads about three times what
# it writes.
_TOKENS_PER_DIM = 4


def unsupported(args: QueryMomentsArgs) -> str | None:
    """Why the kernels cannot take these, or None."""
    if args.q.shape[-1] > _MAX_HEAD_DIM:
        return f"head_dim is {args.q.shape[-1]}, more than {_MAX_HEAD_DIM}, whose covariance does not fit the registers"
    if target_of(args.q.device).arch == 100 and TRITON_VERSION < (3, 7):
        return f"Triton {triton.__version__} fails to compile the kernel for compute capability 10.0, 3.7 does not"
    return None


@triton.jit
def _share(split, splits, bounds_ptr, batch, num_tokens, sink, BLOCK_N: tl.constexpr):
    """The tokens of one program: the first, and how many; and how many its head has."""
    start, stop = load_bounds(bounds_ptr, batch, num_tokens)
    first = start + sink
    total = tl.maximum(stop - first, 0)
    share = tl.cdiv(tl.cdiv(total, splits), BLOCK_N) * BLOCK_N
    own = tl.minimum(tl.maximum(total - split * share, 0), share)
    return first + split * share, own, total


@triton.jit
def _load_queries(
    q_ptr,  # (num_tokens, HEAD_DIM)
    cos_ptr,  # (num_tokens, HEAD_DIM) or None
    sin_ptr,  # (num_tokens, HEAD_DIM) or None
    offset,
    real,  # (BLOCK_N,) bool
    q_stride_n,
    cos_stride_n,
    sin_stride_n,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The two halves of the queries from `offset` on, before rotation: fp32 `[BLOCK_N, BLOCK_D]` each, zero outside."""
    place = tl.arange(0, real.shape[0]).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    low = real[:, None] & (column < HALF)[None]
    high = real[:, None] & (column < HEAD_DIM - HALF)[None]
    q_at = q_ptr + offset * q_stride_n + ((place * q_stride_n)[:, None] + column[None])
    a = tl.load(q_at, mask=low, other=0.0).to(tl.float32)
    b = tl.load(q_at + HALF, mask=high, other=0.0).to(tl.float32)
    if cos_ptr is not None:
        cos_at = cos_ptr + offset * cos_stride_n + ((place * cos_stride_n)[:, None] + column[None])
        sin_at = sin_ptr + offset * sin_stride_n + ((place * sin_stride_n)[:, None] + column[None])
        cos = tl.load(cos_at, mask=low, other=1.0).to(tl.float32)
        sin = tl.load(sin_at, mask=low, other=0.0).to(tl.float32)
        inverse = 1.0 / (cos * cos + sin * sin)
        cos *= inverse
        sin *= inverse
        rotated = a
        a = rotated * cos + b * sin
        b = b * cos - rotated * sin
    return a, b


@triton.jit
def _moments_partial_kernel(
    q_ptr,  # (batch, NUM_HEADS, num_tokens, HEAD_DIM)
    cos_ptr,  # (batch or 1, num_tokens, HEAD_DIM) or None
    sin_ptr,  # (batch or 1, num_tokens, HEAD_DIM) or None
    bounds_ptr,  # (batch, 2) or None
    means_ptr,  # (batch * NUM_HEADS, splits, 2, HEAD_DIM) fp32: r, and the mean of y
    moments_ptr,  # (batch * NUM_HEADS, splits, 3, HALF, HALF) fp32: sums of a a^T, a b^T, b b^T of y
    num_tokens,
    splits,
    sink,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    cos_stride_b,  # 0 where one table serves the whole batch
    cos_stride_n,
    sin_stride_b,
    sin_stride_n,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    WHOLE: tl.constexpr,  # all three blocks in one program
    IEEE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if WHOLE:
        block = 0
    else:
        block = (program % 3).to(tl.int32)
        program = program // 3
    batch_head = program // splits
    batch = batch_head // NUM_HEADS
    first, own, _ = _share(program % splits, splits, bounds_ptr, batch, num_tokens, sink, BLOCK_N)
    q_ptr += batch * q_stride_b + (batch_head % NUM_HEADS) * q_stride_h
    if cos_ptr is not None:
        cos_ptr += batch * cos_stride_b
        sin_ptr += batch * sin_stride_b
    place = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)

    r_a = tl.zeros([BLOCK_D], tl.float32)
    r_b = tl.zeros([BLOCK_D], tl.float32)
    sum_a = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_b = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    aa = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    ab = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    bb = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    for offset in range(0, own.to(tl.int32), BLOCK_N):
        real = offset + place < own.to(tl.int32)
        a, b = _load_queries(
            *(q_ptr, cos_ptr, sin_ptr, first + offset, real, q_stride_n, cos_stride_n, sin_stride_n),
            *(HEAD_DIM, HALF, BLOCK_D),
        )
        if offset == 0:
            # Zeros outside add nothing to the sums.
            seen = tl.minimum(own, BLOCK_N).to(tl.float32)
            r_a = tl.sum(a, 0) / seen
            r_b = tl.sum(b, 0) / seen
        y_a = tl.where(real[:, None], a - r_a[None], 0.0).to(q_ptr.dtype.element_ty)
        y_b = tl.where(real[:, None], b - r_b[None], 0.0).to(q_ptr.dtype.element_ty)
        # Element by element: the sum over tokens crosses warps, and is taken once, at the end.
        sum_a += y_a.to(tl.float32)
        sum_b += y_b.to(tl.float32)
        if WHOLE:
            aa = tl.dot(tl.trans(y_a), y_a, aa, input_precision=precision)
            ab = tl.dot(tl.trans(y_a), y_b, ab, input_precision=precision)
            bb = tl.dot(tl.trans(y_b), y_b, bb, input_precision=precision)
        else:
            left = tl.where(block == 2, y_b, y_a)
            right = tl.where(block == 0, y_a, y_b)
            aa = tl.dot(tl.trans(left), right, aa, input_precision=precision)

    count = tl.maximum(own, 1).to(tl.float32)
    means_ptr += program * (2 * HEAD_DIM)
    low = column < HALF
    high = column < HEAD_DIM - HALF
    if block == 0:
        tl.store(means_ptr + column, r_a, mask=low)
        tl.store(means_ptr + HALF + column, r_b, mask=high)
        tl.store(means_ptr + HEAD_DIM + column, tl.sum(sum_a, 0) / count, mask=low)
        tl.store(means_ptr + HEAD_DIM + HALF + column, tl.sum(sum_b, 0) / count, mask=high)
    moments_ptr += (program * 3 + block) * (HALF * HALF)
    at = column[:, None] * HALF + column[None]
    inside = low[:, None] & low[None]
    tl.store(moments_ptr + at, aa, mask=inside)
    if WHOLE:
        tl.store(moments_ptr + HALF * HALF + at, ab, mask=inside)
        tl.store(moments_ptr + 2 * HALF * HALF + at, bb, mask=inside)


@triton.jit
def _load_means(means_ptr, split, splits, dim, ok, origin, HEAD_DIM: tl.constexpr):
    """Of several splits, the mean of y, and that mean plus r - `origin`: `[BLOCK_S, columns]` each; zeros outside."""
    at = means_ptr + split[:, None].to(tl.int64) * (2 * HEAD_DIM) + dim[None]
    mask = (split < splits)[:, None] & ok[None]
    r = tl.load(at, mask=mask, other=0.0)
    d = tl.load(at + HEAD_DIM, mask=mask, other=0.0)
    return d, r - origin[None] + d


@triton.jit
def _moments_combine_kernel(
    means_ptr,  # (batch * NUM_HEADS, splits, 2, HEAD_DIM) fp32
    moments_ptr,  # (batch * NUM_HEADS, splits, 3, HALF, HALF) fp32
    bounds_ptr,  # (batch, 2) or None
    mu_ptr,  # (batch, NUM_HEADS, HEAD_DIM) fp32
    cov_ptr,  # (batch, NUM_HEADS, HEAD_DIM, HEAD_DIM) fp32
    num_tokens,
    splits,
    sink,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of _moments_partial_kernel
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    TILES: tl.constexpr = (HALF + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0).to(tl.int64)
    tile = (program % TILES).to(tl.int32)
    block = ((program // TILES) % 3).to(tl.int32)
    batch_head = program // (3 * TILES)
    batch = batch_head // NUM_HEADS
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)  # within its half, as column
    column = tl.arange(0, BLOCK_D)
    row_dim = tl.where(block == 2, HALF, 0) + row
    column_dim = tl.where(block == 0, 0, HALF) + column
    row_ok = (row < HALF) & (row_dim < HEAD_DIM)
    column_ok = (column < HALF) & (column_dim < HEAD_DIM)
    inside = row_ok[:, None] & column_ok[None]
    means_ptr += batch_head * splits * (2 * HEAD_DIM)
    moments_ptr += (batch_head * splits * 3 + block) * (HALF * HALF) + row[:, None] * HALF + column[None]

    # e_s = m_s - r_0 = (r_s - r_0) + d_s, and e its mean over all tokens.
    origin_row = tl.load(means_ptr + row_dim, mask=row_ok, other=0.0)
    origin_column = tl.load(means_ptr + column_dim, mask=column_ok, other=0.0)
    e_row = tl.zeros([BLOCK_R], tl.float32)
    e_column = tl.zeros([BLOCK_D], tl.float32)
    _, _, total = _share(0, splits, bounds_ptr, batch, num_tokens, sink, BLOCK_N)
    count = tl.maximum(total, 1).to(tl.float32)
    for chunk in range(0, splits, BLOCK_S):
        split = chunk + tl.arange(0, BLOCK_S)
        _, own, _ = _share(split, splits, bounds_ptr, batch, num_tokens, sink, BLOCK_N)
        weight = (own.to(tl.float32) / count)[:, None]
        d, away = _load_means(means_ptr, split, splits, row_dim, row_ok, origin_row, HEAD_DIM)
        e_row += tl.sum(weight * away, 0)
        d, away = _load_means(means_ptr, split, splits, column_dim, column_ok, origin_column, HEAD_DIM)
        e_column += tl.sum(weight * away, 0)

    cov = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for s in tl.range(0, splits, loop_unroll_factor=4):
        cov += tl.load(moments_ptr + s * (3 * HALF * HALF), mask=inside, other=0.0)
    for chunk in range(0, splits, BLOCK_S):
        split = chunk + tl.arange(0, BLOCK_S)
        _, own, _ = _share(split, splits, bounds_ptr, batch, num_tokens, sink, BLOCK_N)
        weight = own.to(tl.float32)[:, None]
        d_row, away_row = _load_means(means_ptr, split, splits, row_dim, row_ok, origin_row, HEAD_DIM)
        d, away = _load_means(means_ptr, split, splits, column_dim, column_ok, origin_column, HEAD_DIM)
        cov = tl.dot(tl.trans(d_row), -weight * d, cov, input_precision="ieee")
        away = weight * (away - e_column[None])
        cov = tl.dot(tl.trans(away_row - e_row[None]), away, cov, input_precision="ieee")
    cov /= count

    cov_ptr += batch_head * HEAD_DIM * HEAD_DIM
    tl.store(cov_ptr + row_dim[:, None] * HEAD_DIM + column_dim[None], cov, mask=inside)
    if block == 1:
        tl.store(cov_ptr + column_dim[None] * HEAD_DIM + row_dim[:, None], cov, mask=inside)
    else:
        mu = tl.where(total > 0, origin_row + e_row, 0.0)
        tl.store(mu_ptr + batch_head * HEAD_DIM + row_dim, mu, mask=row_ok)


def forward(args: QueryMomentsArgs) -> tuple[Tensor, Tensor]:
    """`mu [B, H, D]` and `cov [B, H, D, D]`, both fp32."""
    q, bounds, sink = rows_contiguous(args.q), contiguous(args.bounds), args.sink
    batch, num_heads, num_tokens, head_dim = q.shape
    cos, sin = (None if t is None else rows_contiguous(t).expand(batch, -1, -1) for t in (args.cos, args.sin))
    half = (head_dim + 1) // 2
    block_d = dot_size(half)
    whole = block_d <= 64
    config = _config(q, block_d)
    per_split = batch * num_heads * (1 if whole else 3)
    resident = target_of(q.device).num_sms * max(1, 8 // config.num_warps)
    splits = max(1, min(-(-num_tokens // (_TOKENS_PER_DIM * head_dim)), resident // per_split))
    mu = q.new_empty(batch, num_heads, head_dim, dtype=torch.float32)
    cov = q.new_empty(batch, num_heads, head_dim, head_dim, dtype=torch.float32)
    means = q.new_empty(batch * num_heads, splits, 2, head_dim, dtype=torch.float32)
    moments = q.new_empty(batch * num_heads, splits, 3, half, half, dtype=torch.float32)
    shape = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "HALF": half, "BLOCK_D": block_d}
    launch(
        _moments_partial_kernel,
        (per_split * splits,),
        *(q, cos, sin, bounds, means, moments, num_tokens, splits, sink, *q.stride()[:3]),
        *(*_strides(cos), *_strides(sin)),
        configs=[config],
        WHOLE=whole,
        IEEE=q.dtype == torch.float32,
        **shape,
    )
    block_r = min(16, block_d)
    launch(
        _moments_combine_kernel,
        (batch * num_heads * 3 * -(-half // block_r),),
        *(means, moments, bounds, mu, cov, num_tokens, splits, sink),
        configs=[triton.Config({}, num_warps=4, num_stages=1)],
        BLOCK_N=config.kwargs["BLOCK_N"],
        BLOCK_S=16,
        BLOCK_R=block_r,
        **shape,
    )
    return mu, cov


def _config(q: Tensor, block_d: int) -> triton.Config:
    """One for all shapes: both launches divide the tokens by the tile, and the blocks of the covariance are given.

    Warpgroup products take the tile from shared memory, warp products hold it in registers, which are full of the three
    blocks.
    """
    if q.dtype == torch.float32:
        return triton.Config({"BLOCK_N": 16}, num_warps=8, num_stages=2)
    if block_d >= 64 and target_of(q.device).arch in (90, 100):
        return triton.Config({"BLOCK_N": 32}, num_warps=8, num_stages=4)
    return triton.Config({"BLOCK_N": 16}, num_warps=block_d // 16, num_stages=4)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))
