"""attention_pool_backward: gradients of the hidden states, queries, norm weight and bias of attention_pool.

With the symbols of attention_pool.py, a_ih = rstd_i x_ih, and g the gradient of out, in every window:

    dp_ih = <g_h w_h, a_ih>,   ds_ih = p_ih (dp_ih - <g_h, out_h>),   A_h = sum_i p_ih a_ih,   B_h = sum_i ds_ih a_ih,
    dq_h = scale * w_h B_h,   dw_h = sum over windows of g_h A_h + scale * q_h B_h,   dbias_ih = ds_ih,
    da_i = sum over windows of p_i g w + ds_i scale q w,   dx_i = rstd_i (da_i - a_i mean(da_i a_i))

where mean(da_i a_i) needs no second pass over the width: it is sum_h (p_ih dp_ih + ds_ih s_ih) / d.

Reads x, out and the gradient once and writes dx: 2*T*d + 2*K*d elements, bound by memory. The kernels work as the
forward one does, window by window with all of the width in registers; attention_pool.py says why. Without a halo a
token belongs to one window, and one pass over x gives everything. With a halo, a second kernel gathers for each token
the windows that see it. Sums over windows (dw, dbias, dq of static queries) are kept per program, in its registers or
its own slice of a buffer, and added up at the end in a fixed order: the same bits every time.

Reference: condense_core/ops/reference/attention_pool_backward.py. Tests: tests/kernels/test_attention_pool_backward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.attention_pool import (
    CHUNK,
    chunk_of,
    columns_of,
    configurations,
    constexprs,
    load_bias,
    load_chunk,
    locate_row,
    packing,
    row_size,
    too_wide,
)
from condense_core.kernels.common import LOG2E, contiguous, rows_contiguous
from condense_core.kernels.launch import TRITON_VERSION, launch, target_of
from condense_core.ops.arguments import AttentionPoolBackwardArgs

# Triton 3.6 lays a whole window out over the threads in two ways and spills hundreds of registers: there windows go
# chunk by chunk.
_WHOLE_WINDOWS = TRITON_VERSION >= (3, 7)


def unsupported(args: AttentionPoolBackwardArgs) -> str | None:
    """Why the kernels cannot take these, or None."""
    return too_wide(args.q)


@triton.jit
def _load_row(
    grad_ptr, q_ptr, norm_weight_ptr, out_ptr, lse_ptr, column, column_ok, head, scale, NUM_HEADS: tl.constexpr
):
    """Of a row: g_h w_h and scale * q_h w_h, `[BLOCK_H, BLOCK_D]`, <g_h, out_h> and log2-sum-exp, `[BLOCK_H]`."""
    gw = tl.load(grad_ptr + column, mask=column_ok, other=0.0).to(tl.float32)
    qw = tl.load(q_ptr + column, mask=column_ok, other=0.0).to(tl.float32) * scale
    delta = tl.sum(gw * tl.load(out_ptr + column, mask=column_ok, other=0.0).to(tl.float32), 1)
    lse = tl.load(lse_ptr + head, mask=head < NUM_HEADS, other=0.0) * LOG2E
    if norm_weight_ptr is not None:
        w = tl.load(norm_weight_ptr + column, mask=column_ok, other=0.0).to(tl.float32)
        gw *= w
        qw *= w
    return gw, qw, delta, lse


@triton.jit
def _chunk_gradients(
    x_ptr,  # (num_tokens, NUM_HEADS * HEAD_DIM)
    bias_ptr,  # (NUM_HEADS, width) or None
    dx_ptr,  # (num_tokens, NUM_HEADS * HEAD_DIM) or None
    dbias_ptr,  # (programs, width, NUM_HEADS) fp32, or None
    x_stride,
    window,
    chunk,
    low,
    high,
    width,
    program,
    gw,  # (BLOCK_H, BLOCK_D)
    qw,  # (BLOCK_H, BLOCK_D)
    delta,  # (BLOCK_H,)
    lse,  # (BLOCK_H,), base 2
    column,
    column_ok,
    head,
    eps,
    NUM_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A_h and B_h of one chunk of a window, `[BLOCK_H, BLOCK_D]`; writes dx and adds to dbias where they are wanted."""
    place = chunk + tl.arange(0, BLOCK_W)
    inside = (place >= low) & (place < high)
    x, rstd = load_chunk(x_ptr, x_stride, window + place, inside, column, column_ok, eps, WIDTH)
    s = tl.sum(x * qw[None], 2) * rstd[:, None]  # (BLOCK_W, BLOCK_H)
    p = tl.exp2(s * LOG2E + load_bias(bias_ptr, place, inside, head, width, NUM_HEADS) - lse[None])
    dp = tl.sum(x * gw[None], 2) * rstd[:, None]
    ds = tl.where(inside[:, None], p * (dp - delta[None]), 0.0)
    if dbias_ptr is not None:
        own = (program * width + place)[:, None] * NUM_HEADS + head[None]
        mask = inside[:, None] & (head < NUM_HEADS)[None]
        # Into this program's own slice: no other adds to it, and a place falls to the same thread in every window,
        # since chunks of all windows start at the same places. So the order is fixed; a load, an addition and a store
        # would need a barrier, which would keep the next chunk from being fetched.
        tl.atomic_add(dbias_ptr + own, ds, mask=mask, sem="relaxed")
    if dx_ptr is not None:
        mean = tl.sum(p * dp + ds * s, 1) / WIDTH  # (BLOCK_W,)
        da = p[:, :, None] * gw[None] + ds[:, :, None] * qw[None]
        dx = rstd[:, None, None] * (da - x * (rstd * mean)[:, None, None])
        pointers = dx_ptr + ((window + place) * WIDTH)[:, None, None] + column[None]
        tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None, None] & column_ok[None])
    a = tl.sum((p * rstd[:, None])[:, :, None] * x, 0)
    b = tl.sum((ds * rstd[:, None])[:, :, None] * x, 0)
    return a, b


