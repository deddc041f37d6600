"""value_projection_norm (CriticalKV): the L1 norm of every cached value after the output projection.

    score_i = mean over the query heads h of a group of ||W_h v_i||_1,   W_h = w_o[:, h*D : (h+1)*D];   -inf for padding

A matrix product whose epilogue adds up absolute values: 2*B*H*N*D*d_model operations (68.7 GFLOP at 2,048 tokens of
Mistral-7B), for which v and w_o are read (4.2 and 33.6 MB) and B*G*N scores written, 4 bytes each: bound by the matrix
units. Nothing of size d_model per token is written.

A program keeps BLOCK_N values of one head on chip and walks over tiles of BLOCK_J rows of w_o, of one query head of the
group after another, as one loop, so that tiles arrive by asynchronous copies while earlier ones are multiplied. Every
tile of w_o is read from L2 for 2*BLOCK_N operations per element, or BLOCK_N operations per byte in 16 bits: 256 tokens
need 3 TB/s of L2 at 790 TFLOP/s, where 64 would need 12. The products of a tile are added up in registers at once,
eight columns side by side as the matrix units leave them; lanes are added together only at the end. While one program
adds, another on the same multiprocessor multiplies: tiles are sized so that two programs fit in registers, and in
shared memory where there is more than 100 KB of it. BLOCK_J is 64 for that. A warpgroup product of 64 rows reads 4 KB
of operands from shared memory in the 32 cycles it takes, all that shared memory delivers; 128 rows would read less, but
their accumulators leave room for one program only.

Where the token tiles do not fill the GPU, the walk is divided into parts, each with its own sums, `[parts, B, G, N]` in
fp32, which a second launch adds in order. Without atomics the result has the same bits every time.

Reference: condense_core/ops/reference/value_projection_norm.py. Tests: tests/kernels/test_value_projection_norm.py.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.common import contiguous, dot_size, load_bounds, locate_head, rows_contiguous
from condense_core.kernels.launch import Target, launch, target_of
from condense_core.ops.arguments import ValueProjectionNormArgs

# Tokens of a program that adds parts: one warp, 16 bytes per thread.
_ADD_BLOCK = 128


@dataclass(frozen=True)
class _Tiling:
    """Sizes of a program's tiles, in tokens, rows of w_o and channels, and how many programs a multiprocessor holds."""

    block_n: int
    block_j: int
    block_k: int
    num_warps: int
    num_stages: int
    per_sm: int


def unsupported(args: ValueProjectionNormArgs) -> str | None:
    """Why the kernels cannot take these, or None."""
    return None


@triton.jit
def _advance(j_tile, column, j_tiles, HEAD_DIM: tl.constexpr):
    """The next tile of w_o: the rows below, or the first of the next head. Cheaper than dividing the step's number."""
    wrap = j_tile + 1 == j_tiles
    return tl.where(wrap, 0, j_tile + 1), tl.where(wrap, column + HEAD_DIM, column)


