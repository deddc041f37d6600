"""ragged_decode_attention on Triton: kernels/ragged_decode_attention.py against the specification in ops/reference.

And what its single launch rests on: counters left at zero, partial sums in slots of their own, any order of arrival.
"""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import ragged_decode_attention as kernel
from condense_core.kernels.launch import INTERPRETED, TARGETS, record, target_of
from condense_core.ops import reference
from condense_core.ops.arguments import RaggedDecodeAttentionArgs

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")

# Against the fp32 reference on the same inputs; outputs are averages of normal values, of order 1. fp32: another order
# of summation over some hundred terms. 16 bits: the kernel rounds the weights before it multiplies them with V, half a
# unit in the last place (2^-12, 2^-9) of values up to 4, and both round the output.
TOLERANCES = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float16: {"atol": 1e-3, "rtol": 2**-10},
    torch.bfloat16: {"atol": 8e-3, "rtol": 2**-7},
}

# In the interpreter, which counts 3 multiprocessors, 6 programs share tiles of 64 rows: heads inside one share, one
# head in all shares, heads that end where a share ends, fewer tiles than programs, empty heads at every place.
KEPT = [
    pytest.param([1], id="one-token"),
    pytest.param([400], id="one-head-in-all-shares"),
    pytest.param([64] * 12, id="shares-end-with-heads"),
    pytest.param([280, 500], id="two-split-heads-in-one-share"),
    pytest.param([5, 3], id="fewer-tiles-than-programs"),
    pytest.param([0, 130, 0, 0, 7, 64, 1, 0], id="empty-heads"),
    pytest.param([0, 0], id="nothing"),
    pytest.param([700, 3, 65, 0, 129, 2], id="ragged"),
]


def draw(
    kept: list[int],
    *,
    batch: int = 1,
    group: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    room: list[int] | None = None,
    seed: int = 0,
) -> RaggedDecodeAttentionArgs:
    """Arguments of the op. With `room`, so many rows of NaN follow the valid rows of each head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    ends = [0, *itertools.accumulate(n + extra for n, extra in zip(kept, room or [0] * len(kept), strict=True))]
    k, v = normal(ends[-1], head_dim), normal(ends[-1], head_dim)
    for start, n, stop in zip(ends, kept, ends[1:], strict=False):
        k[start + n : stop] = v[start + n : stop] = NAN
    return RaggedDecodeAttentionArgs(
        q=2 * normal(batch, group * len(kept) // batch, head_dim),
        k=k,
        v=v,
        cu_seqlens=torch.tensor(ends, device=DEVICE),
        lengths=None if room is None else torch.tensor(kept, device=DEVICE),
        scale=head_dim**-0.5,
    )


def check(args: RaggedDecodeAttentionArgs) -> Tensor:
    """The kernel's output, after it was found right."""
    out, expected = kernel.forward(args), reference.ragged_decode_attention(*args)
    assert out.dtype == args.q.dtype
    torch.testing.assert_close(out, expected, **TOLERANCES[out.dtype], equal_nan=True)
    return out


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Partial sums, filled with NaN before each launch so that a slot unwritten shows, and counters."""
    seen: list[tuple[Tensor, Tensor]] = []
    launch: Callable[..., None] = kernel.launch

    def spying(jit: Any, grid: Any, *args: Any, **options: Any) -> None:
        values = dict(zip(jit.arg_names, args, strict=False))
        values["partial_ptr"].fill_(NAN)
        seen.append((values["partial_ptr"], values["counters_ptr"]))
        launch(jit, grid, *args, **options)

    monkeypatch.setattr(kernel, "launch", spying)
    return seen


@pytest.mark.parametrize("kept", KEPT)
def test_shares_of_tiles(kept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slot of a partial sum that is read was written, and counters are left at zero."""
    seen = spy(monkeypatch)
    assert check(draw(kept)).isfinite().all()
    assert seen[0][1].eq(0).all()


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"batch": 2, "heads": 3, "group": 1, "head_dim": 64}, id="mha"),
        pytest.param({"batch": 3, "heads": 1, "group": 8, "head_dim": 80}, id="mqa-head_dim-80"),
        pytest.param({"batch": 1, "heads": 2, "group": 5, "head_dim": 128}, id="a-group-of-five"),
        pytest.param({"batch": 1, "heads": 1, "group": 16, "head_dim": 256}, id="the-most-accumulators"),
        pytest.param({"batch": 2, "heads": 1, "group": 20, "head_dim": 40}, id="a-group-above-16"),
        pytest.param({"batch": 1, "heads": 3, "group": 4, "head_dim": 8}, id="head_dim-8"),
    ],
)
def test_shapes(shape: dict[str, int], dtype: torch.dtype) -> None:
    batch, heads = shape["batch"], shape["heads"]
    kept = [(37 * n + 90) % 150 for n in range(batch * heads)]
    check(draw(kept, batch=batch, group=shape["group"], head_dim=shape["head_dim"], dtype=dtype))


