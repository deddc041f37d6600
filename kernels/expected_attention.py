"""expected_attention: the attention that each key may expect of queries to come, times the norm of its value.

With x = R^T k, R the mean rotation of the positions to come, and mu and cov of each query head before rotation:

    logit_i = scale <x_i, mu> + scale^2 / 2 x_i^T cov x_i,   p = softmax over the tokens after the sinks,
    score_i = (mean of p_i over the query heads of a group + epsilon) * ||v_i||_2;   +inf for sinks, -inf for padding

Two launches. The first reads k once (B*G*N*D elements) and, for every tile of keys, mu and cov of the heads in its
group. It writes the logits [B, H, N] in fp32, in base 2, and for each tile and head their maximum and sum of
exponentials. The second combines these, reads logits and v, and writes the scores. No logit is computed twice and no
sum depends on timing.

Rotating the keys instead of mu and cov costs 2 FLOPs per element of k instead of 4 D^3 per head. What is left is
2 N D^2 FLOPs per query head: 2.1 GFLOP at Mistral-7B's shapes (H 32, G 8, N 2048, D 128), against 8.4 MB of k and v,
2.1 MB of cov and 0.6 MB of logits and scores. Products bound it.

RoPE pairs the two halves of the width, so a tile of keys is held as two halves, [BLOCK_N, D/2]. cov comes in pieces of
BLOCK_C rows, each row contiguous. TF32 operands must be contiguous along the sum, so `cov^T` is what matrix units take;
as the quadratic form of cov^T is that of cov, it makes no difference. Pieces are small so that several are on their way
at a time and fit in the 99 KB of shared memory of consumer cards. They come from L2, H * D^2 * 4 bytes per tile of
keys, 34 MB in all at N 2048 and BLOCK_N 128. Where a piece has all rows of a half, its rows of x are in registers
already; otherwise they are loaded anew.

The products with cov are in TF32 for 16-bit keys: x, a product with fp32 cosines, is no 16-bit value. A TF32 operand
has 11 significant bits; whether the hardware truncates (relative error below 2^-10) or rounds (2^-11), the logit is off
by less than 2^-9 * 0.5 scale^2 * sum_ij |x_i| |cov_ij| |x_j|. Keys in bf16 are themselves off by 2^-9 in each factor,
which enters twice. The term in mu is in fp32 throughout. Keys in fp32 take fp32 products.

Reference: condense_core/ops/reference/expected_attention.py. Tests: tests/kernels/test_expected_attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.common import LOG2E, contiguous, dot_size, load_tile, locate_head, rows_contiguous
from condense_core.kernels.launch import TRITON_VERSION, launch, target_of
from condense_core.ops.arguments import ExpectedAttentionArgs

_MAX_HEAD_DIM = 256


def unsupported(args: ExpectedAttentionArgs) -> str | None:
    """Why the kernels cannot take these, or None."""
    if args.k.shape[-1] > _MAX_HEAD_DIM:
        return f"head_dim is {args.k.shape[-1]}, more than {_MAX_HEAD_DIM}: a tile of keys does not fit the registers"
    if target_of(args.k.device).arch == 100 and TRITON_VERSION < (3, 9):
        return f"Triton {triton.__version__} fails to compile the kernel for compute capability 10.0, 3.9 does not"
    return None


@triton.jit
def _load_keys(
    k_ptr,  # (BLOCK_N, HEAD_DIM), the first key of a tile
    cos_ptr,  # (HEAD_DIM,) or None
    sin_ptr,  # (HEAD_DIM,) or None
    column,  # (columns,)
    real,  # (BLOCK_N,) bool
    k_stride_n,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    """Columns `column` of the two halves of `x = R^T k`, fp32 `[BLOCK_N, columns]` each; zero outside."""
    place = tl.arange(0, real.shape[0]).to(tl.int64)
    low = column < HALF
    high = column < HEAD_DIM - HALF
    at = k_ptr + ((place * k_stride_n)[:, None] + column[None])
    a = tl.load(at, mask=real[:, None] & low[None], other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=real[:, None] & high[None], other=0.0).to(tl.float32)
    if cos_ptr is not None:
        cos_a = tl.load(cos_ptr + column, mask=low, other=0.0).to(tl.float32)
        cos_b = tl.load(cos_ptr + HALF + column, mask=high, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + column, mask=low, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + HALF + column, mask=high, other=0.0).to(tl.float32)
        key = a
        a = key * cos_a[None] + b * sin_b[None]
        b = b * cos_b[None] - key * sin_a[None]
    return a, b


@triton.jit
def _expected_logits_kernel(
    k_ptr,  # (batch, NUM_KV_HEADS, num_tokens, HEAD_DIM)
    mu_ptr,  # (batch, NUM_KV_HEADS * GROUP, HEAD_DIM) fp32
    cov_ptr,  # (batch, NUM_KV_HEADS * GROUP, HEAD_DIM, HEAD_DIM) fp32, or None
    cos_ptr,  # (HEAD_DIM,) or None
    sin_ptr,  # (HEAD_DIM,) or None
    bounds_ptr,  # (batch, 2) or None
    logits_ptr,  # (batch, NUM_KV_HEADS * GROUP, num_tokens) fp32, in base 2
    peaks_ptr,  # (batch, NUM_KV_HEADS * GROUP, tiles) fp32, the maximum of a tile
    sums_ptr,  # (batch, NUM_KV_HEADS * GROUP, tiles) fp32, sum of 2^(logit - peak)
    num_tokens,
    tiles,
    sink,
    mean_scale,  # scale, in base 2
    cov_scale,  # 0.5 * scale^2, in base 2
    k_stride_b,
    k_stride_h,
    k_stride_n,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    batch_head = program // tiles
    batch, kv_head, start, stop = locate_head(batch_head, NUM_KV_HEADS, bounds_ptr, num_tokens)
    low = tile * BLOCK_N
    token = low + tl.arange(0, BLOCK_N)
    real = (token >= start + sink) & (token < stop)
    k_ptr += batch * k_stride_b + kv_head * k_stride_h + low * k_stride_n
    x_a, x_b = _load_keys(k_ptr, cos_ptr, sin_ptr, tl.arange(0, BLOCK_D), real, k_stride_n, HEAD_DIM, HALF)

    # One loop over the pieces of all heads, so that the next head's are on their way when one ends.
    PIECES: tl.constexpr = 2 * ((HALF + BLOCK_C - 1) // BLOCK_C)
    column = tl.arange(0, BLOCK_D)
    logit = tl.zeros([BLOCK_N], tl.float32)
    for step in range(GROUP * PIECES):
        head = batch_head * GROUP + step // PIECES
        piece = step % PIECES
        upper = piece >= PIECES // 2  # the rows of the second half
        in_half = (piece % (PIECES // 2)) * BLOCK_C + tl.arange(0, BLOCK_C)
        row = tl.where(upper, HALF, 0) + in_half
        ok = (in_half < HALF) & (row < HEAD_DIM)
        factor = mean_scale * tl.load(mu_ptr + head * HEAD_DIM + row, mask=ok, other=0.0)[None]
        if cov_ptr is not None:
            precision: tl.constexpr = "ieee" if IEEE else "tf32"
            at = cov_ptr + head * (HEAD_DIM * HEAD_DIM) + (row[:, None] * HEAD_DIM + column[None])
            cov_a = tl.load(at, mask=ok[:, None] & (column < HALF)[None], other=0.0)
            cov_b = tl.load(at + HALF, mask=ok[:, None] & (column < HEAD_DIM - HALF)[None], other=0.0)
            product = tl.dot(x_a, tl.trans(cov_a), input_precision=precision)
            product = tl.dot(x_b, tl.trans(cov_b), product, input_precision=precision)
            factor += cov_scale * product
        if BLOCK_C == BLOCK_D:
            x = tl.where(upper, x_b, x_a)
        else:
            a, b = _load_keys(k_ptr, cos_ptr, sin_ptr, in_half, real, k_stride_n, HEAD_DIM, HALF)
            x = tl.where(upper, b, a)
        logit += tl.sum(x * factor, 1)
        if piece == PIECES - 1:
            shown = tl.where(real, logit, float("-inf"))
            peak = tl.max(shown, 0)
            total = tl.sum(tl.exp2(shown - tl.where(peak == float("-inf"), 0.0, peak)), 0)
            tl.store(logits_ptr + head * num_tokens + token, shown, mask=token < num_tokens)
            tl.store(peaks_ptr + head * tiles + tile, peak)
            tl.store(sums_ptr + head * tiles + tile, total)
            logit = tl.zeros([BLOCK_N], tl.float32)


@triton.jit
def _expected_scores_kernel(
    logits_ptr,  # (batch, NUM_KV_HEADS * GROUP, num_tokens) fp32, in base 2
    peaks_ptr,  # (batch, NUM_KV_HEADS * GROUP, tiles) fp32
    sums_ptr,  # (batch, NUM_KV_HEADS * GROUP, tiles) fp32
    v_ptr,  # (batch, NUM_KV_HEADS, num_tokens, HEAD_DIM) or None
    bounds_ptr,  # (batch, 2) or None
    scores_ptr,  # (batch, NUM_KV_HEADS, num_tokens) fp32
    num_tokens,
    tiles,
    sink,
    epsilon,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(num_tokens, BLOCK_N)
    batch_head = program // blocks
    batch, kv_head, start, stop = locate_head(batch_head, NUM_KV_HEADS, bounds_ptr, num_tokens)
    token = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = (token >= start + sink) & (token < stop)

    # All heads of the group at once: their loads do not wait for one another.
    member = tl.arange(0, BLOCK_G)
    own = member < GROUP
    head = batch_head * GROUP + member
    logit = tl.load(
        logits_ptr + (head * num_tokens)[:, None] + token[None], mask=own[:, None] & real[None], other=float("-inf")
    )
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for chunk in range(0, tiles, BLOCK_T):
        t = chunk + tl.arange(0, BLOCK_T)
        at = (head * tiles)[:, None] + t[None]
        mask = own[:, None] & (t < tiles)[None]
        peaks = tl.load(peaks_ptr + at, mask=mask, other=float("-inf"))
        sums = tl.load(sums_ptr + at, mask=mask, other=0.0)
        higher = tl.maximum(peak, tl.max(peaks, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - base) + tl.sum(sums * tl.exp2(peaks - base[:, None]), 1)
        peak = higher
    share = tl.exp2(logit - peak[:, None]) / total[:, None]
    score = tl.sum(tl.where(own[:, None], share, 0.0), 0) / GROUP
    if v_ptr is not None:
        v_ptr += batch * v_stride_b + kv_head * v_stride_h
        v = load_tile(v_ptr, token, real, v_stride_n, HEAD_DIM, BLOCK_D).to(tl.float32)
        score = (score + epsilon) * tl.sqrt(tl.sum(v * v, 1))
    score = tl.where(real, score, tl.where((token >= start) & (token < stop), float("inf"), float("-inf")))
    tl.store(scores_ptr + batch_head * num_tokens + token, score, mask=token < num_tokens)


def forward(args: ExpectedAttentionArgs) -> Tensor:
    """Scores `[B, G, N]` in fp32."""
    k, v = rows_contiguous(args.k), None if args.v is None else rows_contiguous(args.v)
    mu, cov, bounds = args.mu.contiguous(), contiguous(args.cov), contiguous(args.bounds)
    scale, sink = args.scale, args.sink
    batch, num_kv_heads, num_tokens, head_dim = k.shape
    num_heads = mu.shape[1]
    group = num_heads // num_kv_heads
    half = (head_dim + 1) // 2
    block_d = dot_size(half)
    config = _logits_config(k, block_d)
    tiles = triton.cdiv(num_tokens, config.kwargs["BLOCK_N"])
    logits = k.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    peaks, sums = (k.new_empty(batch, num_heads, tiles, dtype=torch.float32) for _ in range(2))
    scores = k.new_empty(batch, num_kv_heads, num_tokens, dtype=torch.float32)
    launch(
        _expected_logits_kernel,
        (batch * num_kv_heads * tiles,),
        *(
            k,
            mu,
            cov,
            contiguous(args.mean_cos),
            contiguous(args.mean_sin),
            bounds,
            logits,
            peaks,
            sums,
            num_tokens,
            tiles,
            sink,
        ),
        *(scale * LOG2E.value, 0.5 * scale**2 * LOG2E.value, *k.stride()[:3]),
        configs=[config],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        HALF=half,
        IEEE=k.dtype == torch.float32,
        BLOCK_D=block_d,
    )
    block_n, block_g = 32, triton.next_power_of_2(group)
    launch(
        _expected_scores_kernel,
        (batch * num_kv_heads * triton.cdiv(num_tokens, block_n),),
        *(logits, peaks, sums, v, bounds, scores, num_tokens, tiles, sink, args.epsilon),
        *((0, 0, 0) if v is None else v.stride()[:3]),
        configs=[triton.Config({}, num_warps=4, num_stages=1)],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_N=block_n,
        BLOCK_T=min(triton.next_power_of_2(max(tiles, 1)), max(16, 2048 // block_g)),
        BLOCK_G=block_g,
        BLOCK_D=triton.next_power_of_2(head_dim),
    )
    return scores


def _logits_config(k: Tensor, block_d: int) -> triton.Config:
    """One for all shapes: keys enough to be worth the fetching of cov, pieces of cov of at most 16 KB in each half.

    Warpgroup products take 128 keys, which at N 2048 and 8 KV heads makes 128 programs; warp products hold their
    operands in registers, which 64 keys fill. Without matrix units (fp32) a product's sums are unrolled: small tiles.
    There are as many stages, up to three pieces on their way, as shared memory has room for beside the keys.
    """
    if k.dtype == torch.float32:
        return triton.Config({"BLOCK_N": 32, "BLOCK_C": min(32, block_d)}, num_warps=8, num_stages=2)
    arch, narrow = target_of(k.device).arch, block_d <= 64
    pieces = {"BLOCK_C": min(block_d, max(16, 4096 // block_d))}
    if arch in (90, 100):
        return triton.Config({"BLOCK_N": 128, **pieces}, num_warps=8, num_stages=4 if narrow else 2)
    # Above a head_dim of 128 the keys themselves take 32 KB.
    stages = 3 if narrow and arch == 80 else 2
    return triton.Config({"BLOCK_N": 64 if narrow else 32, **pieces}, num_warps=4, num_stages=stages)