@triton.jit
def _projection_kernel(
    v_ptr,  # (batch, num_kv_heads, num_tokens, HEAD_DIM)
    w_ptr,  # (d_model, num_kv_heads * GROUP * HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    out_ptr,  # (parts, batch, num_kv_heads, num_tokens) fp32
    num_tokens,
    num_kv_heads,
    batch_heads,  # batch * num_kv_heads
    d_model,
    parts,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    w_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FINAL: tl.constexpr,  # one part: write scores instead of sums
    PRECISION: tl.constexpr,
):
    # Programs that read the same rows of w_o follow one another, so that these stay in L2.
    tiles = tl.cdiv(num_tokens, BLOCK_N)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    part = (tl.program_id(0) // tiles) % parts
    batch_head = (tl.program_id(0) // (tiles * parts)).to(tl.int64)
    batch, kv_head, start, stop = locate_head(batch_head, num_kv_heads, bounds_ptr, num_tokens)
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real = (token >= start) & (token < stop)
    v_rows = (v_ptr + batch * v_stride_b + kv_head * v_stride_h + token * v_stride_n)[:, None]

    j_tiles = tl.cdiv(d_model, BLOCK_J)
    steps = tl.cdiv(GROUP * j_tiles, parts)
    first = part * steps
    last = tl.minimum(first + steps, GROUP * j_tiles)
    j_tile = first % j_tiles
    column = (kv_head * GROUP + first // j_tiles) * HEAD_DIM
    row = tl.arange(0, BLOCK_J)
    dim = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_N, 8], tl.float32)
    if BLOCK_K >= HEAD_DIM:
        v = tl.load(v_rows + dim[None], mask=real[:, None] & (dim < HEAD_DIM)[None], other=0.0)
        for _ in range(first, last):
            j = j_tile * BLOCK_J + row
            w_rows = w_ptr + column + j.to(tl.int64) * w_stride
            w = tl.load(w_rows[:, None] + dim[None], mask=(j < d_model)[:, None] & (dim < HEAD_DIM)[None], other=0.0)
            projected = tl.dot(v, tl.trans(w), input_precision=PRECISION)
            sums += tl.sum(tl.reshape(tl.abs(projected), [BLOCK_N, BLOCK_J // 8, 8]), 1)
            j_tile, column = _advance(j_tile, column, j_tiles, HEAD_DIM)
    else:
        for _ in range(first, last):
            j = j_tile * BLOCK_J + row
            w_rows = w_ptr + column + j.to(tl.int64) * w_stride
            projected = tl.zeros([BLOCK_N, BLOCK_J], tl.float32)
            for k in range(0, HEAD_DIM, BLOCK_K):
                dim_ok = (k + dim < HEAD_DIM)[None]
                v = tl.load(v_rows + (k + dim)[None], mask=real[:, None] & dim_ok, other=0.0)
                w = tl.load(w_rows[:, None] + (k + dim)[None], mask=(j < d_model)[:, None] & dim_ok, other=0.0)
                projected = tl.dot(v, tl.trans(w), projected, input_precision=PRECISION)
            sums += tl.sum(tl.reshape(tl.abs(projected), [BLOCK_N, BLOCK_J // 8, 8]), 1)
            j_tile, column = _advance(j_tile, column, j_tiles, HEAD_DIM)

    total = tl.sum(sums, 1)
    if FINAL:
        total = tl.where(real, total / GROUP, float("-inf"))
    tl.store(out_ptr + (part * batch_heads + batch_head) * num_tokens + token, total, mask=token < num_tokens)


@triton.jit
def _add_parts_kernel(
    sums_ptr,  # (parts, batch, num_kv_heads, num_tokens) fp32
    bounds_ptr,  # (batch, 2) or None
    scores_ptr,  # (batch, num_kv_heads, num_tokens) fp32
    num_tokens,
    num_kv_heads,
    batch_heads,  # batch * num_kv_heads
    parts,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(num_tokens, BLOCK_N)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    start, stop = load_bounds(bounds_ptr, batch_head // num_kv_heads, num_tokens)
    token = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for part in range(parts):
        sums = sums_ptr + (part * batch_heads + batch_head) * num_tokens
        total += tl.load(sums + token, mask=token < num_tokens, other=0.0)
    total = tl.where((token >= start) & (token < stop), total / GROUP, float("-inf"))
    tl.store(scores_ptr + batch_head * num_tokens + token, total, mask=token < num_tokens)


def forward(args: ValueProjectionNormArgs) -> Tensor:
    """Scores `[B, G, N]` fp32."""
    v, w_o, bounds = rows_contiguous(args.v), rows_contiguous(args.w_o), contiguous(args.bounds)
    batch, num_kv_heads, num_tokens, head_dim = v.shape
    batch_heads = batch * num_kv_heads
    d_model, group = w_o.shape[0], w_o.shape[1] // (num_kv_heads * head_dim)
    target = target_of(v.device)
    tiling = _tiling(target, v.dtype, head_dim, num_tokens)
    programs = batch_heads * triton.cdiv(num_tokens, tiling.block_n)
    parts = _parts(programs, tiling.per_sm * target.num_sms, group * triton.cdiv(d_model, tiling.block_j))
    scores = v.new_empty(batch, num_kv_heads, num_tokens, dtype=torch.float32)
    sums = scores if parts == 1 else v.new_empty(parts, *scores.shape, dtype=torch.float32)
    launch(
        _projection_kernel,
        (programs * parts,),
        *(v, w_o, bounds, sums, num_tokens, num_kv_heads, batch_heads, d_model, parts),
        *(*v.stride()[:3], w_o.stride(0)),
        configs=[triton.Config({}, num_warps=tiling.num_warps, num_stages=tiling.num_stages)],
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_N=tiling.block_n,
        BLOCK_J=tiling.block_j,
        BLOCK_K=tiling.block_k,
        FINAL=parts == 1,
        PRECISION="ieee" if v.dtype == torch.float32 else "tf32",
    )
    if parts > 1:
        launch(
            _add_parts_kernel,
            (batch_heads * triton.cdiv(num_tokens, _ADD_BLOCK),),
            *(sums, bounds, scores, num_tokens, num_kv_heads, batch_heads, parts),
            configs=[triton.Config({}, num_warps=1, num_stages=1)],
            GROUP=group,
            BLOCK_N=_ADD_BLOCK,
        )
    return scores


def _tiling(target: Target, dtype: torch.dtype, head_dim: int, num_tokens: int) -> _Tiling:
    """Tiles for a target, of no more tokens than there are."""
    few = dot_size(num_tokens)
    if dtype == torch.float32:
        # No matrix unit multiplies fp32 exactly: 16 channels at a time keep the operands of the products in registers.
        return _Tiling(min(64, few), 64, 16, num_warps=4, num_stages=2, per_sm=2)
    block_k = dot_size(head_dim)
    if block_k > 256:
        # Values of one tile alone would fill the shared memory: channels go in tiles too.
        block_n = min(128, few)
        return _Tiling(block_n, 64, 64, num_warps=8 if block_n == 128 else 4, num_stages=3, per_sm=1)
    # Warpgroup and tensor memory products read v from shared memory. Others take it through registers, which hold half
    # of it.
    block_n = min(256 if target.arch in (90, 100) else 128, few)
    if block_k == 256:
        block_n = min(block_n, 128 if target.arch in (90, 100) else 64)
    shared_memory = 2 * (block_n + 3 * 64) * block_k
    return _Tiling(
        *(block_n, 64, block_k),
        num_warps=8 if block_n >= 128 else 4,
        num_stages=3,
        per_sm=2 if 2 * shared_memory <= target.shared_memory else 1,
    )


def _parts(programs: int, slots: int, steps: int) -> int:
    """Parts of a walk of `steps` with which rounds of `slots` programs, one after another, take the least time.

    A program starts with its values and empty pipelines, which takes about as long as two steps.
    """
    most = max(1, min(steps, max(slots // max(programs, 1), 16)))
    time = {parts: math.ceil(programs * parts / slots) * (math.ceil(steps / parts) + 2) for parts in range(1, most + 1)}
    return min(time, key=lambda parts: (time[parts], parts))
