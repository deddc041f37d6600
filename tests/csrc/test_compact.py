"""The CPU kernels of compact, in new tensors and in place, against the specification."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import CompactArgs, SelectArgs
from condense_core.ops.cpu.compact import compact, compact_
from condense_core.ops.cpu.select import select

# Rows are copied. A turned key is two products and a sum in fp32, fused here and not there: one unit of the larger
# product, of 6e-8, and then of the dtype (rounded once on both sides, so neighbours at most).
TOLERANCES = {
    torch.float32: {"rtol": 0, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}
EXACT = {"rtol": 0, "atol": 0}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_cpu(op: Callable[[CompactArgs], object]) -> Callable[..., object]:
    """The compiled op with the reference's parameters."""
    return lambda *arguments: op(CompactArgs(*arguments))


def kept(batch: int, heads: int, tokens: int, count: int, seed: int = 0) -> Tensor:
    """Ascending indices, -1 behind them where a head keeps fewer."""
    scores = drawn(batch, heads, tokens, seed=seed)
    scores[-1, -1, ::2] = float("-inf")
    return select(SelectArgs(scores, count, False, None))[0]


def tables(rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(rows)[:, None] * torch.logspace(0, -3, head_dim // 2)
    return angle.cos(), angle.sin()


def check(*arguments: object, dtype: torch.dtype, in_place: bool = True) -> None:
    """Both ops, on the same arguments, against the reference."""
    k, v, *rest = arguments
    tolerances = EXACT if rest[3] is None else TOLERANCES[dtype]
    for mine, theirs in zip(compact(CompactArgs(*arguments)), reference.compact(*arguments), strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert x.is_contiguous()
            torch.testing.assert_close(x, y, **tolerances)
    if in_place:
        mine, theirs = ([[x.clone() for x in xs] for xs in (k, v)] for _ in range(2))
        compact_(CompactArgs(*mine, *rest))
        reference.compact_(*theirs, *rest)
        for xs, ys in zip(mine, theirs, strict=True):
            for x, y in zip(xs, ys, strict=True):
                torch.testing.assert_close(x, y, **tolerances)


# Rows of whole vectors, of a part of one, of one element; nothing to keep, everything, a single token; several runs of
# a thread; nothing there.
CASES = [
    ((1, 2, 300, 128), 150),
    ((2, 3, 33, 80), 20),
    ((1, 1, 1, 1), 1),
    ((2, 1, 9, 7), 9),
    ((1, 4, 12, 64), 0),
    ((1, 2, 900, 130), 800),
    ((1, 2, 0, 16), 0),
]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("shape", "count"), CASES, ids=str)
def test_it_equals_the_reference(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    k, v = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)
    index = kept(*shape[:3], count)
    check([k], [v], [], [index], [], None, None, None, dtype=dtype)
    check([k], [v], [], [index.int()], [], None, None, None, dtype=dtype)
    if shape[3] % 2 == 0:
        check([k], [v], [], [index], [], *tables(shape[2] + 1, shape[3]), None, dtype=dtype)


@pytest.mark.usefixtures("isa")
def test_any_order_out_of_place() -> None:
    k, v = drawn(2, 2, 50, 24), drawn(2, 2, 50, 24, seed=1)
    index = torch.randint(-1, 50, (2, 2, 170), generator=torch.Generator().manual_seed(3))
    check([k], [v], [], [index], [], None, None, None, dtype=torch.float32, in_place=False)


@pytest.mark.usefixtures("isa")
def test_layers_differ_in_length(dtype: torch.dtype) -> None:
    k = [drawn(1, 2, n, 32, dtype=dtype, seed=n) for n in (5, 40, 17)]
    v = [drawn(1, 2, n, 32, dtype=dtype, seed=n + 1) for n in (5, 40, 17)]
    index = [kept(1, 2, n, count) for n, count in ((5, 5), (40, 3), (17, 9))]
    check(k, v, [], index, [], *tables(41, 32), None, dtype=dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("offset", [torch.int32, torch.int64])
def test_ragged_caches_and_indices(offset: torch.dtype, dtype: torch.dtype) -> None:
    rows = torch.tensor([0, 60, 60, 95, 140], dtype=offset)  # the last five rows belong to no head
    places = torch.tensor([0, 20, 20, 50, 71], dtype=offset)
    lists = [kept(1, 1, n, m, seed=n).flatten() for n, m in ((60, 20), (35, 30), (45, 21))]
    index = torch.cat([*lists, torch.full((4,), 99)])  # and the last four indices: never read
    k, v = drawn(145, 64, dtype=dtype), drawn(145, 64, dtype=dtype, seed=1)
    for rotation in ((None, None, None), (*tables(61, 64), None)):
        check([k], [v], [rows], [index], [places], *rotation, dtype=dtype)
    # Beyond the rows that are there, offsets are clamped.
    check([k[:100]], [v[:100]], [rows], [index[:40]], [places], None, None, None, dtype=dtype)
    # Ragged to padded, as after a selection per head.
    padded = torch.stack([torch.arange(4).where(torch.arange(4) < n, -1) for n in (4, 0, 3, 1)]).view(2, 2, 4)
    check([k], [v], [rows], [padded], [], *tables(3, 64), None, dtype=dtype)
    # Padded to ragged.
    cache = drawn(2, 2, 60, 64, dtype=dtype)
    check([cache], [cache.flip(2).clone()], [], [index], [places], None, None, None, dtype=dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("offset", [torch.int32, torch.int64])
def test_positions_count_from_the_first_token(offset: torch.dtype, dtype: torch.dtype) -> None:
    k, v = drawn(2, 2, 40, 48, dtype=dtype), drawn(2, 2, 40, 48, dtype=dtype, seed=1)
    first = torch.tensor([0, 3, 0, 7, 0, 10, 0, 5], dtype=offset)[1::2]
    index = torch.stack([f + torch.arange(0, 30, 2) for f in first.tolist()]).view(2, 2, 15)
    cos, sin = tables(16, 48)
    check([k], [v], [], [index], [], cos, sin, first, dtype=dtype)
    # Tables wider than the head, and transposed.
    wide = (torch.cat([cos, cos], -1)[:, :24], sin.t().contiguous().t())
    check([k], [v], [], [index], [], *wide, first, dtype=dtype)


@pytest.mark.usefixtures("isa")
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    k = drawn(2, 30, 3, 16, dtype=dtype).transpose(1, 2)
    v = drawn(2, 3, 60, 16, dtype=dtype, seed=1)[:, :, ::2]
    index = kept(2, 3, 30, 40)[..., ::2]
    for keys, values in ((k, v), (k[..., ::2], v[..., 1::2])):
        check([keys], [values], [], [index], [], None, None, None, dtype=dtype, in_place=False)
        base = [keys.clone(memory_format=torch.preserve_format), values.clone()]
        strided = torch.empty(2, 3, 30, 2 * keys.shape[3], dtype=dtype)[..., ::2].copy_(keys)
        reference.compact_([base[0]], [base[1]], [], [index], [])
        compact_(CompactArgs([strided], [values], [], [index], [], None, None, None))
        torch.testing.assert_close(strided, base[0], **EXACT)
        torch.testing.assert_close(values, base[1], **EXACT)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 2, 9, 4], "indices holds 9 at place 2 of head 1, expected -1 or an index below the head's 9 rows"),
        ([-2, 1, 2, 3], "indices holds -2 at place 0 of head 1"),
        ([2**40, -1, -1, -1], f"indices holds {2**40} at place 0 of head 1"),
    ],
    ids=str,
)
def test_an_index_out_of_range_is_an_error(index: list[int], message: str) -> None:
    k, v = drawn(1, 2, 9, 8), drawn(1, 2, 9, 8, seed=1)
    indices = torch.tensor([[[0, 1, 2, 3], index]])
    with pytest.raises(ValueError, match=message):
        compact(CompactArgs([k], [v], [], [indices], [], None, None, None))
    before = k.clone(), v.clone()
    with pytest.raises(ValueError, match="of head 1"):
        compact_(CompactArgs([k], [v], [], [indices], [], None, None, None))
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.usefixtures("isa")
def test_a_move_out_of_range_is_an_error() -> None:
    k, v = drawn(1, 1, 9, 8), drawn(1, 1, 9, 8, seed=1)
    for index, first in (([0, 5, 8], 0), ([4, 5, 6], 6)):
        arguments = ([k], [v], [], [torch.tensor([[index]])], [], *tables(4, 8), torch.tensor([first]))
        messages = []
        for op in (reference.compact, on_cpu(compact), reference.compact_, on_cpu(compact_)):
            with pytest.raises(ValueError, match="rotate has 4 rows, but the key at place") as error:
                op(*arguments)
            messages.append(str(error.value))
        assert len(set(messages)) == 1


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", [[0, 2, 2, 5], [0, 3, 1, 4], [0, -1, 3, 4]], ids=str)
def test_in_place_indices_that_fall_are_refused_in_every_layer_first(index: list[int]) -> None:
    k, v = [drawn(1, 1, 9, 8, seed=i) for i in (0, 1)], [drawn(1, 1, 9, 8, seed=i) for i in (2, 3)]
    before = [x.clone() for x in (*k, *v)]
    indices = [torch.tensor([[[1, 3, 5, 6]]]), torch.tensor([[index]])]
    messages = []
    for op in (reference.compact_, on_cpu(compact_)):
        with pytest.raises(ValueError, match="expected them ascending, -1 only at the end") as error:
            op(k, v, [], indices, [], None, None, None)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    for x, y in zip((*k, *v), before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("isa")
def test_threads_do_not_change_a_bit() -> None:
    k, v, index = drawn(1, 3, 700, 64), drawn(1, 3, 700, 64, seed=1), kept(1, 3, 700, 300)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 9):
            torch.set_num_threads(threads)
            (keys,), (values,) = compact(CompactArgs([k], [v], [], [index], [], *tables(700, 64), None))
            places = k.clone(), v.clone()
            compact_(CompactArgs([places[0]], [places[1]], [], [index], [], *tables(700, 64), None))
            results.append((keys, values, *places))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
