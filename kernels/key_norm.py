"""key_norm: the negative Euclidean norm of every cached key.

    score_i = -||k_i||_2;   +inf for the first `sink` and the last `window` real tokens, -inf for padding

Reads k once, B*G*N*D elements, and writes B*G*N scores, 4 bytes each. Two operations per element: bound by memory.

A program takes BLOCK_N tokens of one head, 8 KiB of 16-bit keys, of which every thread loads 16 bytes at a time, all of
them before the first use. Such small programs fill a GPU even on a short context (512 of them at 2,048 tokens and 8
heads); on a long one several share a multiprocessor, and while one waits for memory another computes.

Reference: condense_core/ops/reference/key_norm.py. Tests: tests/kernels/test_key_norm.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.common import contiguous, force, load_tile, locate_head, rows_contiguous
from condense_core.kernels.launch import launch
from condense_core.ops.arguments import KeyNormArgs

# Elements of a program's tile: 32 per thread with 128 threads.
_TILE = 4096


def unsupported(args: KeyNormArgs) -> str | None:
    """Why the kernel cannot take these, or None."""
    head_dim = args.k.shape[3]
    if triton.next_power_of_2(head_dim) > _TILE:
        return f"head_dim is {head_dim}, more than the {_TILE} elements of a tile"
    return None


@triton.jit
def _key_norm_kernel(
    k_ptr,  # (batch, num_kv_heads, num_tokens, HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    scores_ptr,  # (batch, num_kv_heads, num_tokens) fp32
    num_tokens,
    num_kv_heads,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    sink,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(num_tokens, BLOCK_N)
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, kv_head, start, stop = locate_head(batch_head, num_kv_heads, bounds_ptr, num_tokens)

    real = (token >= start) & (token < stop)
    k_ptr += batch * k_stride_b + kv_head * k_stride_h
    k = load_tile(k_ptr, token, real, k_stride_n, HEAD_DIM, BLOCK_D).to(tl.float32)
    scores = force(-tl.sqrt_rn(tl.sum(k * k, 1)), token, start, stop, sink, window)
    tl.store(scores_ptr + batch_head * num_tokens + token, scores, mask=token < num_tokens)


def forward(args: KeyNormArgs) -> Tensor:
    """Scores `[B, G, N]` fp32."""
    k = rows_contiguous(args.k)
    batch, num_kv_heads, num_tokens, head_dim = k.shape
    scores = k.new_empty(batch, num_kv_heads, num_tokens, dtype=torch.float32)
    block_d = triton.next_power_of_2(head_dim)
    block_n = _TILE // block_d
    launch(
        _key_norm_kernel,
        (batch * num_kv_heads * triton.cdiv(num_tokens, block_n),),
        *(k, contiguous(args.bounds), scores, num_tokens, num_kv_heads, *k.stride()[:3], args.sink, args.window),
        configs=[triton.Config({}, num_warps=4, num_stages=1)],
        HEAD_DIM=head_dim,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
    )
    return scores
