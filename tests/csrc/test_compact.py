"""The CPU kernels of compact, in new tensors and in place, against the specification."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import CompactArgs
from condense_core.ops.cpu.compact import compact, compact_

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Rows are copied. A turned key is two products and a sum in fp32, fused here and not there: one unit of the larger
# product, of 6e-8, and then of the dtype (rounded once on both sides, so neighbours at most).
EXACT = {"rtol": 0, "atol": 0}
TOLERANCES = {
    torch.float32: {"rtol": 0, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept(batch: int, heads: int, num_tokens: int, count: int, seed: int = 0) -> Tensor:
    """Ascending indices, -1 behind them where a head keeps fewer."""
    scores = drawn(batch, heads, num_tokens, seed=seed)
    scores[-1, -1, ::2] = float("-inf")
    return reference.select(scores, min(count, num_tokens))[0]


def turn(positions: int, head_dim: int) -> dict[str, Tensor]:
    angles = torch.arange(positions)[:, None] * torch.logspace(0, -3, head_dim // 2)
    return {"cos": angles.cos(), "sin": angles.sin()}


def arguments(**changed: Any) -> CompactArgs:
    """Those given; of the others neither offsets nor a rotation."""
    none: dict[str, Any] = {"cu_seqlens": [], "cu_indices": [], "cos": None, "sin": None, "first": None}
    return CompactArgs(**(none | changed))


def copied(args: CompactArgs) -> CompactArgs:
    """With caches of its own, of the same strides."""

    def copies(layers: list[Tensor]) -> list[Tensor]:
        return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) for x in layers]

    return args._replace(k=copies(args.k), v=copies(args.v))


def check(args: CompactArgs, in_place: bool = True) -> None:
    """Both ops."""
    tolerances = EXACT if args.cos is None else TOLERANCES[args.k[0].dtype]
    for mine, theirs in zip(compact(args), reference.compact(*args), strict=True):
        assert all(x.is_contiguous() for x in mine)
        torch.testing.assert_close(mine, theirs, **tolerances)
    if in_place:
        mine, theirs = copied(args), copied(args)
        compact_(mine)
        reference.compact_(*theirs)
        torch.testing.assert_close([*mine.k, *mine.v], [*theirs.k, *theirs.v], **tolerances)


# [B, G, N, D], and how many tokens of each head are kept.
CASES = {
    "rows of whole vectors": ((1, 2, 300, 128), 150),
    "rows of vectors and a part": ((2, 3, 33, 80), 20),
    "one number": ((1, 1, 1, 1), 1),
    "everything kept": ((2, 1, 9, 7), 9),
    "nothing kept": ((1, 4, 12, 64), 0),
    "several runs of a thread": ((1, 2, 900, 130), 800),
    "no tokens": ((1, 2, 0, 16), 0),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("shape", "count"), CASES.values(), ids=CASES)
def test_it_equals_the_reference(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    index = kept(*shape[:3], count)
    args = arguments(k=[drawn(*shape, dtype=dtype)], v=[drawn(*shape, dtype=dtype, seed=1)], indices=[index])
    check(args)
    check(args._replace(indices=[index.int()]))
    if shape[3] % 2 == 0:
        check(args._replace(**turn(shape[2] + 1, shape[3])))


@pytest.mark.usefixtures("isa")
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_lists_in_any_layout(data: st.DataObject) -> None:
    """Every head keeps its own tokens, of its own number of rows; rows of no head stand between and behind."""
    heads, turned = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    rooms = data.draw(st.lists(st.integers(0, 9), min_size=heads, max_size=heads))
    lists = [sorted(data.draw(st.sets(st.integers(0, room - 1)))) if room else [] for room in rooms]
    rows = sum(rooms) + data.draw(st.integers(0, 3))
    flat = [i for own in lists for i in own] + [99] * data.draw(st.integers(0, 2))
    k, v = drawn(rows, 6), drawn(rows, 6, seed=1)
    ragged = {"indices": [torch.tensor(flat, dtype=torch.int64)], "cu_indices": [offsets(map(len, lists))]}
    args = arguments(k=[k], v=[v], cu_seqlens=[offsets(rooms)], **ragged, **(turn(10, 6) if turned else {}))
    check(args)
    longest = max(map(len, lists)) + data.draw(st.integers(0, 2))
    padded = torch.tensor([own + [-1] * (longest - len(own)) for own in lists], dtype=torch.int64)
    check(args._replace(indices=[padded.view(1, heads, longest)], cu_indices=[]))


def offsets(counts: Any) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


@pytest.mark.usefixtures("isa")
def test_any_order_out_of_place() -> None:
    index = torch.randint(-1, 50, (2, 2, 170), generator=torch.Generator().manual_seed(3))
    check(arguments(k=[drawn(2, 2, 50, 24)], v=[drawn(2, 2, 50, 24, seed=1)], indices=[index]), in_place=False)


@pytest.mark.usefixtures("isa")
def test_layers_differ_in_length(dtype: torch.dtype) -> None:
    k, v = ([drawn(1, 2, n, 32, dtype=dtype, seed=n + more) for n in (5, 40, 17)] for more in (0, 1))
    indices = [kept(1, 2, n, count) for n, count in ((5, 5), (40, 3), (17, 9))]
    check(arguments(k=k, v=v, indices=indices, **turn(41, 32)))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("offset", [torch.int32, torch.int64], ids=str)
def test_long_ragged_caches_and_indices(offset: torch.dtype, dtype: torch.dtype) -> None:
    rooms = torch.tensor([0, 60, 60, 95, 140], dtype=offset)  # the last five rows belong to no head
    starts = torch.tensor([0, 20, 20, 50, 71], dtype=offset)
    lists = [kept(1, 1, n, m, seed=n).flatten() for n, m in ((60, 20), (35, 30), (45, 21))]
    index = torch.cat([*lists, torch.full((4,), 99)])  # and the last four indices: never read
    k, v = drawn(145, 64, dtype=dtype), drawn(145, 64, dtype=dtype, seed=1)
    ragged = arguments(k=[k], v=[v], cu_seqlens=[rooms], indices=[index], cu_indices=[starts])
    check(ragged)
    check(ragged._replace(**turn(61, 64)))
    # Beyond the rows that are there, offsets are clamped.
    check(ragged._replace(k=[k[:100]], v=[v[:100]], indices=[index[:40]]))
    padded = drawn(2, 2, 60, 64, dtype=dtype)
    check(ragged._replace(k=[padded], v=[padded.flip(2)], cu_seqlens=[]))


def test_without_heads_all_rows_of_the_result_are_zero() -> None:
    k, none = drawn(5, 8), torch.tensor([0])
    args = arguments(k=[k], v=[k], cu_seqlens=[none], indices=[torch.zeros(3, dtype=torch.int64)], cu_indices=[none])
    for out in compact(args):
        assert torch.equal(out[0], torch.zeros(3, 8))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("offset", [torch.int32, torch.int64], ids=str)
def test_positions_count_from_the_first_token(offset: torch.dtype, dtype: torch.dtype) -> None:
    k, v = drawn(2, 2, 40, 48, dtype=dtype), drawn(2, 2, 40, 48, dtype=dtype, seed=1)
    first = torch.tensor([0, 3, 0, 7, 0, 10, 0, 5], dtype=offset)[1::2]
    index = torch.stack([f + torch.arange(0, 30, 2) for f in first.tolist()]).view(2, 2, 15)
    args = arguments(k=[k], v=[v], indices=[index], first=first, **turn(16, 48))
    check(args)
    # Tables wider than the head, and transposed.
    check(args._replace(cos=torch.cat([args.cos, args.cos], -1)[:, :24], sin=args.sin.t().contiguous().t()))


@pytest.mark.usefixtures("isa")
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    k = drawn(2, 30, 3, 16, dtype=dtype).transpose(1, 2)
    v = drawn(2, 3, 60, 16, dtype=dtype, seed=1)[:, :, ::2]
    index = kept(2, 3, 30, 30)[..., ::2]
    for keys, values in ((k, v), (k[..., ::2], v[..., 1::2])):
        check(arguments(k=[keys], v=[values], indices=[index]))


INDICES = {
    "the number of rows": (
        [0, 2, 9, 4],
        "indices holds 9 at place 2 of head 1, expected -1 or an index below the",
    ),
    "below -1": ([-2, 1, 2, 3], "indices holds -2 at place 0 of head 1"),
    "beyond 32 bits": ([2**40, -1, -1, -1], f"indices holds {2**40} at place 0 of head 1"),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("index", "message"), INDICES.values(), ids=INDICES)
def test_an_index_out_of_range_is_an_error(index: list[int], message: str) -> None:
    k, v = drawn(1, 2, 9, 8), drawn(1, 2, 9, 8, seed=1)
    args = arguments(k=[k], v=[v], indices=[torch.tensor([[[0, 1, 2, 3], index]])])
    with pytest.raises(ValueError, match=message):
        compact(args)
    in_place = copied(args)
    with pytest.raises(ValueError, match="of head 1"):
        compact_(in_place)
    assert torch.equal(k, in_place.k[0])
    assert torch.equal(v, in_place.v[0])


def messages_of(args: CompactArgs, *ops: Callable[..., object]) -> set[str]:
    """What the ops, specification and kernel, say of arguments that are wrong."""
    found = set()
    for op in ops:
        call = (lambda op=op: op(*args)) if op.__module__.startswith(reference.__name__) else lambda op=op: op(args)
        with pytest.raises(ValueError, match=r"expected|rotate has") as error:
            call()
        found.add(str(error.value))
    return found


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("index", "first"), [([0, 5, 8], 0), ([4, 5, 6], 6)], ids=["beyond the table", "backwards"])
def test_a_move_out_of_range_is_an_error(index: list[int], first: int) -> None:
    args = arguments(
        k=[drawn(1, 1, 9, 8)],
        v=[drawn(1, 1, 9, 8, seed=1)],
        indices=[torch.tensor([[index]])],
        first=torch.tensor([first]),
        **turn(4, 8),
    )
    (message,) = messages_of(args, reference.compact, compact, reference.compact_, compact_)
    assert message.startswith("rotate has 4 rows, but the key at place")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", [[0, 2, 2, 5], [0, 3, 1, 4], [0, -1, 3, 4]], ids=["equal", "falling", "behind -1"])
def test_in_place_indices_that_fall_are_refused_in_every_layer_first(index: list[int]) -> None:
    args = arguments(
        k=[drawn(1, 1, 9, 8, seed=i) for i in (0, 1)],
        v=[drawn(1, 1, 9, 8, seed=i) for i in (2, 3)],
        indices=[torch.tensor([[[1, 3, 5, 6]]]), torch.tensor([[index]])],
    )
    before = copied(args)
    (message,) = messages_of(args, reference.compact_, compact_)
    assert "expected them ascending, -1 only at the end" in message
    for x, y in zip((*args.k, *args.v), (*before.k, *before.v), strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("isa")
def test_threads_do_not_change_a_bit(threads_agree: Callable[..., None]) -> None:
    args = arguments(
        k=[drawn(1, 3, 700, 64)], v=[drawn(1, 3, 700, 64, seed=1)], indices=[kept(1, 3, 700, 300)], **turn(700, 64)
    )

    def run() -> list[Tensor]:
        in_place = copied(args)
        compact_(in_place)
        return [*(x for layers in compact(args) for x in layers), *in_place.k, *in_place.v]

    threads_agree(run, 1, 2, 9)
