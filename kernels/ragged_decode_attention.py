"""ragged_decode_attention: one decode step over KV caches whose heads kept different numbers of tokens, in one launch.

    out_h = sum_i p_hi v_i,   p_hi = softmax over the valid rows i of h's KV head of scale * <q_h, k_i>

Of every valid row of a KV head, K and V are read once, 4 * head_dim bytes in 16 bits, and each of the H/G query heads
that share it does 4 * head_dim operations: 4 FLOP per byte at a group of 4, where a GPU does over 100. B*H*D elements
are written. The floor is the time to read K and V, 16.8 MB at 8 heads of 4,096 tokens and head_dim 128, but only if
every multiprocessor reads until the end. Eight heads alone cannot fill a GPU, and a grid of heads x splits would wait
for the longest head. Therefore:

- The rows of every head are cut into tiles of BLOCK_N, the tiles of all heads are numbered through, and P persistent
  programs (two per multiprocessor) take equal shares of that axis, to within one tile, whatever the lengths of the
  heads. The shares follow from cu_seqlens and lengths on the device, so the grid depends on neither, and a CUDA graph
  can replay the launch while the caches grow. Only valid rows make tiles: room kept for later tokens costs nothing.
- The queries of a group, padded to 16 rows, are one operand of the tensor cores. Padding multiplies the arithmetic, to
  16 FLOP per byte, and no bytes. A program keeps one online softmax for every head that its share meets.
- A head inside one share is written at once. For any other head each of its programs stores a partial sum, and the last
  of them to arrive adds these up, in the order of the programs, whoever is last: the same bits in every run. They pass
  through L2: group * head_dim * 4 bytes per program, 68 KB for a head that 33 programs share at 4 x 128.

Which programs share a head. Let there be `total` tiles and P' = min(P, total). Program p < P' owns the tiles [S(p),
S(p+1)), S(p) = floor(p total / P'), at least one. Tile t belongs to the largest p with S(p) <= t. As S(p) <= t just if
p total < (t+1) P', that is owner(t) = floor(((t+1) P' - 1) / total). The programs that meet a head with tiles [a, b)
are owner(a) ... owner(b-1), each in one segment: so many arrivals its counter must see. A head without valid rows has
no tiles, no segment and no counter; its zeros are written apart.

Slots of partial sums. When a head is split, its segment in p lacks some of [a, b): it starts at S(p), a < S(p), or it
ends at S(p+1), b > S(p+1). In the first case it is the first segment of p, in the second the last. So a program has at
most two partial segments, and slots 2p for its first segment and 2p + 1 for another give each its own: 2P slots. The
programs after owner(a) begin inside the head, so theirs is the even slot; that of owner(a) is odd unless a =
S(owner(a)). The head's counter is that of owner(a): of the heads that begin in the share of p only the last can go on
beyond it, so no two split heads have one counter. P counters.

The arrival. All threads of a program store their parts of the partial sum; the barrier puts these stores before the
atomic add, whose release at gpu scope puts them before whatever follows an acquire of its value or a later one. The
program that finds count - 1 arrivals sees all partial sums therefore; it reads them from L2 (.cg), and sets the counter
back to 0 for the next launch, which the stream puts after this one. No program ever waits for another, so any number
may be resident.

Nothing above rests on offsets being valid: the rows of each head are clamped to [0, T], and the tiles are those of the
clamped rows.

Reference: condense_core/ops/reference/ragged_decode_attention.py. Tests: tests/kernels/test_ragged_decode_attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.common import LOG2E, contiguous, dot_size, load_tile, rows_contiguous
from condense_core.kernels.counters import counters
from condense_core.kernels.launch import launch, target_of
from condense_core.ops.arguments import RaggedDecodeAttentionArgs

# fp32 numbers of an accumulator, and of a block of partial sums: 64 registers in each of 128 threads.
_ACCUMULATOR = 8_192
_PROGRAMS_PER_SM = 2
_BLOCK_S = 256  # heads that are looked at together, two per thread


def unsupported(args: RaggedDecodeAttentionArgs) -> str | None:
    """Why the kernel cannot take these, or None."""
    group, head_dim = _group(args), args.q.shape[2]
    rows, width = dot_size(group), dot_size(head_dim)
    if width > 256:
        return f"head_dim is {head_dim}, more than 256"
    if rows * width > _ACCUMULATOR:
        return f"{group} query heads of {head_dim} per KV head exceed the {_ACCUMULATOR} accumulators of a program"
    return None


@triton.jit
def _rows_of(head, cu_seqlens_ptr, lengths_ptr, num_heads, num_tokens):
    """First row and number of valid rows of `head`, a number or a block of them: inside [0, num_tokens] in any case."""
    known = head < num_heads
    start = tl.load(cu_seqlens_ptr + head, mask=known, other=0).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + head + 1, mask=known, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), num_tokens)
    rows = tl.minimum(tl.maximum(stop, start), num_tokens) - start
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + head, mask=known, other=0).to(tl.int64)
        rows = tl.minimum(rows, tl.maximum(length, 0))
    return start, rows


@triton.jit
def _tiles_of(head, cu_seqlens_ptr, lengths_ptr, num_heads, num_tokens, BLOCK_N: tl.constexpr):
    _, rows = _rows_of(head, cu_seqlens_ptr, lengths_ptr, num_heads, num_tokens)
    return (rows + BLOCK_N - 1) // BLOCK_N


@triton.jit
def _find(head, tiles, seen, first_tile, end_tile, num_heads):
    """Of a block of heads: how many stand before the share, how many begin before its end, and the former's tiles.

    `seen` tiles stand before the block. Empty heads at the share's start count as before it.
    """
    ends = seen + tl.cumsum(tiles, 0)
    passed = (ends <= first_tile) & (head < num_heads)
    begun = (ends - tiles < end_tile) & (head < num_heads)
    return tl.sum(passed.to(tl.int64)), tl.sum(begun.to(tl.int64)), tl.sum(tl.where(passed, tiles, 0))


@triton.jit
def _share(
    cu_seqlens_ptr,
    lengths_ptr,
    num_heads,
    num_tokens,
    ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The share of this program.

    Returns:
        total: tiles of all heads.
        programs: P', those with a share.
        first_tile, end_tile: the share; 0 and 0 for an empty one.
        first_head, end_head: the head of its first tile, and the one after that of its last.
        before: tiles before first_head.
    """
    index = tl.arange(0, BLOCK_S)
    total = tl.zeros([], tl.int64)
    if ONE_BLOCK:
        tiles = _tiles_of(index, cu_seqlens_ptr, lengths_ptr, num_heads, num_tokens, BLOCK_N)
        total += tl.sum(tiles)
    else:
        for chunk in range(0, num_heads, BLOCK_S):
            total += tl.sum(_tiles_of(chunk + index, cu_seqlens_ptr, lengths_ptr, num_heads, num_tokens, BLOCK_N))

    program = tl.program_id(0).to(tl.int64)
    programs = tl.minimum(total, tl.num_programs(0))
    busy = program < programs
    first_tile = tl.where(busy, program * total // tl.maximum(programs, 1), 0)
    end_tile = tl.where(busy, (program + 1) * total // tl.maximum(programs, 1), 0)

    if ONE_BLOCK:
        first_head, end_head, before = _find(index, tiles, 0, first_tile, end_tile, num_heads)
    else:
        first_head, end_head = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
        before, seen = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
        for chunk in range(0, num_heads, BLOCK_S):
            head = chunk + index
            tiles = _tiles_of(head, cu_seqlens_ptr, lengths_ptr, num_heads, num_tokens, BLOCK_N)
            passed, begun, tiles_passed = _find(head, tiles, seen, first_tile, end_tile, num_heads)
            first_head += passed
            end_head += begun
            before += tiles_passed
            seen += tl.sum(tiles)
    return total, programs, first_tile, end_tile, first_head, end_head, before


@triton.jit
def _segment(
    q,  # (BLOCK_M, BLOCK_D)
    k_ptr,  # (rows, HEAD_DIM), those of the head
    v_ptr,  # (rows, HEAD_DIM)
    k_stride,
    v_stride,
    low,
    high,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Online softmax over the rows [low, high): greatest logit (base 2), sum of the weights, weighted sum of V."""
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N).to(tl.int64)
        # What stands beyond the valid rows may be anything, NaN included: it is never read.
        inside = row < high
        k = load_tile(k_ptr, row, inside, k_stride, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(inside[None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # infinities in K can make a whole tile -inf
        alpha = tl.exp2(m - m_safe)
        p = tl.exp2(s - m_safe[:, None])
        norm = norm * alpha + tl.sum(p, 1)
        v = load_tile(v_ptr, row, inside, v_stride, HEAD_DIM, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    return m, norm, acc


@triton.jit
def _combine(
    acc_ptr,  # (2 * programs, GROUP, BLOCK_D) fp32
    stats_ptr,  # (2 * programs, 2, GROUP) fp32
    first,
    count,
    odd,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The head's output, `[BLOCK_G, BLOCK_D]`, from the partial sums of `count` programs from `first` on."""
    row = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)
        slot = 2 * (first + index) + tl.where(index == 0, odd, 0)
        mask = (index < count)[:, None] & (row < GROUP)[None]
        stat = stats_ptr + (slot * 2 * GROUP)[:, None] + row[None]
        m_part = tl.load(stat, mask=mask, other=float("-inf"), cache_modifier=".cg")
        norm_part = tl.load(stat + GROUP, mask=mask, other=0.0, cache_modifier=".cg")
        part = acc_ptr + ((slot * GROUP)[:, None] + row[None])[:, :, None] * BLOCK_D + dim[None, None]
        acc_part = tl.load(part, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m, tl.max(m_part, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - m_safe)
        weight = tl.exp2(m_part - m_safe[None])
        norm = norm * alpha + tl.sum(weight * norm_part, 0)
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * acc_part, 0)
        m = m_new
    return acc / norm[:, None]


@triton.jit
def _decode_kernel(
    q_ptr,  # (batch, num_kv_heads * GROUP, HEAD_DIM)
    k_ptr,  # (num_tokens, HEAD_DIM)
    v_ptr,  # (num_tokens, HEAD_DIM)
    cu_seqlens_ptr,  # (num_heads + 1,) int32 or int64
    lengths_ptr,  # (num_heads,) int32 or int64, or None
    out_ptr,  # (num_heads * GROUP, HEAD_DIM)
    partial_ptr,  # fp32: sums (2 * programs, GROUP, BLOCK_D), then maxima and weights (2 * programs, 2, GROUP)
    counters_ptr,  # (programs,) int32, all zero before and after
    num_heads,  # batch * num_kv_heads: every KV head of every sequence has rows of its own
    num_kv_heads,
    num_tokens,
    q_stride_b,
    q_stride_h,
    k_stride,
    v_stride,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # num_heads <= BLOCK_S
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    grid = tl.num_programs(0)
    stats_ptr = partial_ptr + 2 * grid * GROUP * BLOCK_D
    row = tl.arange(0, BLOCK_M)
    out_row = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    row_mask = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None]
    out_mask = (out_row < GROUP)[:, None] & (dim < HEAD_DIM)[None]

    total, programs, first_tile, end_tile, first_head, end_head, before = _share(
        cu_seqlens_ptr, lengths_ptr, num_heads, num_tokens, ONE_BLOCK, BLOCK_N, BLOCK_S
    )
    for head in range(first_head, end_head):
        tile = tl.maximum(before, first_tile)
        start, rows = _rows_of(head, cu_seqlens_ptr, lengths_ptr, num_heads, num_tokens)
        after = before + (rows + BLOCK_N - 1) // BLOCK_N
        stop_tile = tl.minimum(after, end_tile)
        if stop_tile > tile:  # the head is not empty
            q_row = q_ptr + (head // num_kv_heads) * q_stride_b
            q_row += (head % num_kv_heads * GROUP + row)[:, None] * q_stride_h
            q = tl.load(q_row + dim[None], mask=row_mask, other=0.0)
            m, norm, acc = _segment(
                q,
                k_ptr + start * k_stride,
                v_ptr + start * v_stride,
                k_stride,
                v_stride,
                ((tile - before) * BLOCK_N).to(tl.int32),
                tl.minimum((stop_tile - before) * BLOCK_N, rows).to(tl.int32),
                scale * LOG2E,
                HEAD_DIM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
            )
            out = out_ptr + head * GROUP * HEAD_DIM + dim[None]
            if (tile == before) & (stop_tile == after):
                result = (acc / norm[:, None]).to(out_ptr.dtype.element_ty)
                tl.store(out + row[:, None] * HEAD_DIM, result, mask=row_mask)
            else:
                slot = 2 * program + (tile > first_tile).to(tl.int32)
                part = partial_ptr + (slot * GROUP + row)[:, None] * BLOCK_D + dim[None]
                tl.store(part, acc, mask=(row < GROUP)[:, None])
                stat = stats_ptr + slot * 2 * GROUP + row
                tl.store(stat, m, mask=row < GROUP)
                tl.store(stat + GROUP, norm, mask=row < GROUP)
                first = (((before + 1) * programs - 1) // total).to(tl.int32)  # owner of the head's first tile
                count = ((after * programs - 1) // total).to(tl.int32) - first + 1
                tl.debug_barrier()
                arrived = tl.atomic_add(counters_ptr + first, 1, sem="acq_rel", scope="gpu")
                if arrived == count - 1:
                    odd = (before > first * total // programs).to(tl.int32)
                    result = _combine(partial_ptr, stats_ptr, first, count, odd, GROUP, BLOCK_G, BLOCK_D, BLOCK_P)
                    tl.store(out + out_row[:, None] * HEAD_DIM, result.to(out_ptr.dtype.element_ty), mask=out_mask)
                    tl.store(counters_ptr + first, 0)
        before = after

    for empty in range(program.to(tl.int64), num_heads, grid):
        _, rows = _rows_of(empty, cu_seqlens_ptr, lengths_ptr, num_heads, num_tokens)
        if rows == 0:
            zeros = tl.zeros([BLOCK_G, BLOCK_D], out_ptr.dtype.element_ty)
            out = out_ptr + empty * GROUP * HEAD_DIM + dim[None]
            tl.store(out + out_row[:, None] * HEAD_DIM, zeros, mask=out_mask)


def forward(args: RaggedDecodeAttentionArgs) -> Tensor:
    """`[B, H, D]` in q's dtype."""
    q, k, v = rows_contiguous(args.q), rows_contiguous(args.k), rows_contiguous(args.v)
    cu_seqlens, lengths = args.cu_seqlens.contiguous(), contiguous(args.lengths)
    num_heads, group, head_dim = len(cu_seqlens) - 1, _group(args), q.shape[2]
    target = target_of(q.device)
    programs = _PROGRAMS_PER_SM * target.num_sms
    block_d, block_g = dot_size(head_dim), triton.next_power_of_2(group)
    out = q.new_empty(q.shape)
    partial = q.new_empty(2 * programs * group * (block_d + 2), dtype=torch.float32)
    launch(
        _decode_kernel,
        (programs,),
        *(q, k, v, cu_seqlens, lengths, out, partial, counters(q.device, programs)),
        *(num_heads, num_heads // len(q), len(k), q.stride(0), q.stride(1), k.stride(0), v.stride(0), args.scale),
        configs=[_config(block_d * q.element_size(), target.shared_memory)],
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_M=dot_size(group),
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        BLOCK_P=max(1, min(32, _ACCUMULATOR // (block_g * block_d))),
        ONE_BLOCK=num_heads <= _BLOCK_S,
        BLOCK_S=min(_BLOCK_S, triton.next_power_of_2(num_heads)),
    )
    return out


def _group(args: RaggedDecodeAttentionArgs) -> int:
    """Query heads of a KV head."""
    batch, num_heads, _ = args.q.shape
    return batch * num_heads // (len(args.cu_seqlens) - 1)


def _config(row: int, shared_memory: int) -> triton.Config:
    """Tiles for rows of `row` bytes: the largest with which two programs fit a multiprocessor.

    Three stages make two buffers for K and two for V; some 8 KB more pass queries and weights between the warps. There
    is nothing to tune: one buffer in use and one on the way, twice per multiprocessor, cover the latency of memory. And
    with one choice per card the sums are cut alike in every process, which gives the same bits.
    """
    sizes = (64, 32, 16)
    block_n = next((n for n in sizes if 4 * n * row + 8192 <= shared_memory // _PROGRAMS_PER_SM), sizes[-1])
    return triton.Config({"BLOCK_N": block_n}, num_warps=4, num_stages=3)
