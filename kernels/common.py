"""What several kernels share: reading padded batches and tiles of rows on the device, laying tensors out on the host.

Tests: tests/kernels/test_common.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
"""log2(e): kernels take exponentials in base 2, one instruction each, of logits multiplied by it."""


# Host


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its last dimension is contiguous: kernels take any strides of the others."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor in one piece, None for None."""
    return None if tensor is None else tensor.contiguous()


def dot_size(size: int) -> int:
    """`size` rounded up to what a dimension of `tl.dot` may be: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A small table of the host on `device`, without waiting for it.

    Raises:
        RuntimeError: a CUDA graph is being captured. Its replays would copy from host memory that is long gone.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "cu_seqlens differ between sequences while a CUDA graph is captured, expected one sequence or, for "
            "attention_pool, sequences of one length: other offsets are copied to the device in every call"
        )
    return table.to(device, non_blocking=True)


# Device: the real tokens of a padded batch, read there so that nothing waits for the host


@triton.jit
def load_bounds(
    bounds_ptr,  # (batch, 2) int32 or int64, contiguous; None: every token is real
    batch,
    num_tokens,
):
    """First real token of sequence `batch` and the end of its real tokens: int64, 0 <= start <= stop <= num_tokens."""
    # Not num_tokens.to(...): a runtime argument of value 1 arrives as a compile-time constant, which has no such
    # method.
    total = tl.zeros([], tl.int64) + num_tokens
    if bounds_ptr is None:
        return tl.zeros([], tl.int64), total
    else:
        start = tl.load(bounds_ptr + 2 * batch).to(tl.int64)
        stop = tl.load(bounds_ptr + 2 * batch + 1).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), total)
        return start, tl.maximum(tl.minimum(stop, total), start)


@triton.jit
def locate_head(
    batch_head,  # number of a KV head, counted over the batch
    num_kv_heads,
    bounds_ptr,  # (batch, 2) or None
    num_tokens,
):
    """Its sequence, its number in the sequence, and the sequence's first real token and end, int64."""
    batch = batch_head // num_kv_heads
    start, stop = load_bounds(bounds_ptr, batch, num_tokens)
    return batch, batch_head % num_kv_heads, start, stop


@triton.jit
def force(scores, token, start, stop, sink, window):
    """+inf for the first `sink` and the last `window` tokens of `[start, stop)`, -inf outside of it."""
    forced = (token - start < sink) | (token >= stop - window)
    scores = tl.where(forced, float("inf"), scores)
    return tl.where((token >= start) & (token < stop), scores, float("-inf"))


# Device: tiles of rows


@triton.jit
def load_tile(
    ptr,  # (num_rows, HEAD_DIM), rows `stride` elements apart
    row,  # (BLOCK,)
    row_ok,  # (BLOCK,) bool
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of a tensor, `[BLOCK, BLOCK_D]` in its dtype; zeros where `row_ok` is false and beyond HEAD_DIM."""
    dim = tl.arange(0, BLOCK_D)
    pointers = ptr + (row * stride)[:, None] + dim[None]
    return tl.load(pointers, mask=row_ok[:, None] & (dim < HEAD_DIM)[None], other=0.0)


@triton.jit
def store_tile(
    ptr,  # (num_rows, HEAD_DIM), rows `stride` elements apart
    row,  # (BLOCK,)
    row_ok,  # (BLOCK,) bool
    stride,
    tile,  # (BLOCK, BLOCK_D)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store rows of a tensor where `row_ok`, rounded to its dtype."""
    dim = tl.arange(0, BLOCK_D)
    pointers = ptr + (row * stride)[:, None] + dim[None]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=row_ok[:, None] & (dim < HEAD_DIM)[None])


@triton.jit
def load_rows(
    ptr,
    offset,  # (BLOCK,) int64, elements from `ptr` to the beginning of each row
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows that all exist, `[BLOCK, BLOCK_D]`, zero beyond HEAD_DIM.

    A tile that reaches beyond the last row repeats one, rather than be zero there: 0 * inf is NaN.
    """
    dim = tl.arange(0, BLOCK_D)
    pointers = ptr + offset[:, None] + dim[None]
    if HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=(dim < HEAD_DIM)[None], other=0.0)
    return tl.load(pointers)


@triton.jit
def dot_rows(
    a_ptr,
    a_offset,  # (BLOCK_A,) int64, as in load_rows
    b_ptr,
    b_offset,  # (BLOCK_B,) int64
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`a @ b.T` of fp32 rows, `[BLOCK_A, BLOCK_B]`.

    No tensor core multiplies fp32 exactly, and without one all sums of a product are unrolled: 32 columns at a time.
    """
    BLOCK: tl.constexpr = 32 if BLOCK_D > 32 else BLOCK_D
    acc = tl.zeros([a_offset.shape[0], b_offset.shape[0]], tl.float32)
    for d in range(0, HEAD_DIM, BLOCK):
        dim = d + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + a_offset[:, None] + dim[None], mask=(dim < HEAD_DIM)[None], other=0.0)
        b = tl.load(b_ptr + b_offset[:, None] + dim[None], mask=(dim < HEAD_DIM)[None], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc
