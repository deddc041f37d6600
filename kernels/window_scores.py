"""window_scores (SnapKV): the attention that the last w queries give to every earlier key, averaged and smoothed.

    p_hti = softmax over the tokens i <= stop - w + t of scale * <q_ht, k_i>,   h of the H/G query heads of a group,
    score_i = sum over the kernel_size neighbours j of i of (mean over h and t of p_htj) / kernel_size

The last w real tokens score +inf and are no neighbours, padding scores -inf.

Two passes over K, with a log-sum-exp of every row (a head's query) between them: no `[H, w, N]` tensor exists. Each
pass reads K, B*G*N*D elements, once and does 2*B*H*w*N*D FLOPs and B*H*w*N exponentials; B*G*N scores are written, 4
bytes each. At the shapes of Mistral-7B in bf16, w = 64 and N = 2,048, both passes together: 8.4 MB, half of it from the
L2 cache, 2.1 GFLOP and 8.4 M exponentials, 16 of them per cycle and multiprocessor. On an H200 these take 2 us and the
products 2.7 us, reading K 1 us: the floor is arithmetic, not bandwidth, and tensor cores and exponentials must overlap.
So every key must meet all rows that want it while it is in shared memory: the H/G * w rows of a group make one tile,
256 rows at Mistral, loaded once per program, and the keys stream past it. More rows than fit make several tiles, and K
is read once for each.

First pass: program (row tile, split) goes over its share of the keys with a running maximum and sum, as flash attention
does, and leaves one number per row. Rows are the M dimension of the product: a row's maximum is found inside a quarter
of a warp. The causal mask touches only the last w keys, which have a loop of their own.

Second pass: the product is transposed, keys are the M dimension, since here the sums run over the rows. A program first
combines the splits of all its rows, then goes over a range of keys that reaches kernel_size // 2 beyond the columns it
owns on either side. The column sums of the range lie in a buffer of the program's own until all are there; a barrier
later, each of its columns adds up its neighbours. No program reads what another wrote in the same launch, so two
launches suffice, and the result has the same bits every time.

Reference: condense_core/ops/reference/window_scores.py. Tests: tests/kernels/test_window_scores.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.common import (
    LOG2E,
    contiguous,
    dot_rows,
    dot_size,
    load_rows,
    locate_head,
    rows_contiguous,
)
from condense_core.kernels.launch import Target, fitting, launch, target_of
from condense_core.ops.arguments import WindowScoresArgs

# Bytes of a tile of query rows: 256 rows of 128 16-bit numbers, and room beside it for two tiles of keys in 99 KB.
_ROW_TILE = 65_536
_STEP = 64  # keys of one step of the second pass
# Keys of a split of the first pass, at least: each program begins with the loading of a tile of rows, which half as
# many bytes of keys should outweigh.
_MIN_KEYS = 2 * _STEP
_MAX_SPLITS = 32
_RESERVED = 1024  # bytes of shared memory that the driver takes from a multiprocessor for each program
_MAX_HEAD_DIM = 256


def unsupported(args: WindowScoresArgs) -> str | None:
    """Why the kernels cannot take these, or None."""
    if args.k.shape[-1] > _MAX_HEAD_DIM:
        return f"head_dim is {args.k.shape[-1]}, more than {_MAX_HEAD_DIM}"
    return None


@triton.jit
def _query_rows(first, window, kv_head, q_stride_h, q_stride_n, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets of a tile of the rows of a group: row r is the query r % window of the group's head r // window."""
    row = tl.minimum(first + tl.arange(0, BLOCK_M), GROUP * window - 1)
    return (kv_head * GROUP + row // window) * q_stride_h + (row % window).to(tl.int64) * q_stride_n


@triton.jit
def _window_logsumexp_kernel(
    q_ptr,  # (batch, num_kv_heads * GROUP, window, HEAD_DIM)
    k_ptr,  # (batch, num_kv_heads, num_tokens, HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    lse_ptr,  # (batch * num_kv_heads, splits, GROUP * window) fp32, base 2
    num_tokens,
    window,
    num_kv_heads,
    splits,
    keys_per_split,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    scale,  # times log2(e)
    WINDOW: tl.constexpr,  # window where it is a power of two, else 0: other windows share one compiled kernel
    ROW_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if WINDOW > 0:
        window = WINDOW
    rows = GROUP * window
    program = tl.program_id(0)
    # Row tiles of one range of keys are neighbours: they run together, and share the range in the cache.
    row_tile = program % ROW_TILES
    split = program // ROW_TILES % splits
    batch_head = (program // (ROW_TILES * splits)).to(tl.int64)
    batch, kv_head, start, stop = locate_head(batch_head, num_kv_heads, bounds_ptr, num_tokens)
    start, stop = start.to(tl.int32), stop.to(tl.int32)
    if stop - start <= window:
        return  # every token is forced, the second pass needs no rows

    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    q_ptr += batch * q_stride_b
    q_offset = _query_rows(row_tile * BLOCK_M, window, kv_head, q_stride_h, q_stride_n, GROUP, BLOCK_M)
    if not FP32:
        q = load_rows(q_ptr, q_offset, HEAD_DIM, BLOCK_D)
    k_ptr += batch * k_stride_b + kv_head * k_stride_h

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    low = tl.maximum(split * keys_per_split, start)
    high = tl.minimum((split + 1) * keys_per_split, stop)
    # Tiles that every row sees whole, then the rest.
    full = low + tl.maximum(tl.minimum(high, stop - window) - low, 0) // BLOCK_N * BLOCK_N
    for first in range(low, full, BLOCK_N):
        k_offset = (first + tl.arange(0, BLOCK_N)).to(tl.int64) * k_stride_n
        if FP32:
            s = dot_rows(q_ptr, q_offset, k_ptr, k_offset, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_N)
        else:
            s = tl.dot(q, tl.trans(load_rows(k_ptr, k_offset, HEAD_DIM, BLOCK_D)))
        # The scale follows the maximum: one multiplication per row instead of one per score.
        m_new = tl.maximum(m, (tl.min(s, 1) if NEGATIVE_SCALE else tl.max(s, 1)) * scale)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        total = total * tl.exp2(m - m_safe) + tl.sum(tl.exp2(s * scale - m_safe[:, None]), 1)
        m = m_new
    last = stop - window + (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)) % window  # last key that a row sees
    for first in range(full, high, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        k_offset = tl.minimum(key, high - 1).to(tl.int64) * k_stride_n
        if FP32:
            s = dot_rows(q_ptr, q_offset, k_ptr, k_offset, HEAD_DIM, BLOCK_D)
        else:
            s = tl.dot(q, tl.trans(load_rows(k_ptr, k_offset, HEAD_DIM, BLOCK_D)))
        s = tl.where(key[None] <= tl.minimum(last, high - 1)[:, None], s * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # an early row sees none of a late tile
        total = total * tl.exp2(m - m_safe) + tl.sum(tl.exp2(s - m_safe[:, None]), 1)
        m = m_new

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + (batch_head * splits + split) * rows + row, m + tl.log2(total), mask=row < rows)


@triton.jit
def _window_scores_kernel(
    q_ptr,  # (batch, num_kv_heads * GROUP, window, HEAD_DIM)
    k_ptr,  # (batch, num_kv_heads, num_tokens, HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    lse_ptr,  # (batch * num_kv_heads, splits, GROUP * window) fp32, base 2
    sums_ptr,  # (programs, ROW_TILES, keys) fp32, column sums of each program's range
    scores_ptr,  # (batch, num_kv_heads, num_tokens) fp32
    num_tokens,
    window,
    num_kv_heads,
    splits,
    ranges,  # per sequence and KV head
    columns,  # that a program owns, keys - 2 * radius
    keys,  # that it goes over
    radius,  # neighbours on either side
    weight,  # of a sum in a score
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    scale,  # times log2(e)
    WINDOW: tl.constexpr,  # window where it is a power of two, else 0: other windows share one compiled kernel
    ROW_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,  # splits, rounded up
    BLOCK_K: tl.constexpr,  # neighbours added at once
):
    if WINDOW > 0:
        window = WINDOW
    rows = GROUP * window
    program = tl.program_id(0).to(tl.int64)
    batch_head = program // ranges
    batch, kv_head, start, stop = locate_head(batch_head, num_kv_heads, bounds_ptr, num_tokens)
    start, stop = start.to(tl.int32), stop.to(tl.int32)
    end = tl.maximum(stop - window, start)  # keys from here on are forced
    own = (program % ranges).to(tl.int32) * columns
    own_end = tl.minimum(own + columns, num_tokens)
    origin = own - radius  # key of the first column sum
    sums_ptr += program * ROW_TILES * keys

    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    if (start < end) & (own < end) & (own_end > start):
        q_ptr += batch * q_stride_b
        k_ptr += batch * k_stride_b + kv_head * k_stride_h
        lse_ptr += batch_head * splits * rows
        first_tile = tl.maximum(start - origin, 0) // BLOCK_N * BLOCK_N
        last_tile = tl.minimum(end - origin, keys)
        for row_tile in tl.range(ROW_TILES, disable_licm=True):
            row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            split = tl.arange(0, BLOCK_S)
            part = lse_ptr + split[:, None] * rows + tl.minimum(row, rows - 1)[None]
            parts = tl.load(part, mask=(split < splits)[:, None], other=float("-inf"))
            q_offset = _query_rows(row_tile * BLOCK_M, window, kv_head, q_stride_h, q_stride_n, GROUP, BLOCK_M)
            if not FP32:
                # Transposed here, not in the loop: there the tile would be copied to shared memory once more each time.
                q = tl.trans(load_rows(q_ptr, q_offset, HEAD_DIM, BLOCK_D))
            top = tl.max(parts, 0)
            lse = top + tl.log2(tl.sum(tl.exp2(parts - top[None]), 0))
            lse = tl.where(row < rows, lse, float("inf"))  # rows that do not exist give nothing
            for place in range(first_tile, last_tile, BLOCK_N):
                # Of keys that have no score the sums are not looked at.
                key = tl.minimum(tl.maximum(origin + place + tl.arange(0, BLOCK_N), start), end - 1)
                k_offset = key.to(tl.int64) * k_stride_n
                if FP32:
                    s = dot_rows(k_ptr, k_offset, q_ptr, q_offset, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_M)
                else:
                    s = tl.dot(load_rows(k_ptr, k_offset, HEAD_DIM, BLOCK_D), q)
                sums = tl.sum(tl.exp2(s * scale - lse[None]), 1)
                tl.store(sums_ptr + row_tile * keys + place + tl.arange(0, BLOCK_N), sums)
        tl.debug_barrier()

    for first in range(own, own_end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_N], tl.float32)
        for offset in range(-radius, radius + 1, BLOCK_K):
            neighbour = offset + tl.arange(0, BLOCK_K)
            key = column[:, None] + neighbour[None]
            near = (neighbour <= radius)[None] & (key >= start) & (key < end) & (column < own_end)[:, None]
            for row_tile in range(ROW_TILES):
                total += tl.sum(tl.load(sums_ptr + row_tile * keys + (key - origin), mask=near, other=0.0), 1)
        score = tl.where(column < end, total * weight, float("inf"))
        score = tl.where((column >= start) & (column < stop), score, float("-inf"))
        tl.store(scores_ptr + batch_head * num_tokens + column, score, mask=column < own_end)


def forward(args: WindowScoresArgs) -> Tensor:
    """Scores `[B, G, N]` fp32."""
    q_win, k, bounds = rows_contiguous(args.q_win), rows_contiguous(args.k), contiguous(args.bounds)
    (batch, num_heads, window, head_dim), (num_kv_heads, num_tokens) = q_win.shape, k.shape[1:3]
    group, batch_heads = num_heads // num_kv_heads, batch * num_kv_heads
    rows = group * window
    target = target_of(k.device)
    constexprs = {"GROUP": group, "HEAD_DIM": head_dim, **_tile(rows, head_dim, k)}
    row_tiles = triton.cdiv(rows, constexprs["BLOCK_M"])
    constexprs |= {"ROW_TILES": row_tiles, "WINDOW": window if window & (window - 1) == 0 else 0}
    slots = 2 * target.num_sms  # two programs share a multiprocessor: one multiplies while the other takes exponentials

    splits = max(1, min(_MAX_SPLITS, num_tokens // _MIN_KEYS, triton.cdiv(slots, batch_heads * row_tiles)))
    keys_per_split = triton.cdiv(triton.cdiv(num_tokens, splits), _MIN_KEYS) * _MIN_KEYS
    splits = triton.cdiv(num_tokens, keys_per_split)
    lse = k.new_empty(batch_heads, splits, rows, dtype=torch.float32)
    strides_and_scale = (*q_win.stride()[:3], *k.stride()[:3], args.scale * LOG2E.value)
    launch(
        _window_logsumexp_kernel,
        (row_tiles * splits * batch_heads,),
        *(q_win, k, bounds, lse, num_tokens, window, num_kv_heads, splits, keys_per_split, *strides_and_scale),
        configs=_configs(constexprs, k, target),
        key=("GROUP", "HEAD_DIM", "BLOCK_M"),
        **constexprs,
        NEGATIVE_SCALE=args.scale < 0,
    )

    # Ranges of whole steps: enough for every program to have one, two if that leaves none idle. The halo is at most
    # half of it.
    radius = min(args.kernel_size // 2, num_tokens)
    steps = triton.cdiv(num_tokens, _STEP) * batch_heads
    steps = max(triton.cdiv(steps, slots), min(triton.cdiv(steps, target.num_sms), 2), triton.cdiv(4 * radius, _STEP))
    keys = steps * _STEP
    columns = keys - 2 * radius
    ranges = triton.cdiv(num_tokens, columns)
    sums = k.new_empty(ranges * batch_heads, row_tiles, keys, dtype=torch.float32)
    scores = k.new_empty(batch, num_kv_heads, num_tokens, dtype=torch.float32)
    launch(
        _window_scores_kernel,
        (ranges * batch_heads,),
        *(q_win, k, bounds, lse, sums, scores, num_tokens, window, num_kv_heads, splits, ranges, columns, keys, radius),
        *(1 / (args.kernel_size * rows), *strides_and_scale),
        configs=_configs(constexprs, k, target),
        key=("GROUP", "HEAD_DIM", "BLOCK_M"),
        **constexprs,
        BLOCK_S=triton.next_power_of_2(splits),
        BLOCK_K=min(8, triton.next_power_of_2(2 * radius + 1)),
    )
    return scores


def _tile(rows: int, head_dim: int, k: Tensor) -> dict[str, int]:
    """Rows per tile: as many as _ROW_TILE bytes hold, or half of that where fewer are then empty."""
    block_d = dot_size(head_dim)
    most = min(256, _ROW_TILE // (block_d * 2)) if k.element_size() == 2 else 64
    if rows <= most:
        block_m = dot_size(rows)
    else:
        block_m = min((most, most // 2), key=lambda block: triton.cdiv(rows, block) * block)
    return {"BLOCK_M": block_m, "BLOCK_D": block_d}


def _configs(constexprs: dict[str, int], k: Tensor, target: Target) -> list[triton.Config]:
    """As many tiles of keys under way as let two programs share a multiprocessor, or one where two never fit.

    A warp takes 32 rows, 64 accumulators a thread. Where there are fewer rows, keys are waited for, by more warps.
    """
    block_m, row = constexprs["BLOCK_M"], constexprs["BLOCK_D"] * k.element_size()
    # The products of 9.0 and 10.0 read a tile while it is replaced: one more buffer than elsewhere for the same depth.
    deepest, extra, scratch = (3, 0, 1024) if 90 <= target.arch < 120 else (4, 1, 8 * block_m)

    def shared_memory(config: triton.Config) -> int:
        return (block_m + _STEP * (config.num_stages - extra)) * row + scratch

    def half(config: triton.Config) -> int:
        return 2 * shared_memory(config) + _RESERVED

    def config(num_warps: int) -> triton.Config:
        depths = [triton.Config({"BLOCK_N": _STEP}, num_warps=num_warps, num_stages=n) for n in range(deepest, 1, -1)]
        two_fit = half(depths[-1]) <= target.shared_memory
        return fitting(depths, target, half if two_fit else shared_memory)[0]

    warps = (4, 8) if 16 < block_m <= 128 and k.element_size() == 2 else (8, 4)
    mistral = (constexprs["GROUP"], constexprs["HEAD_DIM"]) == (4, 128)
    return [config(n) for n in (warps[:1] if mistral or block_m > 128 else warps)]
