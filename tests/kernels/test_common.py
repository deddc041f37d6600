"""What kernels share (kernels/common.py): bounds of padded batches, tiles of rows, layouts."""

import pytest
import torch
import triton
import triton.language as tl

from condense_core.kernels.common import (
    contiguous,
    dot_rows,
    dot_size,
    force,
    load_bounds,
    load_rows,
    load_tile,
    locate_head,
    rows_contiguous,
    store_tile,
)
from condense_core.ops.reference.padding import real_tokens

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLACES = st.one_of(st.integers(-5, 45), st.sampled_from([-(2**31), 2**31 - 1]))


@triton.jit
def _bounds_kernel(
    bounds_ptr,  # (batch, 2) or None
    out_ptr,  # (batch, 2) int64
    num_tokens,
):
    batch = tl.program_id(0)
    start, stop = load_bounds(bounds_ptr, batch, num_tokens)
    tl.store(out_ptr + 2 * batch, start)
    tl.store(out_ptr + 2 * batch + 1, stop)


@settings(max_examples=30, deadline=None)
@given(
    bounds=st.lists(st.tuples(PLACES, PLACES), min_size=1, max_size=4),
    num_tokens=st.integers(0, 40),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_bounds_are_those_of_the_reference(
    bounds: list[tuple[int, int]], num_tokens: int, index_dtype: torch.dtype
) -> None:
    on_device = torch.tensor(bounds, dtype=index_dtype, device=DEVICE)
    out = torch.full((len(bounds), 2), -1, device=DEVICE)
    _bounds_kernel[(len(bounds),)](on_device, out, num_tokens)
    start, stop = real_tokens(on_device, len(bounds), num_tokens, DEVICE)
    assert torch.equal(out, torch.cat([start, stop], 1).long())


@pytest.mark.parametrize("num_tokens", [0, 1, 40])  # 1 arrives as a compile-time constant
def test_without_bounds_every_token_is_real(num_tokens: int) -> None:
    out = torch.full((2, 2), -1, device=DEVICE)
    _bounds_kernel[(2,)](None, out, num_tokens)
    assert out.tolist() == [[0, num_tokens]] * 2


@triton.jit
def _force_kernel(
    bounds_ptr,  # (batch, 2)
    out_ptr,  # (batch, num_kv_heads, 32) fp32
    num_kv_heads,
    num_tokens,
    sink,
    window,
):
    batch_head = tl.program_id(0)
    batch, kv_head, start, stop = locate_head(batch_head, num_kv_heads, bounds_ptr, num_tokens)
    token = tl.arange(0, 32)
    scores = tl.zeros([32], tl.float32) + 10 * batch + kv_head
    tl.store(out_ptr + batch_head * 32 + token, force(scores, token, start, stop, sink, window))


def test_forced_tokens_and_padding() -> None:
    bounds = torch.tensor([[2, 9], [0, 3]], device=DEVICE)
    out = torch.zeros(2, 3, 32, device=DEVICE)
    _force_kernel[(6,)](bounds, out, 3, 32, 2, 1)
    inf = float("inf")
    for head in range(3):
        assert out[0, head].tolist() == [-inf] * 2 + [inf] * 2 + [float(head)] * 4 + [inf] + [-inf] * 23
        assert out[1, head].tolist() == [inf] * 3 + [-inf] * 29


@triton.jit
def _copy_kernel(
    x_ptr,  # (rows, HEAD_DIM)
    out_ptr,  # (rows, HEAD_DIM)
    rows,
    x_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.arange(0, 8)
    tile = load_tile(x_ptr, row, row < rows, x_stride, HEAD_DIM, BLOCK_D)
    store_tile(out_ptr, row, row < rows, HEAD_DIM, 2.0 * tile, HEAD_DIM, BLOCK_D)


def test_a_tile_is_read_and_written_where_it_exists() -> None:
    x = torch.randn(8, 9, device=DEVICE)
    x[5:] = x[:, 6:] = float("nan")
    out = torch.zeros(8, 6, dtype=torch.float16, device=DEVICE)
    _copy_kernel[(1,)](x, out, 5, 9, HEAD_DIM=6, BLOCK_D=8)
    assert torch.equal(out[:5], (2 * x[:5, :6]).half())
    assert out[5:].eq(0).all()


@triton.jit
def _products_kernel(
    a_ptr,  # (16, HEAD_DIM) fp32
    out_ptr,  # (2, 16, 16) fp32
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.arange(0, 16)
    offset = row.to(tl.int64) * HEAD_DIM
    a = load_rows(a_ptr, offset, HEAD_DIM, BLOCK_D)
    place = out_ptr + row[:, None] * 16 + row[None]
    tl.store(place, tl.dot(a, tl.trans(a), input_precision="ieee"))
    tl.store(place + 256, dot_rows(a_ptr, offset, a_ptr, offset, HEAD_DIM, BLOCK_D))


@pytest.mark.parametrize("head_dim", [5, 16, 40, 64])
def test_products_of_rows(head_dim: int) -> None:
    a = torch.randn(16, head_dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = torch.full((2, 16, 16), float("nan"), device=DEVICE)
    _products_kernel[(1,)](a, out, HEAD_DIM=head_dim, BLOCK_D=dot_size(head_dim))
    for product in out:
        torch.testing.assert_close(product, (a.double() @ a.double().t()).float(), atol=1e-5, rtol=1e-5)


def test_layouts() -> None:
    x = torch.randn(4, 6)
    assert rows_contiguous(x[::2]).data_ptr() == x.data_ptr(), "rows may have any stride"
    assert rows_contiguous(x[:, ::2]).stride() == (3, 1)
    assert contiguous(None) is None
    assert contiguous(x[::2]).is_contiguous()
    assert [dot_size(size) for size in (1, 16, 17, 80, 128)] == [16, 16, 32, 128, 128]
