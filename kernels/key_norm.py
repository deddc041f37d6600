"""key_norm: the negative Euclidean norm of every cached key.

Specification: `condense_core.ops.reference.key_norm`.

Reads k once (B*G*N*D elements) and writes B*G*N scores in fp32. Two operations per element: bound by memory. A program
takes BLOCK_N tokens of one head, 8 KiB of 16-bit keys, which every thread loads 16 bytes at a time, all loads before
the first use. Small programs fill the GPU on a short context (512 of them at 2,048 tokens and 8 heads) and on a long
one keep several per multiprocessor, whose loads cover each other's latency.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from condense_core.kernels.bounds import force, load_bounds
from condense_core.kernels.launch import launch

# Elements of a program's tile: 32 per thread with 128 threads.
_TILE = 4096


def unsupported(k: Tensor, *_: object) -> str | None:
    """Why the kernel cannot take these, or None."""
    if triton.next_power_of_2(k.shape[3]) > _TILE:
        return f"head_dim is {k.shape[3]}, more than the {_TILE} elements of a tile"
    return None


@triton.jit
def _key_norm_kernel(
    k_ptr,  # (batch, num_heads, num_tokens, HEAD_DIM)
    bounds_ptr,  # (batch, 2) or None
    out_ptr,  # (batch, num_heads, num_tokens) fp32
    num_tokens,
    num_heads,
    stride_b,
    stride_h,
    stride_n,
    sink,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(num_tokens, BLOCK_N)
    head = (tl.program_id(0) // tiles).to(tl.int64)  # counted over the batch
    token = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = head // num_heads
    start, stop = load_bounds(bounds_ptr, b, num_tokens)

    dim = tl.arange(0, BLOCK_D)
    real = (token >= start) & (token < stop)
    row = k_ptr + b * stride_b + (head % num_heads) * stride_h + token * stride_n
    k = tl.load(row[:, None] + dim[None], mask=real[:, None] & (dim < HEAD_DIM)[None], other=0.0).to(tl.float32)
    scores = force(-tl.sqrt_rn(tl.sum(k * k, 1)), token, start, stop, sink, window)
    tl.store(out_ptr + head * num_tokens + token, scores, mask=token < num_tokens)


def forward(k: Tensor, sink: int, window: int, bounds: Tensor | None) -> Tensor:
    """`[B, G, N, D] -> [B, G, N]` fp32."""
    k = k if k.stride(3) == 1 else k.contiguous()
    batch, heads, tokens, head_dim = k.shape
    scores = k.new_empty(batch, heads, tokens, dtype=torch.float32)
    block_d = triton.next_power_of_2(head_dim)
    block_n = _TILE // block_d
    launch(
        _key_norm_kernel,
        (batch * heads * triton.cdiv(tokens, block_n),),
        *(k, None if bounds is None else bounds.contiguous(), scores),
        *(tokens, heads, k.stride(0), k.stride(1), k.stride(2), sink, window),
        configs=[triton.Config({}, num_warps=4, num_stages=1)],
        HEAD_DIM=head_dim,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
    )
    return scores
