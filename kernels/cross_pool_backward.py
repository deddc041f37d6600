"""cross_pool_backward: gradients of the hidden states, queries and norm weight of cross_pool.

With the symbols of cross_pool.py, g the gradient of out, a_i = rstd_i x_i and r_i = a_i w, head by head:

    dp_ij = <g_j, r_i>,   ds_ij = p_ij (dp_ij - <g_j, out_j>),
    dq_j = scale * w * sum_i ds_ij a_i,   dr_i = sum_j p_ij g_j + scale * ds_ij q_j,
    dx_i = rstd_i (dr_i w - a_i mean(dr_i r_i)),   dw = sum_i dr_i a_i

One kernel holds tiles of queries and walks over the tokens, for dq and for <g_j, out_j>: three products, 6*T*K*d
operations. One holds tiles of tokens and walks over the queries, for dr w: four products, 8*T*K*d. Forming the logits
in both costs two products in seven and saves adding up one of the gradients through atomics, whose order changes from
run to run. Both form them of the same rounded numbers, x and q w, as the forward kernel did: logits rounded in another
way than the log-sum-exp double the error of dx. The first kernel leaves q w and g w for the second, K*d elements each.
The mean spans the width, so dr w goes to memory in fp32 and a last kernel, bound by memory, makes dx of its rows, and
dw per program: T*d elements of 4 bytes written and read, x read, dx written. Sums across programs are added up at the
end, in a fixed order: the same bits every time.

Where w is 0, dr cannot be had from dr w. There q and g are left as they are and x is zeroed instead, which changes
neither logits nor dp. As in flash attention p and ds are rounded to x's dtype for the products; in fp16 small gradients
want the usual loss scaling.

Reference: condense_core/ops/reference/cross_pool_backward.py. Tests: tests/kernels/test_cross_pool_backward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.common import LOG2E, contiguous
from condense_core.kernels.cross_pool import (
    configurations,
    dimensions,
    ends_of,
    load_head_tile,
    load_norm_weight,
    locate_tile,
    near_rows,
    own_rows,
    query_tile,
    rstd_of,
    splits_of,
    store_head_tile,
    tile_tables,
    too_wide,
)
from condense_core.kernels.launch import launch, target_of
from condense_core.ops.arguments import CrossPoolBackwardArgs


def unsupported(args: CrossPoolBackwardArgs) -> str | None:
    """Why the kernels cannot take these, or None."""
    return too_wide(args.x, args.q)


@triton.jit
def _cross_queries_kernel(
    grad_ptr,  # (num_queries, NUM_HEADS * HEAD_DIM), gradient of out
    x_ptr,  # (num_tokens, NUM_HEADS * HEAD_DIM)
    rstd_ptr,  # (num_tokens,) fp32
    q_ptr,  # (num_queries, NUM_HEADS, HEAD_DIM)
    norm_weight_ptr,  # (NUM_HEADS * HEAD_DIM,) or None
    tiles_ptr,  # (tiles, 4) int64, or None for a single sequence
    out_ptr,  # (num_queries, NUM_HEADS * HEAD_DIM)
    lse_ptr,  # (num_queries, NUM_HEADS) fp32
    delta_ptr,  # (num_queries, NUM_HEADS) fp32, <grad, out>: written for _cross_tokens_kernel
    qw_ptr,  # (num_queries, NUM_HEADS * HEAD_DIM) in x's dtype: likewise, or None if it is q
    gw_ptr,  # (num_queries, NUM_HEADS * HEAD_DIM) in x's dtype: likewise, or None if it is grad
    dq_ptr,  # (splits, num_queries, NUM_HEADS * HEAD_DIM)
    num_tokens,
    num_queries,
    x_stride,
    split_tokens,
    scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_DIM
    query, own, own_ok, split, first, num_inside = query_tile(tiles_ptr, num_queries, num_tokens, split_tokens, BLOCK_M)
    scalar = query * NUM_HEADS + tl.program_id(1) + own * NUM_HEADS  # in a tensor (num_queries, NUM_HEADS)

    w = load_norm_weight(norm_weight_ptr, HEAD_DIM, BLOCK_D, "")
    q = load_head_tile(q_ptr + query * WIDTH, own, own_ok, WIDTH, HEAD_DIM, BLOCK_D).to(tl.float32)
    g = load_head_tile(grad_ptr + query * WIDTH, own, own_ok, WIDTH, HEAD_DIM, BLOCK_D).to(tl.float32)
    out = load_head_tile(out_ptr + query * WIDTH, own, own_ok, WIDTH, HEAD_DIM, BLOCK_D).to(tl.float32)
    delta = tl.sum(g * out, 1)
    if split == 0:
        tl.store(delta_ptr + scalar, delta, mask=own_ok)
        nonzero = tl.where(w == 0.0, 1.0, w)
        if qw_ptr is not None:
            store_head_tile(qw_ptr + query * WIDTH, own, own_ok, WIDTH, q * nonzero, HEAD_DIM, BLOCK_D)
        if gw_ptr is not None:
            store_head_tile(gw_ptr + query * WIDTH, own, own_ok, WIDTH, g * nonzero, HEAD_DIM, BLOCK_D)
    q = (q * w).to(x_ptr.dtype.element_ty)
    g = (g * w).to(x_ptr.dtype.element_ty)
    lse = tl.load(lse_ptr + scalar, mask=own_ok, other=0.0) * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    place = tl.arange(0, BLOCK_N)
    for chunk in range(0, num_inside, BLOCK_N):
        inside = place < num_inside - chunk
        token = first + chunk
        x = load_head_tile(x_ptr + token * x_stride, place, inside, x_stride, HEAD_DIM, BLOCK_D)
        rstd = tl.load(rstd_ptr + token + place, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(x), input_precision="ieee")
        s = tl.where(inside[None], s * (rstd * (scale * LOG2E))[None], float("-inf"))
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(g, tl.trans(x), input_precision="ieee") * rstd[None]
        ds = p * (dp - delta[:, None]) * rstd[None]
        acc = tl.dot(ds.to(x.dtype), x, acc, input_precision="ieee")

    w = load_norm_weight(norm_weight_ptr, HEAD_DIM, BLOCK_D, "evict_first")
    dq_split = dq_ptr + (split * num_queries + query) * WIDTH
    store_head_tile(dq_split, own, own_ok, WIDTH, scale * w * acc, HEAD_DIM, BLOCK_D)


@triton.jit
def _cross_tokens_kernel(
    gw_ptr,  # (num_queries, NUM_HEADS * HEAD_DIM) in x's dtype, gradient of out times the norm weight where it is not 0
    x_ptr,  # (num_tokens, NUM_HEADS * HEAD_DIM)
    rstd_ptr,  # (num_tokens,) fp32
    qw_ptr,  # (num_queries, NUM_HEADS * HEAD_DIM) in x's dtype, likewise
    norm_weight_ptr,  # (NUM_HEADS * HEAD_DIM,) or None
    tiles_ptr,  # (tiles, 4) int64, or None for a single sequence
    lse_ptr,  # (num_queries, NUM_HEADS) fp32
    delta_ptr,  # (num_queries, NUM_HEADS) fp32
    dr_ptr,  # (num_tokens, NUM_HEADS * HEAD_DIM) fp32, gradient of r, times the norm weight where that is not 0
    num_tokens,
    num_queries,
    x_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_DIM
    token, token_end, first, end = locate_tile(tiles_ptr, num_tokens, num_queries, BLOCK_M)
    own = tl.arange(0, BLOCK_M)
    own_ok = own < (token_end - token).to(tl.int32)
    rstd = tl.load(rstd_ptr + token + own, mask=own_ok, other=0.0)
    x = load_head_tile(x_ptr + token * x_stride, own, own_ok, x_stride, HEAD_DIM, BLOCK_D)
    if norm_weight_ptr is not None:
        x = tl.where(load_norm_weight(norm_weight_ptr, HEAD_DIM, BLOCK_D, "") == 0.0, 0.0, x)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    place = tl.arange(0, BLOCK_N)
    num_inside = (end - first).to(tl.int32)
    for chunk in range(0, num_inside, BLOCK_N):
        inside = place < num_inside - chunk
        query = first + chunk
        q = load_head_tile(qw_ptr + query * WIDTH, place, inside, WIDTH, HEAD_DIM, BLOCK_D)
        g = load_head_tile(gw_ptr + query * WIDTH, place, inside, WIDTH, HEAD_DIM, BLOCK_D)
        scalar = query * NUM_HEADS + tl.program_id(1) + place * NUM_HEADS
        lse = tl.load(lse_ptr + scalar, mask=inside, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + scalar, mask=inside, other=0.0)
        s = tl.dot(x, tl.trans(q), input_precision="ieee") * (rstd * (scale * LOG2E))[:, None]
        dp = tl.dot(x, tl.trans(g), input_precision="ieee") * rstd[:, None]
        p = tl.exp2(s - lse[None])
        ds = p * (dp - delta[None]) * scale
        acc = tl.dot(p.to(g.dtype), g, acc, input_precision="ieee")
        acc = tl.dot(ds.to(q.dtype), q, acc, input_precision="ieee")
    store_head_tile(dr_ptr + token * WIDTH, own, own_ok, WIDTH, acc, HEAD_DIM, BLOCK_D)


@triton.jit
def _rms_norm_backward_kernel(
    dr_ptr,  # (num_tokens, WIDTH) fp32, as _cross_tokens_kernel leaves it
    x_ptr,  # (num_tokens, WIDTH)
    rstd_ptr,  # (num_tokens,) fp32
    norm_weight_ptr,  # (WIDTH,) or None
    dx_ptr,  # (num_tokens, WIDTH)
    dw_ptr,  # (programs, WIDTH) fp32, or None
    num_tokens,
    x_stride,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    column_ok = column < WIDTH
    w = tl.full([BLOCK_C], 1.0, tl.float32)
    if norm_weight_ptr is not None:
        w = tl.load(norm_weight_ptr + column, mask=column_ok, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_C], tl.float32)
    for token in range(program, num_tokens, tl.num_programs(0)):
        rstd = tl.load(rstd_ptr + token)
        a = tl.load(x_ptr + token * x_stride + column, mask=column_ok, other=0.0).to(tl.float32) * rstd
        da = tl.load(dr_ptr + token * WIDTH + column, mask=column_ok, other=0.0)
        if norm_weight_ptr is not None:
            dw += da * a
            da = tl.where(w == 0.0, 0.0, da)
        dx = rstd * (da - a * (tl.sum(da * a, 0) / WIDTH))
        tl.store(dx_ptr + token * WIDTH + column, dx.to(dx_ptr.dtype.element_ty), mask=column_ok)
    if dw_ptr is not None:
        tl.store(dw_ptr + program * WIDTH + column, dw / tl.where(w == 0.0, 1.0, w), mask=column_ok)


def backward(args: CrossPoolBackwardArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, q and norm_weight, each as its tensor; an empty one for a norm_weight of None."""
    x, target = near_rows(args.x), target_of(args.x.device)
    grad, q, out, lse = args.grad.contiguous(), args.q.contiguous(), args.out.contiguous(), args.lse.contiguous()
    norm_weight, scale = contiguous(args.norm_weight), args.scale
    num_queries, num_heads, head_dim = q.shape
    tokens, queries = ends_of(args.cu_seqlens, len(x)), ends_of(args.cu_queries, num_queries)
    block_m, block_t = (own_rows(x, head_dim, ends, target) for ends in (queries, tokens))
    (query_table, token_table), (num_query_tiles, num_token_tiles) = tile_tables(
        x.device, (queries, tokens, block_m), (tokens, queries, block_t)
    )
    sizes = dimensions(num_heads, head_dim)
    splits, split_tokens = splits_of(num_query_tiles * num_heads, block_m, head_dim, tokens, target)

    rstd = rstd_of(x, args.eps)
    delta = torch.empty_like(lse)
    qw, gw = (
        None if norm_weight is None and t.dtype == x.dtype else torch.empty_like(t, dtype=x.dtype) for t in (q, grad)
    )
    dq = q.new_empty(splits, *q.shape, dtype=q.dtype if splits == 1 else torch.float32)
    launch(
        _cross_queries_kernel,
        (num_query_tiles, num_heads, splits),
        *(grad, x, rstd, q, norm_weight, query_table, out, lse, delta, qw, gw, dq),
        *(len(x), num_queries, x.stride(0), split_tokens, scale),
        configs=configurations(x, head_dim, block_m, target, own=2, met=1),
        key=("NUM_HEADS", "HEAD_DIM", "BLOCK_M"),
        BLOCK_M=block_m,
        **sizes,
    )
    dr = x.new_empty(x.shape, dtype=torch.float32)
    launch(
        _cross_tokens_kernel,
        (num_token_tiles, num_heads),
        *(grad if gw is None else gw, x, rstd, q if qw is None else qw, norm_weight, token_table, lse, delta, dr),
        *(len(x), num_queries, x.stride(0), scale),
        configs=configurations(x, head_dim, block_t, target, own=1, met=2),
        key=("NUM_HEADS", "HEAD_DIM", "BLOCK_M"),
        BLOCK_M=block_t,
        **sizes,
    )
    dx = torch.empty_like(dr, dtype=x.dtype)
    # Twice as many programs as multiprocessors hide each other's latency; more only enlarge the partial sums.
    programs = min(len(x), 2 * target.num_sms)
    dw = None if norm_weight is None else x.new_empty(programs, x.shape[1], dtype=torch.float32)
    launch(
        _rms_norm_backward_kernel,
        (programs,),
        *(dr, x, rstd, norm_weight, dx, dw, len(x), x.stride(0)),
        configs=[triton.Config({}, num_warps=_row_warps(x.shape[1]))],
        WIDTH=x.shape[1],
        BLOCK_C=triton.next_power_of_2(x.shape[1]),
    )
    return (
        dx,
        dq[0] if splits == 1 else dq.sum(0).to(q.dtype),
        x.new_empty(0) if norm_weight is None or dw is None else dw.sum(0).to(norm_weight.dtype),
    )


def _row_warps(width: int) -> int:
    """16 elements a thread, at most 16 warps."""
    return max(1, min(16, triton.next_power_of_2(width) // 512))
