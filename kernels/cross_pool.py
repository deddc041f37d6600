"""cross_pool, forward: every query attends over all tokens of its sequence.

With head h owning the columns x_ih of a row of x, and w the norm weight:

    rstd_i = 1 / sqrt(mean(x_i^2) + eps),   s_ijh = scale * <q_jh w_h, x_ih> * rstd_i,
    p_ijh = softmax over the tokens i of s_ijh,   out_jh = w_h * sum_i p_ijh rstd_i x_ih

As written, the norm is folded into the row vectors around x, so that a tile of x is used as it came, as keys and as
values. x is read twice, T*d elements, and once more from L2 for every further tile of queries, q once, and K*d elements
are written; 4*T*K*d operations, K being the queries of a sequence. With hundreds of queries the matrix products bound
it, with few the two reads of x.

The mean square spans the width and a program sees one head of it, so a first kernel reads x once for rstd. Then it is
flash attention whose K and V are the same tile: a program holds BLOCK_M queries of one head and walks over the tokens,
BLOCK_N at a time. Where tiles times heads are fewer than the programs that a GPU holds, the tokens are cut into splits,
whose partial outputs and log-sum-exps another kernel combines in order.

Reference: condense_core/ops/reference/cross_pool.py. Tests: tests/kernels/test_cross_pool.py.
"""

import math
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.common import LOG2E, contiguous, dot_size, load_tile, rows_contiguous, store_tile, upload
from condense_core.kernels.launch import Target, fitting, launch, target_of
from condense_core.ops.arguments import CrossPoolArgs

_MAX_WIDTH = 16_384  # of a row of x: the last kernel of the backward pass holds one in registers
_MAX_HEAD_DIM = 256
_SPLIT = 256  # tokens; splits are multiples of it


def unsupported(args: CrossPoolArgs) -> str | None:
    """Why the kernels cannot take these, or None."""
    return too_wide(args.x, args.q)


def too_wide(x: Tensor, q: Tensor) -> str | None:
    """Why the kernels, those of the backward pass included, cannot take rows or heads of this width, or None."""
    if x.shape[1] > _MAX_WIDTH:
        return f"rows of x have {x.shape[1]} elements, more than {_MAX_WIDTH}"
    if q.shape[2] > _MAX_HEAD_DIM:
        return f"heads have {q.shape[2]} elements, more than {_MAX_HEAD_DIM}"
    return None


@triton.jit
def locate_tile(
    tiles_ptr,  # (tiles, 4) int64, or None for a single sequence
    num_rows,
    num_others,
    BLOCK: tl.constexpr,
):
    """The first row of this program's tile, the end of its sequence, and first and end of the rows that it meets."""
    tile = tl.program_id(0).to(tl.int64)
    if tiles_ptr is None:
        # Not num_rows.to(...): an argument of value 1 is a compile-time constant and has no such method.
        zero = tl.zeros([], tl.int64)
        return tile * BLOCK, zero + num_rows, zero, zero + num_others
    else:
        entry = tiles_ptr + 4 * tile
        return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def query_tile(
    tiles_ptr,  # (tiles, 4) int64, or None for a single sequence
    num_queries,
    num_tokens,
    split_tokens,
    BLOCK_M: tl.constexpr,
):
    """The queries of this program, and the tokens of its split that they meet.

    Returns:
        query: the first one. own, own_ok: `[BLOCK_M]`, their numbers counted from it, and which of them exist.
        split, first, num_inside: number of the split, its first token, and how many it has; not above 0 if none.
    """
    query, query_end, first, end = locate_tile(tiles_ptr, num_queries, num_tokens, BLOCK_M)
    own = tl.arange(0, BLOCK_M)
    own_ok = own < (query_end - query).to(tl.int32)
    split = tl.program_id(2).to(tl.int64)
    first += split * split_tokens
    return query, own, own_ok, split, first, tl.minimum(end - first, split_tokens).to(tl.int32)


