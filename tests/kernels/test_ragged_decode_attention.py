"""The ragged_decode_attention kernel against the specification, and what its single launch rests on."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condense_core import ops
from condense_core.kernels import ragged_decode_attention as kernel
from condense_core.kernels.launch import INTERPRETED, TARGETS, record, target_of
from condense_core.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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
) -> dict[str, Any]:
    """Arguments of the kernel. With `room`, so many rows of NaN follow the valid rows of each head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    ends = [0, *itertools.accumulate(n + extra for n, extra in zip(kept, room or [0] * len(kept), strict=True))]
    k, v = normal(ends[-1], head_dim), normal(ends[-1], head_dim)
    for start, n, stop in zip(ends, kept, ends[1:], strict=False):
        k[start + n : stop] = v[start + n : stop] = float("nan")
    return {
        "q": 2 * normal(batch, group * len(kept) // batch, head_dim),
        "k": k,
        "v": v,
        "cu_seqlens": torch.tensor(ends, device=DEVICE),
        "lengths": None if room is None else torch.tensor(kept, device=DEVICE),
        "scale": head_dim**-0.5,
    }


def check(arguments: dict[str, Any]) -> Tensor:
    out, expected = kernel.forward(**arguments), reference.ragged_decode_attention(**arguments)
    assert out.dtype == arguments["q"].dtype
    torch.testing.assert_close(out, expected, **TOLERANCES[out.dtype], equal_nan=True)
    return out


@pytest.mark.parametrize("kept", KEPT)
def test_matches_the_specification(kept: list[int], dtype: torch.dtype) -> None:
    check(draw(kept, dtype=dtype))


# What serves: MHA, MQA, groups of no power of two and above 16; widths of no power of two, above 128, below 16.
@pytest.mark.parametrize(
    ("batch", "heads", "group", "head_dim"),
    [(2, 3, 1, 64), (3, 1, 8, 80), (1, 2, 5, 128), (1, 1, 16, 256), (2, 1, 20, 40), (1, 3, 4, 8)],
)
def test_shapes(batch: int, heads: int, group: int, head_dim: int, dtype: torch.dtype) -> None:
    kept = [(37 * n + 90) % 150 for n in range(batch * heads)]
    check(draw(kept, batch=batch, group=group, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_beyond_the_lengths_are_never_read(index_dtype: torch.dtype) -> None:
    arguments = draw([70, 0, 33, 1], room=[60, 5, 0, 200])
    arguments["cu_seqlens"] = arguments["cu_seqlens"].to(index_dtype)
    arguments["lengths"] = arguments["lengths"].to(index_dtype)
    assert check(arguments).isfinite().all()


def test_lengths_are_cut_to_the_room() -> None:
    arguments = draw([70, 20, 33], room=[0, 0, 0])
    arguments["lengths"] = torch.tensor([1000, -5, 2**31 - 1], device=DEVICE)
    assert check(arguments)[0, 2:4].eq(0).all()


@pytest.mark.parametrize(
    "offsets", [[-7, 40, 500, 60], [90, 10, 70, 2**40], [-(2**40), -1, -1, 90], [500, 600, 700, 800], [30, 30, 5, 0]]
)
def test_no_offset_makes_it_read_outside(offsets: list[int]) -> None:
    arguments = draw([30, 30, 30])
    for name in "kv":
        around = torch.full((90 + 2 * 600, 16), float("nan"), device=DEVICE)
        around[600:690] = arguments[name]
        arguments[name] = around[600:690]
    arguments["cu_seqlens"] = torch.tensor(offsets, device=DEVICE)
    assert check(arguments).isfinite().all()


def test_strides() -> None:
    arguments = draw([100, 0, 65, 30], batch=2, head_dim=24)
    tokens, width = arguments["k"].shape
    both = torch.randn(tokens, 3, width, device=DEVICE)  # keys and values of a token side by side
    fused = torch.randn(2, 7, width + 5, device=DEVICE)
    columns = torch.randn(width, tokens, device=DEVICE)
    offsets = torch.stack([arguments["cu_seqlens"]] * 2, 1)
    check(arguments | {"k": both[:, 0], "v": both[:, 2], "q": fused[:, 2:6, 3:-2], "cu_seqlens": offsets[:, 1]})
    check(arguments | {"k": columns.t(), "q": torch.randn(2, width, 4, device=DEVICE).transpose(1, 2)})


def test_sharp_and_flat_softmax(dtype: torch.dtype) -> None:
    arguments = draw([300, 90], dtype=dtype)
    check(arguments | {"scale": 60.0})
    check(arguments | {"scale": -3.0})
    check(arguments | {"scale": 0.0})


def test_infinite_keys() -> None:
    """A share may hold nothing but -inf: its weight is 0, not NaN. A head of nothing else is NaN, as in softmax."""
    arguments = draw([300, 90, 40], group=1)
    arguments["q"].abs_()
    arguments["k"][:200] = float("-inf")
    arguments["k"][300:390] = float("-inf")
    out = check(arguments)
    assert out[0, [0, 2]].isfinite().all()
    assert out[0, 1].isnan().all()


def test_nan_stays_in_its_head_and_its_query() -> None:
    arguments = draw([100, 200, 30])
    arguments["k"][150] = float("nan")
    arguments["q"][0, 4] = float("nan")
    out = check(arguments)
    assert out[0, 2:5].isnan().all()
    assert out[0, [0, 1, 5]].isfinite().all()


def test_many_heads_are_searched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [0, 0, 0, 0, 90, 0, 3, 40, 0, 0, 70, 1, 0, 0, 0, 0, 0, 33, 5, 0, 0]
    arguments = draw(kept, room=[(5 * n) % 7 for n in range(len(kept))])
    expected = check(arguments)
    monkeypatch.setattr(kernel, "_BLOCK_S", 4)
    assert torch.equal(check(arguments), expected)


@settings(max_examples=10, deadline=None)
@given(kept=st.lists(st.integers(0, 160), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_lengths(kept: list[int], seed: int) -> None:
    check(draw(kept, group=1, room=[(seed + n) % 30 for n in range(len(kept))], seed=seed))


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Partial sums, filled with NaN before each launch so that a slot unwritten shows, and counters."""
    seen: list[tuple[Tensor, Tensor]] = []
    launch: Callable[..., None] = kernel.launch

    def spying(jit: Any, grid: Any, *args: Any, **options: Any) -> None:
        values = dict(zip(jit.arg_names, args, strict=False))
        values["partial_ptr"].fill_(float("nan"))
        seen.append((values["partial_ptr"], values["counters_ptr"]))
        launch(jit, grid, *args, **options)

    monkeypatch.setattr(kernel, "launch", spying)
    return seen


def test_through_the_public_op(triton_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    arguments = draw([40, 7], room=[8, 0])
    positional = [arguments.pop(name) for name in ("q", "k", "v", "cu_seqlens")]
    expected = reference.ragged_decode_attention(*positional, **arguments)
    out = ops.ragged_decode_attention(*positional, **arguments)
    torch.testing.assert_close(out, expected, **TOLERANCES[torch.float32])
    assert len(seen) == 1


@pytest.mark.parametrize("kept", KEPT)
def test_counters_are_left_at_zero_and_every_slot_read_was_written(
    kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spy(monkeypatch)
    assert check(draw(kept)).isfinite().all()
    assert seen[0][1].eq(0).all()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU chooses the order itself")
@pytest.mark.parametrize("kept", KEPT)
def test_the_order_of_arrival_does_not_change_a_bit(kept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program runs to its end before the next begins: of the interleavings these are the orders of arrival."""
    from triton.runtime import interpreter

    seen = spy(monkeypatch)
    arguments = draw(kept, group=1)
    expected = check(arguments)
    place = interpreter.interpreter_builder.set_grid_idx
    programs = len(seen[0][1])
    for seed in range(4):
        order = random.Random(seed).sample(range(programs), programs) if seed else list(reversed(range(programs)))
        monkeypatch.setattr(
            interpreter.interpreter_builder, "set_grid_idx", lambda x, y, z, order=order: place(order[x], y, z)
        )
        assert torch.equal(kernel.forward(**arguments), expected)
        assert seen[-1][1].eq(0).all()


def test_the_same_bits_every_time() -> None:
    arguments = draw([500, 20, 90], dtype=torch.float16)
    first = kernel.forward(**arguments)
    assert all(torch.equal(kernel.forward(**arguments), first) for _ in range(3 if INTERPRETED else 100))


def test_one_launch_whose_grid_knows_only_the_gpu() -> None:
    with record(TARGETS[90]) as launches:
        for kept in (10, 5000):
            shapes = [(1, 32, 128), (8 * kept, 128), (8 * kept, 128)]
            q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
            kernel.forward(q, k, v, torch.empty(9, dtype=torch.int32, device="meta"), None, 0.1)
    assert [launch.grid for launch in launches] == [(2 * TARGETS[90].num_sms,)] * 2
    assert launches[0].constexprs == launches[1].constexprs


def test_what_is_not_supported() -> None:
    def reason(heads: int, head_dim: int) -> str | None:
        rows = torch.empty(0, head_dim)
        return kernel.unsupported(torch.empty(1, heads, head_dim), rows, rows, torch.zeros(2, dtype=torch.int32))

    assert reason(16, 256) is reason(32, 256) is reason(64, 128) is None
    assert reason(1, 257) == "head_dim is 257, more than 256"
    assert reason(33, 256) == "33 query heads of 256 per KV head exceed the 8192 accumulators of a program"


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
class TestOnAGPU:
    def test_a_graph_is_replayed_as_the_caches_grow(self) -> None:
        arguments = draw([900, 40, 0, 2000], room=[500, 0, 700, 3], dtype=torch.float16)
        arguments["k"].nan_to_num_()
        arguments["v"].nan_to_num_()
        kernel.forward(**arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [kernel.forward(**arguments) for _ in range(3)]
        for _ in range(20):
            arguments["lengths"] += torch.tensor([17, 0, 1, 0], device=DEVICE)
            graph.replay()
            eager = check(arguments)
            assert all(torch.equal(out, eager) for out in outs)

    def test_streams_do_not_disturb_each_other(self) -> None:
        arguments = draw([9000, 400, 30_000, 12], head_dim=128, dtype=torch.float16)
        expected = check(arguments)
        streams = [torch.cuda.Stream() for _ in range(4)]
        torch.cuda.synchronize()
        outs = []
        for _ in range(50):
            for stream in streams:
                with torch.cuda.stream(stream):
                    outs.append(kernel.forward(**arguments))
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out in outs)

    def test_every_multiprocessor_gets_programs(self) -> None:
        arguments = draw([50, 6000, 1, 0, 800, 3], group=4, head_dim=128, dtype=torch.bfloat16)
        assert target_of(DEVICE).num_sms > 1
        check(arguments)