@settings(max_examples=15, deadline=None)
@given(
    kept=st.lists(st.integers(0, 160), min_size=1, max_size=6),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    room=st.lists(st.integers(0, 30), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_any_lengths(kept: list[int], group: int, head_dim: int, room: list[int], seed: int) -> None:
    check(draw(kept, group=group, head_dim=head_dim, room=room[: len(kept)], seed=seed))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_rows_beyond_the_lengths_are_never_read(index_dtype: torch.dtype) -> None:
    args = draw([70, 0, 33, 1], room=[60, 5, 0, 200])
    args = args._replace(cu_seqlens=args.cu_seqlens.to(index_dtype), lengths=args.lengths.to(index_dtype))
    assert check(args).isfinite().all()


def test_lengths_are_cut_to_the_room() -> None:
    args = draw([70, 20, 33], room=[0, 0, 0])
    args = args._replace(lengths=torch.tensor([1000, -5, 2**31 - 1], device=DEVICE))
    assert check(args)[0, 2:4].eq(0).all()


@pytest.mark.parametrize(
    "offsets",
    [
        pytest.param([-7, 40, 500, 60], id="outside-on-both-sides"),
        pytest.param([90, 10, 70, 2**40], id="far-beyond-the-end"),
        pytest.param([-(2**40), -1, -1, 90], id="far-before-the-beginning"),
        pytest.param([500, 600, 700, 800], id="all-beyond-the-end"),
        pytest.param([30, 30, 5, 0], id="descending"),
    ],
)
def test_no_offset_makes_it_read_outside(offsets: list[int]) -> None:
    args = draw([30, 30, 30])
    inside = {}
    for name in ("k", "v"):
        around = torch.full((90 + 2 * 600, 16), NAN, device=DEVICE)
        around[600:690] = getattr(args, name)
        inside[name] = around[600:690]
    args = args._replace(**inside, cu_seqlens=torch.tensor(offsets, device=DEVICE))
    assert check(args).isfinite().all()


def test_strides() -> None:
    args = draw([100, 0, 65, 30], batch=2, head_dim=24)
    tokens, width = args.k.shape
    both = torch.randn(tokens, 3, width, device=DEVICE)  # keys and values of a token side by side
    fused = torch.randn(2, 7, width + 5, device=DEVICE)
    columns = torch.randn(width, tokens, device=DEVICE)
    offsets = torch.stack([args.cu_seqlens] * 2, 1)
    check(args._replace(k=both[:, 0], v=both[:, 2], q=fused[:, 2:6, 3:-2], cu_seqlens=offsets[:, 1]))
    check(args._replace(k=columns.t(), q=torch.randn(2, width, 4, device=DEVICE).transpose(1, 2)))


@pytest.mark.parametrize("scale", [60.0, -3.0, 0.0])
def test_any_scale(scale: float, dtype: torch.dtype) -> None:
    check(draw([200, 90], dtype=dtype)._replace(scale=scale))


def test_infinite_keys() -> None:
    """A share may hold nothing but -inf: its weight is 0, not NaN. A head of nothing else is NaN, as in softmax."""
    args = draw([300, 90, 40], group=1)
    args.q.abs_()
    args.k[:200] = args.k[300:390] = -INF
    out = check(args)
    assert out[0, [0, 2]].isfinite().all()
    assert out[0, 1].isnan().all()


def test_nan_stays_in_its_head_and_its_query() -> None:
    args = draw([100, 200, 30])
    args.k[150] = args.q[0, 4] = NAN
    out = check(args)
    assert out[0, 2:5].isnan().all()
    assert out[0, [0, 1, 5]].isfinite().all()


def test_many_heads_are_searched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [0, 0, 0, 0, 90, 0, 3, 40, 0, 0, 70, 1, 0, 0, 0, 0, 0, 33, 5, 0, 0]
    args = draw(kept, room=[(5 * n) % 7 for n in range(len(kept))])
    expected = check(args)
    monkeypatch.setattr(kernel, "_BLOCK_S", 4)
    assert torch.equal(check(args), expected)


@pytest.mark.usefixtures("triton_backend")
def test_through_the_public_op(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    args = draw([40, 7], room=[8, 0])
    out = ops.ragged_decode_attention(*args[:4], lengths=args.lengths, scale=args.scale)
    torch.testing.assert_close(out, reference.ragged_decode_attention(*args), **TOLERANCES[torch.float32])
    assert len(seen) == 1


@pytest.mark.skipif(not INTERPRETED, reason="a GPU chooses the order itself")
@pytest.mark.parametrize("kept", KEPT)
def test_the_order_of_arrival_does_not_change_a_bit(kept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program runs to its end before the next begins: of the interleavings these are the orders of arrival."""
    from triton.runtime import interpreter

    seen = spy(monkeypatch)
    args = draw(kept, group=1)
    expected = check(args)
    assert expected.isfinite().all()
    place = interpreter.interpreter_builder.set_grid_idx
    programs = len(seen[0][1])
    orders = [reversed(range(programs)), *(random.Random(seed).sample(range(programs), programs) for seed in (1, 2))]
    for order in map(list, orders):
        monkeypatch.setattr(
            interpreter.interpreter_builder, "set_grid_idx", lambda x, y, z, order=order: place(order[x], y, z)
        )
        assert torch.equal(kernel.forward(args), expected)
        assert seen[-1][1].eq(0).all()


def test_the_same_bits_every_time() -> None:
    args = draw([300, 20, 90], dtype=torch.float16)
    first = kernel.forward(args)
    assert all(torch.equal(kernel.forward(args), first) for _ in range(1 if INTERPRETED else 100))


def test_one_launch_whose_grid_knows_only_the_gpu() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with record(TARGETS[90]) as launches:
        for kept in (10, 5000):
            kernel.forward(
                RaggedDecodeAttentionArgs(
                    q=meta(1, 32, 128),
                    k=meta(8 * kept, 128),
                    v=meta(8 * kept, 128),
                    cu_seqlens=meta(9, dtype=torch.int32),
                    lengths=None,
                    scale=0.1,
                )
            )
    assert [launch.grid for launch in launches] == [(2 * TARGETS[90].num_sms,)] * 2
    assert launches[0].constexprs == launches[1].constexprs


@pytest.mark.parametrize(
    ("group", "head_dim", "reason"),
    [
        (16, 256, None),
        (32, 256, None),
        (64, 128, None),
        (1, 257, "head_dim is 257, more than 256"),
        (33, 256, "33 query heads of 256 per KV head exceed the 8192 accumulators of a program"),
    ],
)
def test_what_is_not_supported(group: int, head_dim: int, reason: str | None) -> None:
    assert kernel.unsupported(draw([1], group=group, head_dim=head_dim)) == reason


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
class TestOnAGPU:
    def test_a_graph_is_replayed_as_the_caches_grow(self) -> None:
        args = draw([900, 40, 0, 2000], room=[500, 0, 700, 3], dtype=torch.float16)
        args.k.nan_to_num_()
        args.v.nan_to_num_()
        kernel.forward(args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [kernel.forward(args) for _ in range(3)]
        for _ in range(20):
            args.lengths.add_(torch.tensor([17, 0, 1, 0], device=DEVICE))
            graph.replay()
            eager = check(args)
            assert all(torch.equal(out, eager) for out in outs)

    def test_streams_do_not_disturb_each_other(self) -> None:
        args = draw([9000, 400, 30_000, 12], head_dim=128, dtype=torch.float16)
        expected = check(args)
        streams = [torch.cuda.Stream() for _ in range(4)]
        torch.cuda.synchronize()
        outs = []
        for _ in range(50):
            for stream in streams:
                with torch.cuda.stream(stream):
                    outs.append(kernel.forward(args))
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out in outs)

    def test_every_multiprocessor_gets_programs(self) -> None:
        args = draw([50, 6000, 1, 0, 800, 3], group=4, head_dim=128, dtype=torch.bfloat16)
        assert target_of(DEVICE).num_sms > 1
        check(args)
