"""non_causal_chunks (Compactor): the attention that every key gets from all queries of its chunk, summed over them.

    p_hji = softmax over the keys i of the chunk of query j of scale * <q_hj, k_i>,   h of the H/G heads of a group,
    score_i = mean over h of the sum over the queries j of the chunk of p_hji;   -inf for padding

q (B*H*N*D elements) and K (B*G*N*D) are read once, B*G*N scores are written, 4 bytes each. With chunks of C tokens that
takes 2*B*H*N*C*D FLOPs and B*H*N*C exponentials: at the shapes of Mistral-7B, C = 256 and N = 2,048, 21 MB, 4.3 GFLOP
and 16.8 M exponentials. Products, exponentials (16 per cycle and multiprocessor) and bytes each take about the same
time; none may wait for another. Column sums need the softmax of whole rows first, which is had in one of two ways.

One product: chunks of up to 256 keys in 16 bits. The keys of a chunk stay in shared memory, and a tile of 64 queries
meets all of them in one product. A row's maximum and sum are then in registers, so nothing is computed twice. The
columns of such a product lie across threads; what a tile gives to a column is added up only inside each thread (two
rows of sixteen are its own), over all tiles and all query heads of the group, and across threads once at the end. One
program takes a chunk and a KV head; where these are fewer than the GPU holds, their tiles are divided into parts, and a
second launch adds the parts up.

Two products: longer chunks; fp32, which has no tensor cores; and compute capability 10.0, where a thread holds one row
of a product. One launch leaves the log-sum-exp of every row, a second one goes over the queries again for each tile of
keys, with the product transposed so that the sums run along its rows. That takes twice the products and exponentials,
4*B*H*N bytes in between, and as many programs as tiles.

In neither case is there a tensor of `C * C`, and no program reads what another wrote in the same launch: the result has
the same bits every time.

Reference: condense_core/ops/reference/non_causal_chunks.py. Tests: tests/kernels/test_non_causal_chunks.py.
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
from condense_core.ops.arguments import NonCausalChunksArgs

_MAX_HEAD_DIM = 256
# Keys of a chunk that meet 64 queries in one product: 128 accumulators for each of 128 threads.
_MAX_CHUNK = 256
_QUERIES = 64


def unsupported(args: NonCausalChunksArgs) -> str | None:
    """Why the kernels cannot take these, or None."""
    if args.k.shape[-1] > _MAX_HEAD_DIM:
        return f"head_dim is {args.k.shape[-1]}, more than {_MAX_HEAD_DIM}"
    return None


@triton.jit
def _chunk_scores_kernel(
    q_ptr,  # (batch, num_kv_heads * GROUP, num_tokens, HEAD_DIM)
    k_ptr,  # (batch, num_kv_heads, num_tokens, HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    scores_ptr,  # (parts, batch, num_kv_heads, num_tokens) fp32
    num_tokens,
    batch_heads,  # batch * num_kv_heads
    num_kv_heads,
    chunks,
    parts,
    tiles_per_part,
    chunk_size,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    scale,  # times log2(e)
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a tile
    BLOCK_N: tl.constexpr,  # chunk_size, rounded up
    BLOCK_D: tl.constexpr,
):
    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    # Parts of one chunk are neighbours: they run together, and share its keys in the cache.
    part = program % parts
    chunk = program // parts % chunks
    batch_head = (program // (parts * chunks)).to(tl.int64)
    batch, kv_head, start, stop = locate_head(batch_head, num_kv_heads, bounds_ptr, num_tokens)
    start, stop = start.to(tl.int32), stop.to(tl.int32)
    first = start + chunk * chunk_size
    end = tl.minimum(first + chunk_size, stop)
    place = tl.arange(0, BLOCK_N)
    scores_ptr += (part.to(tl.int64) * batch_heads + batch_head) * num_tokens

    sums = tl.zeros([BLOCK_N], tl.float32)
    if first < end:
        q_ptr += batch * q_stride_b + kv_head * GROUP * q_stride_h
        k_ptr += batch * k_stride_b + kv_head * k_stride_h
        query_tiles = (chunk_size + BLOCK_M - 1) // BLOCK_M
        low = part * tiles_per_part
        high = tl.minimum(low + tiles_per_part, query_tiles * GROUP)
        if end - first == BLOCK_N:
            sums = _column_sums(
                q_ptr, k_ptr, first, end, low, high, query_tiles, q_stride_h, q_stride_n, k_stride_n, scale,
                HEAD_DIM, NEGATIVE_SCALE, False, FP32, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        else:
            sums = _column_sums(
                q_ptr, k_ptr, first, end, low, high, query_tiles, q_stride_h, q_stride_n, k_stride_n, scale,
                HEAD_DIM, NEGATIVE_SCALE, True, FP32, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    _store_scores(scores_ptr, sums / GROUP, place, chunk, chunk_size, start, stop, num_tokens)


@triton.jit
def _store_scores(scores_ptr, scores, place, chunk, chunk_size, start, stop, num_tokens):
    """Scores of places of a chunk; -inf for the padding that follows `stop`, and that no chunk counts as its own."""
    own = place < chunk_size
    key = start + chunk * chunk_size + place
    tl.store(scores_ptr + key, scores, mask=own & (key < stop))
    padding = tl.full(place.shape, float("-inf"), tl.float32)
    tl.store(scores_ptr + key, padding, mask=own & (key >= stop) & (key < num_tokens))
    key = chunk * chunk_size + place
    tl.store(scores_ptr + key, padding, mask=own & (key < start))


@triton.jit
def _column_sums(
    q_ptr, k_ptr, first, end, low, high, query_tiles, q_stride_h, q_stride_n, k_stride_n, scale, HEAD_DIM: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, MASKED: tl.constexpr, FP32: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention that the keys of a chunk, up to BLOCK_N, get from its tiles of queries low <= tile < high."""
    k_offset = tl.minimum(first + tl.arange(0, BLOCK_N), end - 1).to(tl.int64) * k_stride_n
    if not FP32:
        k = tl.trans(load_rows(k_ptr, k_offset, HEAD_DIM, BLOCK_D))
    # Key 8 i + j is a real one if i < beyond[j]. A thread of the tensor cores has few j and every i: these are
    # constants of the code, where the 64 keys of a thread would fill as many registers.
    eighth = tl.arange(0, BLOCK_N // 8)
    beyond = (end - first - tl.arange(0, 8) + 7) // 8
    # Row r of a tile belongs to a thread together with row r + 8, in the tensor cores' layout.
    acc = tl.zeros([BLOCK_M // 16, 8, BLOCK_N], tl.float32)
    for tile in range(low, high):
        query = first + tile % query_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        q_offset = (tile // query_tiles).to(tl.int64) * q_stride_h + tl.minimum(query, end - 1).to(
            tl.int64
        ) * q_stride_n
        if FP32:
            s = dot_rows(q_ptr, q_offset, k_ptr, k_offset, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_N)
        else:
            s = tl.dot(load_rows(q_ptr, q_offset, HEAD_DIM, BLOCK_D), k)
        if MASKED:
            s = tl.reshape(s * scale, [BLOCK_M, BLOCK_N // 8, 8])
            s = tl.reshape(tl.where((eighth[:, None] < beyond[None])[None], s, float("-inf")), [BLOCK_M, BLOCK_N])
            p = tl.exp2(s - tl.max(s, 1)[:, None])
        else:
            top = (tl.min(s, 1) if NEGATIVE_SCALE else tl.max(s, 1)) * scale
            p = tl.exp2(s * scale - top[:, None])
        weight = 1 / tl.sum(p, 1)
        if MASKED:
            weight = tl.where(query < end, weight, 0.0)
        acc += tl.sum(tl.reshape(p * weight[:, None], [BLOCK_M // 16, 2, 8, BLOCK_N]), 1)
    return tl.sum(tl.sum(acc, 1), 0)


@triton.jit
def _chunk_logsumexp_kernel(
    q_ptr,  # (batch, num_kv_heads * GROUP, num_tokens, HEAD_DIM)
    k_ptr,  # (batch, num_kv_heads, num_tokens, HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    lse_ptr,  # (batch, num_kv_heads * GROUP, num_tokens) fp32, base 2
    num_tokens,
    num_kv_heads,
    chunks,
    query_tiles,
    chunk_size,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    scale,  # times log2(e)
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The log-sum-exp of a tile of queries over their chunk."""
    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    # Query heads of a group are neighbours: they share the keys in the cache.
    member = program % GROUP
    tile = program // GROUP % query_tiles
    chunk = program // (GROUP * query_tiles) % chunks
    batch_head = (program // (GROUP * query_tiles * chunks)).to(tl.int64)
    batch, kv_head, start, stop = locate_head(batch_head, num_kv_heads, bounds_ptr, num_tokens)
    start, stop = start.to(tl.int32), stop.to(tl.int32)
    first = start + chunk * chunk_size
    end = tl.minimum(first + chunk_size, stop)
    if first + tile * BLOCK_M >= end:
        return

    q_ptr += batch * q_stride_b + (kv_head * GROUP + member) * q_stride_h
    k_ptr += batch * k_stride_b + kv_head * k_stride_h
    query = first + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_offset = tl.minimum(query, end - 1).to(tl.int64) * q_stride_n
    if not FP32:
        q = load_rows(q_ptr, q_offset, HEAD_DIM, BLOCK_D)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for low in tl.range(first, end, BLOCK_N, num_stages=STAGES):
        key = low + tl.arange(0, BLOCK_N)
        k_offset = tl.minimum(key, end - 1).to(tl.int64) * k_stride_n
        if FP32:
            s = dot_rows(q_ptr, q_offset, k_ptr, k_offset, HEAD_DIM, BLOCK_D)
        else:
            s = tl.dot(q, tl.trans(load_rows(k_ptr, k_offset, HEAD_DIM, BLOCK_D)))
        s = tl.where((key < end)[None], s * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # keys of a tile may all be at -inf
        total = total * tl.exp2(m - m_safe) + tl.sum(tl.exp2(s - m_safe[:, None]), 1)
        m = m_new
    lse_ptr += (batch_head * GROUP + member) * num_tokens
    tl.store(lse_ptr + query, m + tl.log2(total), mask=query < end)


@triton.jit
def _chunk_columns_kernel(
    q_ptr,  # (batch, num_kv_heads * GROUP, num_tokens, HEAD_DIM)
    k_ptr,  # (batch, num_kv_heads, num_tokens, HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    lse_ptr,  # (batch, num_kv_heads * GROUP, num_tokens) fp32, base 2
    scores_ptr,  # (batch, num_kv_heads, num_tokens) fp32
    num_tokens,
    num_kv_heads,
    chunks,
    key_tiles,
    chunk_size,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    scale,  # times log2(e)
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # keys
    BLOCK_N: tl.constexpr,  # queries of a step
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,  # of keeping loads under way, the log-sum-exps among them
):
    """The scores of a tile of keys: a pass over the queries of their chunk, of every head of the group."""
    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    tile = program % key_tiles
    chunk = program // key_tiles % chunks
    batch_head = (program // (key_tiles * chunks)).to(tl.int64)
    batch, kv_head, start, stop = locate_head(batch_head, num_kv_heads, bounds_ptr, num_tokens)
    start, stop = start.to(tl.int32), stop.to(tl.int32)
    first = start + chunk * chunk_size
    end = tl.minimum(first + chunk_size, stop)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    scores_ptr += batch_head * num_tokens

    sums = tl.zeros([BLOCK_M], tl.float32)
    if first + tile * BLOCK_M < end:
        q_ptr += batch * q_stride_b + kv_head * GROUP * q_stride_h
        k_ptr += batch * k_stride_b + kv_head * k_stride_h
        lse_ptr += batch_head * GROUP * num_tokens
        k_offset = tl.minimum(first + place, end - 1).to(tl.int64) * k_stride_n
        if not FP32:
            k = load_rows(k_ptr, k_offset, HEAD_DIM, BLOCK_D)
        query_tiles = (end - first + BLOCK_N - 1) // BLOCK_N
        for step in tl.range(query_tiles * GROUP, num_stages=STAGES):
            member = (step // query_tiles).to(tl.int64)
            query = first + step % query_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
            q_offset = member * q_stride_h + tl.minimum(query, end - 1).to(tl.int64) * q_stride_n
            if FP32:
                s = dot_rows(k_ptr, k_offset, q_ptr, q_offset, HEAD_DIM, BLOCK_D)
            else:
                s = tl.dot(k, tl.trans(load_rows(q_ptr, q_offset, HEAD_DIM, BLOCK_D)))
            lse = tl.load(lse_ptr + member * num_tokens + query, mask=query < end, other=float("inf"))
            sums += tl.sum(tl.exp2(s * scale - lse[None]), 1)
    _store_scores(scores_ptr, sums / GROUP, place, chunk, chunk_size, start, stop, num_tokens)


def forward(args: NonCausalChunksArgs) -> Tensor:
    """Scores `[B, G, N]` fp32."""
    q, k, bounds = rows_contiguous(args.q), rows_contiguous(args.k), contiguous(args.bounds)
    chunk_size = min(args.chunk_size, max(k.shape[2], 1))  # a wider chunk sees no more
    (batch, num_heads, num_tokens, head_dim), num_kv_heads = q.shape, k.shape[1]
    batch_heads, group = batch * num_kv_heads, num_heads // num_kv_heads
    chunks = triton.cdiv(num_tokens, chunk_size)
    target = target_of(k.device)
    strides_and_scale = (*q.stride()[:3], *k.stride()[:3], args.scale * LOG2E.value)
    constexprs = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": dot_size(head_dim)}
    key = ("GROUP", "HEAD_DIM")

    configs = _one_product(chunk_size, constexprs["BLOCK_D"], k, target)
    if configs:
        # Two programs share a multiprocessor: one multiplies while the other takes exponentials.
        block_m = min(configs[0].kwargs["BLOCK_N"], _QUERIES)
        tiles = triton.cdiv(chunk_size, block_m) * group
        parts = min(tiles, max(1, triton.cdiv(2 * target.num_sms, max(chunks * batch_heads, 1))))
        tiles_per_part = triton.cdiv(tiles, parts)
        parts = triton.cdiv(tiles, tiles_per_part)
        scores = k.new_empty(parts, batch, num_kv_heads, num_tokens, dtype=torch.float32)
        launch(
            _chunk_scores_kernel,
            (parts * chunks * batch_heads,),
            *(q, k, bounds, scores, num_tokens, batch_heads, num_kv_heads, chunks, parts, tiles_per_part, chunk_size),
            *strides_and_scale,
            configs=configs,
            key=key,
            **constexprs,
            NEGATIVE_SCALE=args.scale < 0,
            BLOCK_M=block_m,
        )
        return scores.sum(0) if parts > 1 else scores[0]

    configs = _two_products(constexprs["BLOCK_D"], k, target)
    tiles = triton.cdiv(chunk_size, configs[0].kwargs["BLOCK_M"])
    lse = k.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    scores = k.new_empty(batch, num_kv_heads, num_tokens, dtype=torch.float32)
    for kernel, programs, out in (
        (_chunk_logsumexp_kernel, tiles * group, (lse,)),
        (_chunk_columns_kernel, tiles, (lse, scores)),
    ):
        launch(
            kernel,
            (programs * chunks * batch_heads,),
            *(q, k, bounds, *out, num_tokens, num_kv_heads, chunks, tiles, chunk_size, *strides_and_scale),
            configs=configs,
            key=key,
            **constexprs,
        )
    return scores


def _one_product(chunk_size: int, block_d: int, k: Tensor, target: Target) -> list[triton.Config]:
    """How to take all keys of a chunk at once.

    Empty where they are too many, and on 10.0, where a thread gets one row of a product and half its columns, whose
    sums would go through the whole warp.
    """
    block_n = dot_size(chunk_size)
    if block_n > (_MAX_CHUNK if k.element_size() == 2 else 32) or 100 <= target.arch < 120:
        return []
    row = block_d * k.element_size()
    # The products of 9.0 read a tile while it is replaced: one more buffer than elsewhere for the same depth.
    warpgroups = target.arch == 90

    def shared_memory(config: triton.Config) -> int:
        return (block_n + _QUERIES * (config.num_stages - (not warpgroups))) * row + 4096

    num_warps = 4 if warpgroups or block_n <= 128 else 8
    configs = [triton.Config({"BLOCK_N": block_n}, num_warps=num_warps, num_stages=n) for n in (3, 2)]
    best = fitting(configs, target, shared_memory)[0]
    return [best] if shared_memory(best) <= target.shared_memory else []


def _two_products(block_d: int, k: Tensor, target: Target) -> list[triton.Config]:
    """Tiles of both launches, BLOCK_M rows that stay and 64 that are met at a time: as many stages as fit."""
    row = block_d * k.element_size()
    block_m, num_warps = (128, 8) if k.element_size() == 2 else (64, 8)
    configs = [
        triton.Config({"BLOCK_M": block_m, "BLOCK_N": 64, "STAGES": n}, num_warps=num_warps, num_stages=n)
        for n in (3, 2)
    ]
    return fitting(configs, target, lambda config: (block_m + 64 * config.num_stages) * row)[:1]