@triton.jit
def load_head_tile(ptr, row, row_ok, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`load_tile` of the columns of this program's head, `[rows, BLOCK_D]`."""
    return load_tile(ptr + tl.program_id(1) * HEAD_DIM, row, row_ok, stride, HEAD_DIM, BLOCK_D)


@triton.jit
def store_head_tile(ptr, row, row_ok, stride, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`store_tile` into the columns of this program's head."""
    store_tile(ptr + tl.program_id(1) * HEAD_DIM, row, row_ok, stride, tile, HEAD_DIM, BLOCK_D)


@triton.jit
def load_norm_weight(norm_weight_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, POLICY: tl.constexpr):
    """The norm weight of this program's head, `[1, BLOCK_D]` fp32.

    A kernel that needs it before and after its loop loads it twice, so that it occupies no registers in between; under
    another eviction policy, because the compiler merges loads that are alike.
    """
    dim = tl.arange(0, BLOCK_D)
    w = tl.full([BLOCK_D], 1.0, tl.float32)
    if norm_weight_ptr is not None:
        pointers = norm_weight_ptr + tl.program_id(1) * HEAD_DIM + dim
        w = tl.load(pointers, mask=dim < HEAD_DIM, other=0.0, eviction_policy=POLICY).to(tl.float32)
    return w[None]


@triton.jit
def _rstd_kernel(
    x_ptr,  # (num_tokens, WIDTH)
    rstd_ptr,  # (num_tokens,) fp32, times `lift`
    num_tokens,
    x_stride,
    eps,
    lift,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, WIDTH, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        mask = (token < num_tokens)[:, None] & (column < WIDTH)[None]
        x = tl.load(x_ptr + (token * x_stride)[:, None] + column[None], mask=mask, other=0.0).to(tl.float32)
        total += x * x
    tl.store(rstd_ptr + token, lift * tl.rsqrt(tl.sum(total, 1) / WIDTH + eps), mask=token < num_tokens)


@triton.jit
def _cross_kernel(
    x_ptr,  # (num_tokens, NUM_HEADS * HEAD_DIM)
    rstd_ptr,  # (num_tokens,) fp32, times `lift`
    q_ptr,  # (num_queries, NUM_HEADS, HEAD_DIM)
    norm_weight_ptr,  # (NUM_HEADS * HEAD_DIM,) or None
    tiles_ptr,  # (tiles, 4) int64, or None for a single sequence
    out_ptr,  # (splits, num_queries, NUM_HEADS * HEAD_DIM)
    lse_ptr,  # (splits, num_queries, NUM_HEADS) fp32, natural logarithm
    num_tokens,
    num_queries,
    x_stride,
    split_tokens,
    scale,
    lift,  # power of two that keeps p * rstd within the range of fp16; 1 for other dtypes
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_DIM
    query, own, own_ok, split, first, num_inside = query_tile(tiles_ptr, num_queries, num_tokens, split_tokens, BLOCK_M)
    w = load_norm_weight(norm_weight_ptr, HEAD_DIM, BLOCK_D, "")
    q = load_head_tile(q_ptr + query * WIDTH, own, own_ok, WIDTH, HEAD_DIM, BLOCK_D).to(tl.float32) * w
    q = q.to(x_ptr.dtype.element_ty)
    factor = scale / lift * LOG2E
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sumexp = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    place = tl.arange(0, BLOCK_N)
    for chunk in range(0, num_inside, BLOCK_N):
        inside = place < num_inside - chunk
        token = first + chunk
        x = load_head_tile(x_ptr + token * x_stride, place, inside, x_stride, HEAD_DIM, BLOCK_D)
        rstd = tl.load(rstd_ptr + token + place, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(x), input_precision="ieee") * (rstd * factor)[None]
        s = tl.where(inside[None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        sumexp = sumexp * alpha + tl.sum(p, 1)
        acc = tl.dot((p * rstd[None]).to(x.dtype), x, acc * alpha[:, None], input_precision="ieee")
        m = m_new

    # Zeros where the sequence or the split has no token; all else, NaN included, comes out as it is.
    w = load_norm_weight(norm_weight_ptr, HEAD_DIM, BLOCK_D, "evict_first")
    out = tl.where(num_inside > 0, acc * w * (1.0 / (sumexp * lift))[:, None], 0.0)
    row = split * num_queries + query
    store_head_tile(out_ptr + row * WIDTH, own, own_ok, WIDTH, out, HEAD_DIM, BLOCK_D)
    lse = (m + tl.log2(sumexp)) / LOG2E
    tl.store(lse_ptr + row * NUM_HEADS + tl.program_id(1) + own * NUM_HEADS, lse, mask=own_ok)


@triton.jit
def _combine_splits_kernel(
    partial_ptr,  # (splits, num_queries, NUM_HEADS * HEAD_DIM) fp32
    partial_lse_ptr,  # (splits, num_queries, NUM_HEADS) fp32
    out_ptr,  # (num_queries, NUM_HEADS * HEAD_DIM)
    lse_ptr,  # (num_queries, NUM_HEADS) fp32
    num_queries,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_D)
    column = head[:, None] * HEAD_DIM + dim[None]
    mask = (head < NUM_HEADS)[:, None] & (dim < HEAD_DIM)[None]
    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    for split in range(num_splits):
        row = split * num_queries + query
        m = tl.maximum(m, tl.load(partial_lse_ptr + row * NUM_HEADS + head, mask=head < NUM_HEADS, other=0.0))
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    sumexp = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for split in range(num_splits):
        row = split * num_queries + query
        lse = tl.load(partial_lse_ptr + row * NUM_HEADS + head, mask=head < NUM_HEADS, other=0.0)
        weight = tl.exp2((lse - m_safe) * LOG2E)
        sumexp += weight
        acc += weight[:, None] * tl.load(partial_ptr + row * NUM_HEADS * HEAD_DIM + column, mask=mask, other=0.0)
    out = acc * tl.where(sumexp == 0.0, 0.0, 1.0 / sumexp)[:, None]
    tl.store(out_ptr + query * NUM_HEADS * HEAD_DIM + column, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + query * NUM_HEADS + head, m_safe + tl.log2(sumexp) / LOG2E, mask=head < NUM_HEADS)


def forward(args: CrossPoolArgs) -> tuple[Tensor, Tensor]:
    """`[K, d]` in x's dtype, and the log-sum-exp of every query and head, `[K, H]` fp32."""
    x, q, target = near_rows(args.x), args.q.contiguous(), target_of(args.x.device)
    num_queries, num_heads, head_dim = q.shape
    tokens, queries = ends_of(args.cu_seqlens, len(x)), ends_of(args.cu_queries, num_queries)
    block_m = own_rows(x, head_dim, queries, target)
    (table,), (num_tiles,) = tile_tables(x.device, (queries, tokens, block_m))
    splits, split_tokens = splits_of(num_tiles * num_heads, block_m, head_dim, tokens, target)
    sizes = dimensions(num_heads, head_dim)

    lift = 2.0 ** math.floor(15 + math.log2(args.eps) / 2) if x.dtype == torch.float16 else 1.0  # rstd <= 1 / sqrt(eps)
    rstd = rstd_of(x, args.eps, lift)
    out = x.new_empty(num_queries, num_heads * head_dim)
    lse = x.new_empty(num_queries, num_heads, dtype=torch.float32)
    partial, partial_lse = out, lse
    if splits > 1:
        partial, partial_lse = (x.new_empty(splits, *t.shape, dtype=torch.float32) for t in (out, lse))
    launch(
        _cross_kernel,
        (num_tiles, num_heads, splits),
        *(x, rstd, q, contiguous(args.norm_weight), table, partial, partial_lse),
        *(len(x), num_queries, x.stride(0), split_tokens, args.scale, lift),
        configs=configurations(x, head_dim, block_m, target, own=1, met=1),
        key=("NUM_HEADS", "HEAD_DIM", "BLOCK_M"),
        BLOCK_M=block_m,
        **sizes,
    )
    if splits > 1:
        block_h = min(triton.next_power_of_2(num_heads), 4096 // sizes["BLOCK_D"])
        launch(
            _combine_splits_kernel,
            (num_queries, -(-num_heads // block_h)),
            *(partial, partial_lse, out, lse, num_queries, splits),
            configs=[triton.Config({}, num_warps=4)],
            BLOCK_H=block_h,
            **sizes,
        )
    return out, lse


def rstd_of(x: Tensor, eps: float, lift: float = 1.0) -> Tensor:
    """lift / sqrt(mean(x^2) + eps) of every row, `[T]` fp32."""
    rstd = x.new_empty(len(x), dtype=torch.float32)
    block_c = min(4096, triton.next_power_of_2(x.shape[1]))
    block_t = 4096 // block_c
    launch(
        _rstd_kernel,
        (-(-len(x) // block_t),),
        *(x, rstd, len(x), x.stride(0), eps, lift),
        configs=[triton.Config({}, num_warps=4)],
        WIDTH=x.shape[1],
        BLOCK_T=block_t,
        BLOCK_C=block_c,
    )
    return rstd


def ends_of(offsets: Tensor | None, rows: int) -> Tensor:
    """Offsets `[S+1]` on the CPU; those of a single sequence for None."""
    return torch.tensor([0, rows]) if offsets is None else offsets


def tile_tables(device: torch.device, *tilings: tuple[Tensor, Tensor, int]) -> tuple[list[Tensor | None], list[int]]:
    """Tables of tiles of rows, on `device` in one transfer, and how many tiles each has.

    Args:
        device: where the tables are wanted.
        tilings: offsets `[S+1]` of the rows to be cut into tiles, those of the rows that they meet, and the rows of a
            tile.

    Returns:
        For each tiling a table `[tiles, 4]` int64: first row of the tile, end of its sequence, first and end of the
        rows that it meets. A single sequence needs none, and no transfer.
    """
    counts = [(own.diff() + block - 1) // block for own, _, block in tilings]
    totals = [int(count.sum()) for count in counts]
    if len(tilings[0][0]) == 2:
        return [None] * len(tilings), totals
    tables = []
    for (own, met, block), count in zip(tilings, counts, strict=True):
        s = torch.repeat_interleave(count)  # [tiles], the sequence of each
        place = torch.arange(len(s)) - (count.cumsum(0) - count)[s]  # counted in its sequence
        tables.append(torch.stack([own[s] + block * place, own[s + 1], met[s], met[s + 1]], 1))
    return list(upload(torch.cat(tables), device).split(totals)), totals


def own_rows(x: Tensor, head_dim: int, ends: Tensor, target: Target) -> int:
    """BLOCK_M, the rows that a program holds: no more than a sequence has, and than there are registers for.

    Where the matrix unit takes operands from registers, the rows that stay do so too, and half as many fit as where it
    takes them from shared memory. Products of fp32 run on the ordinary units, unrolled, and want less still.
    """
    elements = 4096 if x.dtype == torch.float32 else 16_384 if _operands_in_shared_memory(target) else 8192
    most = min(128, elements // dot_size(head_dim))
    return max(16, min(most, triton.next_power_of_2(_longest(ends))))


def splits_of(programs: int, block_m: int, head_dim: int, tokens: Tensor, target: Target) -> tuple[int, int]:
    """How many splits the tokens are cut into, so as to occupy every multiprocessor, and the tokens of one."""
    resident = max(1, min(3, 16_384 // _tile(block_m, head_dim)))  # programs that fit on a multiprocessor
    wanted = max(1, target.num_sms * resident // max(programs, 1))
    longest = _longest(tokens)
    length = max(1, -(-longest // (wanted * _SPLIT))) * _SPLIT
    return max(1, -(-longest // length)), length


def configurations(
    x: Tensor, head_dim: int, block_m: int, target: Target, *, own: int, met: int
) -> list[triton.Config]:
    """BLOCK_N, the rows met at a time, and the stages of the pipeline that fetches them.

    Args:
        x: the rows, for their dtype.
        head_dim: columns of a tile, before they are rounded up.
        block_m: rows of a tile that stays.
        target: what has the shared memory.
        own: tiles of block_m rows that a program keeps in shared memory.
        met: tiles of BLOCK_N rows that it fetches for a step.
    """
    warps = 8 if _tile(block_m, head_dim) >= 16_384 else 4
    in_shared = _operands_in_shared_memory(target)

    def shared_memory(config: triton.Config) -> int:
        block_n, stages = config.kwargs["BLOCK_N"], config.num_stages - (not in_shared)
        elements = (own * block_m + met * stages * block_n) * dot_size(head_dim) + block_m * block_n
        return elements * x.element_size() * 8 // warps  # a multiprocessor should hold eight warps at least

    if x.dtype == torch.float32:
        shapes = [(16, 2)]  # anything larger spills
    else:
        shapes = list(product((64, 32) if in_shared and head_dim <= 128 else (32, 16), (3, 2)))
    configs = [triton.Config({"BLOCK_N": n}, num_warps=warps, num_stages=stages) for n, stages in shapes]
    configs = fitting(configs, target, shared_memory)
    return configs[:1] if head_dim == 128 else configs


def dimensions(num_heads: int, head_dim: int) -> dict[str, int]:
    """The compile-time arguments of every kernel that works head by head."""
    return {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "BLOCK_D": dot_size(head_dim)}


def near_rows(x: Tensor) -> Tensor:
    """The rows less than 2^23 elements apart, copied if they are not, so that offsets within a tile fit 32 bits."""
    return rows_contiguous(x) if x.stride(0) < 2**23 else x.contiguous()


def _operands_in_shared_memory(target: Target) -> bool:
    """Whether matrix products read shared or tensor memory (wgmma, tcgen05) rather than registers (mma.sync)."""
    return target.arch // 10 in (9, 10)


def _tile(block_m: int, head_dim: int) -> int:
    """Accumulated elements of a program, those of the logits at least."""
    return block_m * max(dot_size(head_dim), 128)


def _longest(ends: Tensor) -> int:
    return int(ends.diff().max()) if len(ends) > 1 else 0