@triton.jit
def _backward_kernel(
    grad_ptr,  # (num_rows, NUM_HEADS * HEAD_DIM), gradient of out
    x_ptr,  # (num_tokens, NUM_HEADS * HEAD_DIM)
    q_ptr,  # (NUM_HEADS, HEAD_DIM) or (num_rows, NUM_HEADS, HEAD_DIM)
    norm_weight_ptr,  # (NUM_HEADS * HEAD_DIM,) or None
    bias_ptr,  # (NUM_HEADS, ratio + 2 * halo) or None
    cu_seqlens_ptr,  # (num_sequences + 1,) int64, or None where all sequences are as long
    row_offsets_ptr,  # (num_sequences + 1,) int64, or None
    out_ptr,  # (num_rows, NUM_HEADS * HEAD_DIM)
    lse_ptr,  # (num_rows, NUM_HEADS) fp32, natural logarithm
    dx_ptr,  # (num_tokens, NUM_HEADS * HEAD_DIM), or None: with a halo, _tokens_kernel writes it
    dq_ptr,  # (num_rows or programs, NUM_HEADS * HEAD_DIM) fp32, not yet multiplied with the norm weight
    dw_ptr,  # (programs, NUM_HEADS * HEAD_DIM) fp32, or None
    dbias_ptr,  # (programs, ratio + 2 * halo, NUM_HEADS) fp32, zeroed, or None
    sequence_tokens,
    num_sequences,
    num_rows,
    x_stride,
    grad_stride,
    ratio,
    halo,
    scale,
    eps,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PER_WINDOW: tl.constexpr,
    SINGLE: tl.constexpr,
    ROW_STAGES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_DIM
    program = tl.program_id(0).to(tl.int64)
    # Written out: with columns_of here the compiler orders these in another way, and spills on sm_90 (Triton 3.9).
    head = tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_D)
    column = head[:, None] * HEAD_DIM + dim[None]
    column_ok = (head < NUM_HEADS)[:, None] & (dim < HEAD_DIM)[None]
    width = ratio + 2 * halo
    dw = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)  # sum of g_h A_h, and of scale * q_h B_h where q differs per window
    b_total = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)  # sum of B_h where q is the same for all windows

    # The next window, or the next chunks of one, are fetched into shared memory while this one is worked on.
    for row in tl.range(program, num_rows, tl.num_programs(0), num_stages=ROW_STAGES):
        first, end, j = locate_row(row, cu_seqlens_ptr, row_offsets_ptr, sequence_tokens, num_sequences, ratio, BLOCK_S)
        window = first + j * ratio - halo
        low = tl.maximum(window, first) - window
        high = tl.minimum(window + width, end) - window
        gw, qw, delta, lse = _load_row(
            *(grad_ptr + row * grad_stride, q_ptr + row * WIDTH if PER_WINDOW else q_ptr, norm_weight_ptr),
            *(out_ptr + row * WIDTH, lse_ptr + row * NUM_HEADS, column, column_ok, head, scale, NUM_HEADS),
        )
        if SINGLE:
            a, b = _chunk_gradients(
                *(x_ptr, bias_ptr, dx_ptr, dbias_ptr, x_stride, window, 0, low, high, width, program),
                *(gw, qw, delta, lse, column, column_ok, head, eps, NUM_HEADS, WIDTH, BLOCK_W),
            )
        else:
            a = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
            b = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
            for chunk in tl.range((low // BLOCK_W) * BLOCK_W, high, BLOCK_W, num_stages=4):
                a_chunk, b_chunk = _chunk_gradients(
                    *(x_ptr, bias_ptr, dx_ptr, dbias_ptr, x_stride, window, chunk, low, high, width, program),
                    *(gw, qw, delta, lse, column, column_ok, head, eps, NUM_HEADS, WIDTH, BLOCK_W),
                )
                a += a_chunk
                b += b_chunk

        # g and q without the norm weight: from the cache again, rather than in registers all along.
        g = tl.load(grad_ptr + row * grad_stride + column, mask=column_ok, other=0.0, eviction_policy="evict_first")
        dw += g.to(tl.float32) * a
        if PER_WINDOW:
            q = tl.load(q_ptr + row * WIDTH + column, mask=column_ok, other=0.0, eviction_policy="evict_first")
            dw += scale * q.to(tl.float32) * b
            tl.store(dq_ptr + row * WIDTH + column, scale * b, mask=column_ok)
        else:
            b_total += b

    if not PER_WINDOW:
        q = tl.load(q_ptr + column, mask=column_ok, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dw += scale * q * b_total
        tl.store(dq_ptr + program * WIDTH + column, scale * b_total, mask=column_ok)
    if dw_ptr is not None:
        tl.store(dw_ptr + program * WIDTH + column, dw, mask=column_ok)


@triton.jit
def _tokens_kernel(
    grad_ptr,  # (num_rows, NUM_HEADS * HEAD_DIM), gradient of out
    x_ptr,  # (num_tokens, NUM_HEADS * HEAD_DIM)
    q_ptr,  # (NUM_HEADS, HEAD_DIM) or (num_rows, NUM_HEADS, HEAD_DIM)
    norm_weight_ptr,  # (NUM_HEADS * HEAD_DIM,) or None
    bias_ptr,  # (NUM_HEADS, ratio + 2 * halo) or None
    cu_seqlens_ptr,  # (num_sequences + 1,) int64, or None where all sequences are as long
    row_offsets_ptr,  # (num_sequences + 1,) int64, or None
    out_ptr,  # (num_rows, NUM_HEADS * HEAD_DIM)
    lse_ptr,  # (num_rows, NUM_HEADS) fp32, natural logarithm
    dx_ptr,  # (num_tokens, NUM_HEADS * HEAD_DIM)
    sequence_tokens,
    num_sequences,
    x_stride,
    grad_stride,
    ratio,
    halo,
    scale,
    eps,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PER_WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx with a halo: one program per window, for the `ratio` tokens that no other window counts as its own."""
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_DIM
    row = tl.program_id(0).to(tl.int64)
    first, end, j = locate_row(row, cu_seqlens_ptr, row_offsets_ptr, sequence_tokens, num_sequences, ratio, BLOCK_S)
    num_windows = (end - first + ratio - 1) // ratio
    reach = (halo + ratio - 1) // ratio  # windows on either side that see one of these tokens

    head, column, column_ok = columns_of(NUM_HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)

    stop = tl.minimum(first + (j + 1) * ratio, end)
    for start in range(first + j * ratio, stop, BLOCK_W):
        token = start + tl.arange(0, BLOCK_W)
        own = token < stop
        x, rstd = load_chunk(x_ptr, x_stride, token, own, column, column_ok, eps, WIDTH)
        da = tl.zeros([BLOCK_W, BLOCK_H, BLOCK_D], tl.float32)
        mean = tl.zeros([BLOCK_W], tl.float32)
        for other in range(tl.maximum(j - reach, 0), tl.minimum(j + reach + 1, num_windows)):
            other_row = row - j + other
            place = token - (first + other * ratio - halo)
            inside = own & (place >= 0) & (place < ratio + 2 * halo)
            gw, qw, delta, lse = _load_row(
                *(grad_ptr + other_row * grad_stride, q_ptr + other_row * WIDTH if PER_WINDOW else q_ptr),
                *(norm_weight_ptr, out_ptr + other_row * WIDTH, lse_ptr + other_row * NUM_HEADS),
                *(column, column_ok, head, scale, NUM_HEADS),
            )
            s = tl.sum(x * qw[None], 2) * rstd[:, None]
            bias = load_bias(bias_ptr, place, inside, head, ratio + 2 * halo, NUM_HEADS)
            # Another window's NaN must not reach tokens that it does not see.
            p = tl.where(inside[:, None], tl.exp2(s * LOG2E + bias - lse[None]), 0.0)
            dp = tl.sum(x * gw[None], 2) * rstd[:, None]
            ds = tl.where(inside[:, None], p * (dp - delta[None]), 0.0)
            mean += tl.sum(tl.where(inside[:, None], p * dp + ds * s, 0.0), 1)
            da += tl.where(inside[:, None, None], p[:, :, None] * gw[None] + ds[:, :, None] * qw[None], 0.0)
        dx = rstd[:, None, None] * (da - x * (rstd * mean / WIDTH)[:, None, None])
        pointers = dx_ptr + (token * WIDTH)[:, None, None] + column[None]
        tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=own[:, None, None] & column_ok[None])


def backward(args: AttentionPoolBackwardArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, q, norm_weight and window_bias, each as its tensor; an empty one for what is None."""
    x, grad, q = rows_contiguous(args.x), rows_contiguous(args.grad), args.q.contiguous()
    norm_weight, window_bias = contiguous(args.norm_weight), contiguous(args.window_bias)
    ratio, halo = args.ratio, args.halo
    num_heads, head_dim = q.shape[-2:]
    width = ratio + 2 * halo
    block_w, single = chunk_of(num_heads, head_dim, width)
    row = row_size(num_heads, head_dim)
    small = max(1, CHUNK // 4 // row)  # a window's running sums, two rows, leave registers for no more
    if not (single and _WHOLE_WINDOWS):
        block_w, single = min(block_w, small), False
    table, num_rows, shape = packing(x, args.cu_seqlens, ratio)
    per_window = q.dim() == 3
    # As many programs as are resident at once: more would only enlarge the partial sums.
    programs = min(num_rows, target_of(x.device).num_sms * max(1, CHUNK // (block_w * row)))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dq = x.new_empty(num_rows if per_window else programs, num_heads, head_dim, dtype=torch.float32)
    dw = None if norm_weight is None else x.new_empty(programs, num_heads * head_dim, dtype=torch.float32)
    dbias = None if window_bias is None else x.new_zeros(programs, width, num_heads, dtype=torch.float32)
    inputs = (grad, x, q, norm_weight, window_bias, *table, args.out, args.lse)
    launch(
        _backward_kernel,
        (programs,),
        *(*inputs, dx if halo == 0 else None, dq, dw, dbias),
        *(shape["N"], shape["S"], num_rows, x.stride(0), grad.stride(0), ratio, halo, args.scale, args.eps),
        configs=configurations(num_heads, head_dim, block_w, per_thread=64 if single else 16),
        key=("NUM_HEADS", "HEAD_DIM", "PER_WINDOW"),
        SINGLE=single,
        ROW_STAGES=2 if single else 1,
        **constexprs(q, shape["BLOCK_S"]),
    )
    if halo > 0:
        block_w = min(triton.next_power_of_2(ratio), small)
        launch(
            _tokens_kernel,
            (num_rows,),
            *(*inputs, dx, shape["N"], shape["S"], x.stride(0), grad.stride(0), ratio, halo, args.scale, args.eps),
            configs=configurations(num_heads, head_dim, block_w, per_thread=16),
            key=("NUM_HEADS", "HEAD_DIM", "PER_WINDOW"),
            **constexprs(q, shape["BLOCK_S"]),
        )
    dq = dq if per_window else dq.sum(0)
    if norm_weight is not None:
        dq *= norm_weight.view(num_heads, head_dim)
    return (
        dx,
        dq.to(q.dtype),
        x.new_empty(0) if norm_weight is None or dw is None else dw.sum(0).to(norm_weight.dtype),
        x.new_empty(0) if window_bias is None or dbias is None else dbias.sum(0).t().to(window_bias.dtype),
    )
