"""attention_pool, forward: every window of `ratio` tokens, and `halo` more on either side, becomes one row.

With head h owning the columns x_ih of a row of x, w the norm weight and b the window bias:

    rstd_i = 1 / sqrt(mean(x_i^2) + eps),   s_ih = scale * <q_h w_h, x_ih> * rstd_i + b_ih,
    p_ih = softmax over the window of s_ih,   out_h = w_h * sum_i p_ih rstd_i x_ih

Reads x once, T*d elements, and writes K*d, plus a log-sum-exp per row and head for the backward pass. A handful of
operations per element: bound by memory. The mean square spans the width, and whoever splits the width must read x
twice; so one program takes one window with all of its width. A chunk of BLOCK_W tokens, `[BLOCK_W, num_heads,
head_dim]`, stays in registers as it came: as written above, the norm is folded into the row vectors around it. Windows
wider than a chunk go chunk by chunk with a running maximum, as in flash attention.

Reference: condense_core/ops/reference/attention_pool.py. Tests: tests/kernels/test_attention_pool.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.common import LOG2E, contiguous, rows_contiguous, upload
from condense_core.kernels.launch import launch
from condense_core.ops.arguments import AttentionPoolArgs

# Elements of a chunk of x: 64 per thread with 256 threads, which leaves room for a few row vectors in registers.
CHUNK = 16_384
_FAR = tl.constexpr(9223372036854775807)


def unsupported(args: AttentionPoolArgs) -> str | None:
    """Why the kernels cannot take these, or None."""
    return too_wide(args.q)


def too_wide(q: Tensor) -> str | None:
    """Why no chunk takes rows of as many heads as the queries have, or None."""
    size = row_size(*q.shape[-2:])
    if size > CHUNK:
        return f"{q.shape[-2]} heads of {q.shape[-1]} make a row of {size} elements, more than the {CHUNK} of a chunk"
    return None


@triton.jit
def columns_of(NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Heads `[BLOCK_H]`; columns of a row by head, `[BLOCK_H, BLOCK_D]`; and which of these exist."""
    head = tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_D)
    return head, head[:, None] * HEAD_DIM + dim[None], (head < NUM_HEADS)[:, None] & (dim < HEAD_DIM)[None]


@triton.jit
def locate_row(row, cu_seqlens_ptr, row_offsets_ptr, sequence_tokens, num_sequences, ratio, BLOCK_S: tl.constexpr):
    """The sequence that output row `row` belongs to: its first token, its end, and the row's number in it."""
    if cu_seqlens_ptr is None:
        rows = (sequence_tokens + ratio - 1) // ratio
        # 32 bits: a division of 64 takes registers that the backward pass lacks. In the interpreter row may be an int.
        sequence = (row + tl.zeros([], tl.int64)).to(tl.int32) // rows
        first = sequence.to(tl.int64) * sequence_tokens
        return first, first + sequence_tokens, row - sequence.to(tl.int64) * rows
    else:
        s = tl.arange(0, BLOCK_S)
        row_ends = tl.load(row_offsets_ptr + 1 + s, mask=s < num_sequences, other=_FAR)
        sequence = tl.sum((row_ends <= row).to(tl.int32))
        first = tl.load(cu_seqlens_ptr + sequence)
        end = tl.load(cu_seqlens_ptr + sequence + 1)
        return first, end, row - tl.load(row_offsets_ptr + sequence)


@triton.jit
def load_chunk(x_ptr, x_stride, token, inside, column, column_ok, eps, WIDTH: tl.constexpr):
    """A chunk of tokens in fp32, `[BLOCK_W, BLOCK_H, BLOCK_D]`, and 1 / rms of each, `[BLOCK_W]`."""
    pointers = x_ptr + (token * x_stride)[:, None, None] + column[None]
    x = tl.load(pointers, mask=inside[:, None, None] & column_ok[None], other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(tl.sum(x * x, 2), 1) / WIDTH + eps)
    return x, rstd


@triton.jit
def load_bias(bias_ptr, place, inside, head, width, NUM_HEADS: tl.constexpr):
    """`[BLOCK_W, BLOCK_H]` of window_bias in base 2, -inf outside the window."""
    outside = tl.where(inside, 0.0, float("-inf"))[:, None] + tl.zeros([1, head.shape[0]], tl.float32)
    if bias_ptr is not None:
        mask = inside[:, None] & (head < NUM_HEADS)[None]
        bias = tl.load(bias_ptr + head[None] * width + place[:, None], mask=mask, other=0.0)
        outside += bias.to(tl.float32) * LOG2E
    return outside


@triton.jit
def _forward_kernel(
    x_ptr,  # (num_tokens, NUM_HEADS * HEAD_DIM)
    q_ptr,  # (NUM_HEADS, HEAD_DIM) or (num_rows, NUM_HEADS, HEAD_DIM)
    norm_weight_ptr,  # (NUM_HEADS * HEAD_DIM,) or None
    bias_ptr,  # (NUM_HEADS, ratio + 2 * halo) or None
    cu_seqlens_ptr,  # (num_sequences + 1,) int64, or None where all sequences are as long
    row_offsets_ptr,  # (num_sequences + 1,) int64, or None
    out_ptr,  # (num_rows, NUM_HEADS * HEAD_DIM)
    lse_ptr,  # (num_rows, NUM_HEADS) fp32, natural logarithm
    sequence_tokens,  # of each sequence, where cu_seqlens is None
    num_sequences,
    x_stride,
    ratio,
    halo,
    scale,
    eps,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PER_WINDOW: tl.constexpr,  # queries differ between windows
    SINGLE: tl.constexpr,  # a window fits in one chunk
    BLOCK_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_DIM
    row = tl.program_id(0).to(tl.int64)
    first, end, j = locate_row(row, cu_seqlens_ptr, row_offsets_ptr, sequence_tokens, num_sequences, ratio, BLOCK_S)
    window = first + j * ratio - halo  # token of place 0; outside the sequence where the halo is
    low = tl.maximum(window, first) - window
    high = tl.minimum(window + ratio + 2 * halo, end) - window
    head, column, column_ok = columns_of(NUM_HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)
    q_row = q_ptr + row * WIDTH if PER_WINDOW else q_ptr
    q = tl.load(q_row + column, mask=column_ok, other=0.0).to(tl.float32) * (scale * LOG2E)
    if norm_weight_ptr is not None:
        q *= tl.load(norm_weight_ptr + column, mask=column_ok, other=0.0).to(tl.float32)

    if SINGLE:
        place = tl.arange(0, BLOCK_W)
        inside = (place >= low) & (place < high)
        x, rstd = load_chunk(x_ptr, x_stride, window + place, inside, column, column_ok, eps, WIDTH)
        s = tl.sum(x * q[None], 2) * rstd[:, None]  # (BLOCK_W, BLOCK_H)
        s += load_bias(bias_ptr, place, inside, head, ratio + 2 * halo, NUM_HEADS)
        m = tl.max(s, 0)
        p = tl.exp2(s - m[None])
        sumexp = tl.sum(p, 0)
        acc = tl.sum((p / sumexp[None] * rstd[:, None])[:, :, None] * x, 0)
    else:
        m = tl.full([BLOCK_H], float("-inf"), tl.float32)
        sumexp = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        # Chunks count from place 0, and only those that meet the sequence are visited.
        for chunk in tl.range((low // BLOCK_W) * BLOCK_W, high, BLOCK_W, num_stages=3):
            place = chunk + tl.arange(0, BLOCK_W)
            inside = (place >= low) & (place < high)
            x, rstd = load_chunk(x_ptr, x_stride, window + place, inside, column, column_ok, eps, WIDTH)
            s = tl.sum(x * q[None], 2) * rstd[:, None]
            s += load_bias(bias_ptr, place, inside, head, ratio + 2 * halo, NUM_HEADS)
            m_new = tl.maximum(m, tl.max(s, 0))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a bias may be -inf for a whole chunk
            alpha = tl.exp2(m - m_safe)
            p = tl.exp2(s - m_safe[None])
            sumexp = sumexp * alpha + tl.sum(p, 0)
            acc = acc * alpha[:, None] + tl.sum((p * rstd[:, None])[:, :, None] * x, 0)
            m = m_new
        acc *= (1.0 / sumexp)[:, None]

    if norm_weight_ptr is not None:
        # Loaded again, under another cache policy, so that the compiler does not hold it in registers all along.
        w = tl.load(norm_weight_ptr + column, mask=column_ok, other=0.0, eviction_policy="evict_last")
        acc *= w.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column, acc.to(out_ptr.dtype.element_ty), mask=column_ok)
    tl.store(lse_ptr + row * NUM_HEADS + head, (m + tl.log2(sumexp)) / LOG2E, mask=head < NUM_HEADS)


def forward(args: AttentionPoolArgs) -> tuple[Tensor, Tensor]:
    """`[K, d]` in x's dtype, and the log-sum-exp of every row and head, `[K, H]` fp32."""
    x, q, ratio, halo = rows_contiguous(args.x), args.q.contiguous(), args.ratio, args.halo
    num_heads, head_dim = q.shape[-2:]
    table, num_rows, shape = packing(x, args.cu_seqlens, ratio)
    block_w, single = chunk_of(num_heads, head_dim, ratio + 2 * halo)
    out = x.new_empty(num_rows, num_heads * head_dim)
    lse = x.new_empty(num_rows, num_heads, dtype=torch.float32)
    launch(
        _forward_kernel,
        (num_rows,),
        *(x, q, contiguous(args.norm_weight), contiguous(args.window_bias), *table, out, lse),
        *(shape["N"], shape["S"], x.stride(0), ratio, halo, args.scale, args.eps),
        configs=configurations(num_heads, head_dim, block_w, per_thread=64 if single else 32),
        key=("NUM_HEADS", "HEAD_DIM", "PER_WINDOW"),
        SINGLE=single,
        **constexprs(q, shape["BLOCK_S"]),
    )
    return out, lse


def packing(
    x: Tensor, cu_seqlens: Tensor | None, ratio: int
) -> tuple[tuple[Tensor | None, Tensor | None], int, dict[str, int]]:
    """Offsets in tokens and in rows on x's device, in one transfer; the number of rows; and the kernels' sizes.

    Sequences of one length N need no offsets and no transfer.
    """
    if cu_seqlens is None:
        return (None, None), -(-len(x) // ratio), {"S": 1, "BLOCK_S": 1, "N": len(x)}
    lengths = cu_seqlens.diff()
    rows = torch.nn.functional.pad(((lengths + ratio - 1) // ratio).cumsum(0), (1, 0))
    if len(lengths) and bool((lengths == lengths[0]).all()):
        return (None, None), int(rows[-1]), {"S": 1, "BLOCK_S": 1, "N": int(lengths[0])}
    on_device = upload(torch.stack([cu_seqlens, rows]), x.device)
    shape = {"S": len(lengths), "BLOCK_S": triton.next_power_of_2(max(len(lengths), 1)), "N": 0}
    return (on_device[0], on_device[1]), int(rows[-1]), shape


def chunk_of(num_heads: int, head_dim: int, width: int) -> tuple[int, bool]:
    """Tokens per chunk, and whether one chunk holds a window: then it may be larger, as nothing is carried along."""
    row = row_size(num_heads, head_dim)
    if triton.next_power_of_2(width) * row <= CHUNK:
        return triton.next_power_of_2(width), True
    return max(1, CHUNK // 2 // row), False


def row_size(num_heads: int, head_dim: int) -> int:
    """Elements of a row on chip: both dimensions of a block are powers of two."""
    size: int = triton.next_power_of_2(num_heads) * triton.next_power_of_2(head_dim)
    return size


def configurations(num_heads: int, head_dim: int, block_w: int, per_thread: int) -> list[triton.Config]:
    """Warps for about `per_thread` elements of a chunk per thread; half as many may hide latency better."""
    row = row_size(num_heads, head_dim)
    warps = {min(16, max(1, block_w * row // (32 * n))) for n in (per_thread, per_thread // 2)}
    configs = [triton.Config({"BLOCK_W": block_w}, num_warps=n, num_stages=1) for n in sorted(warps)]
    return configs[:1] if (num_heads, head_dim) == (32, 128) else configs


def constexprs(q: Tensor, block_s: int) -> dict[str, int | bool]:
    """The compile-time arguments of every kernel of this op and of its backward pass."""
    num_heads, head_dim = q.shape[-2:]
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "PER_WINDOW": q.dim() == 3,
        "BLOCK_H": triton.next_power_of_2(num_heads),
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_S": block_s,
    }
