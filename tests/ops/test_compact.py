"""compact and compact_: the specification against loops, the public functions, and their registration."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops


def cache(batch: int = 2, heads: int = 3, tokens: int = 9, dim: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed)).unbind(0)
    return k, v


INDICES = torch.tensor([[[0, 4, 8], [1, 2, -1], [-1, -1, -1]], [[0, 1, 2], [5, 7, 8], [8, -1, -1]]])
# The same rows for each head without the -1, and heads of different lengths.
LISTS = [[0, 4, 8], [1, 2], [], [0, 1, 2, 6], [5], [8]]
CU = torch.tensor([0, 3, 5, 5, 9, 10, 11])
FLAT = torch.tensor([i for row in LISTS for i in row])


def ragged(x: Tensor) -> tuple[Tensor, Tensor]:
    """The cache as rows of all heads, and where each head's lie."""
    batch, heads, tokens, dim = x.shape
    return x.reshape(-1, dim), torch.arange(batch * heads + 1) * tokens


def test_uniform_rows_are_gathered() -> None:
    k, v = cache()
    for x, out in zip((k, v), ops.compact(k, v, INDICES), strict=True):
        assert out.shape == (2, 3, 3, 4)
        for b in range(2):
            for g in range(3):
                for j, i in enumerate(INDICES[b, g].tolist()):
                    assert torch.equal(out[b, g, j], x[b, g, i] if i >= 0 else torch.zeros(4))


def test_all_four_layouts_hold_the_same_rows() -> None:
    k, v = cache()
    rows, offsets = ragged(k)
    values, _ = ragged(v)
    uniform = ops.compact(k, v, INDICES)
    assert all(map(torch.equal, ops.compact(rows, values, INDICES, cu_seqlens=offsets), uniform))
    expected = torch.cat([k.flatten(0, 1)[n, row] for n, row in enumerate(LISTS)])
    for source, options in (((k, v), {}), ((rows, values), {"cu_seqlens": offsets})):
        kept, _ = ops.compact(*source, FLAT, cu_indices=CU, **options)
        assert torch.equal(kept, expected)
    # Rows that no head owns are zeros, as where fewer tokens than the budget are left.
    longer = torch.cat([FLAT, FLAT[:4]])
    kept, _ = ops.compact(k, v, longer, cu_indices=CU)
    assert torch.equal(kept, torch.cat([expected, torch.zeros(4, 4)]))


def rotary(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, positions: Tensor, dim: int) -> Tensor:
    """Rotary embedding of `x [..., n, dim]` at `positions [..., n]`."""
    angles = positions.unsqueeze(-1) * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    low, high = x.chunk(2, -1)
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)


def test_rotated_keys_stand_where_a_shorter_prompt_would_have_put_them() -> None:
    plain, v = cache(dim=8)
    padding = torch.tensor([0, 0, 0, 0, 5, 8])  # left padding of each head, before its first kept token
    position = (torch.arange(9) - padding.view(2, 3, 1)).float()
    k = rotate(plain, position, 8)
    keys, values = ops.compact(k, v, INDICES, rotate=rotary(9, 8), first=padding)
    expected = rotate(ops.compact(plain, v, INDICES)[0], torch.arange(3).float().expand(2, 3, 3), 8)
    torch.testing.assert_close(keys, expected, rtol=0, atol=2e-6)
    assert torch.equal(values, ops.compact(k, v, INDICES)[1])


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
def test_in_place_equals_out_of_place_and_leaves_the_rest(rotated: bool) -> None:
    options = {"rotate": rotary(9, 4)} if rotated else {}
    for lists, cu in ((INDICES, None), (FLAT, CU)):
        k, v = cache()
        before = k.clone(), v.clone()
        kept = ops.compact(k, v, lists, cu_indices=cu, **options)
        ops.compact_(k, v, lists, cu_indices=cu, **options)
        for x, moved, old in zip((k, v), kept, before, strict=True):
            for n in range(6):
                index = INDICES.flatten(0, 1)[n] if cu is None else FLAT[CU[n] : CU[n + 1]]
                count = int((index >= 0).sum())
                rows = moved.flatten(0, 1)[n] if cu is None else moved[CU[n] : CU[n + 1]]
                assert torch.equal(x.flatten(0, 1)[n, :count], rows[:count])
                assert torch.equal(x.flatten(0, 1)[n, count:], old.flatten(0, 1)[n, count:])


def test_layers_are_compacted_together() -> None:
    first, second = cache(), cache(tokens=12, seed=1)
    ks, vs = ([first[i], second[i]] for i in range(2))
    keys, values = ops.compact(ks, vs, [INDICES, INDICES[..., :2]])
    assert torch.equal(keys[1], ops.compact(*second, INDICES[..., :2])[0])
    assert torch.equal(values[0], ops.compact(*first, INDICES)[1])
    expected = keys[1].clone()
    ops.compact_(ks, vs, [INDICES, INDICES[..., :2]])
    assert torch.equal(ks[1][0, 0, :2], expected[0, 0])


def test_both_pass_opcheck() -> None:
    k, v = cache()
    for op in ("compact", "compact_"):
        for cu, lists in (([], [INDICES]), ([CU], [FLAT])):
            arguments = ([k.clone()], [v.clone()], [], lists, cu, *rotary(9, 4), None)
            torch.library.opcheck(getattr(torch.ops.condense_core, op).default, arguments)


def test_it_is_traced_without_a_break() -> None:
    k, v = cache()
    compiled = torch.compile(lambda *t: ops.compact(*t), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(k, v, INDICES)[0], ops.compact(k, v, INDICES)[0])


K, V = cache()
ROWS, OFFSETS = ragged(K)


def changed(head: int, place: int, index: int) -> Tensor:
    out = INDICES.clone()
    out[0, head, place] = index
    return out


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"k": None}, TypeError, "k is None, expected a torch.Tensor or a sequence", id="no k"),
        pytest.param({"k": K.double()}, TypeError, "k has dtype torch.float64", id="dtype of k"),
        pytest.param(
            {"v": V[:, :, 1:]}, ValueError, r"v has shape .*, expected \[2, 3, 9, 4\], as k has", id="tokens of v"
        ),
        pytest.param({"v": [V, V]}, ValueError, "v has 2 layers, expected 1, as k has", id="layers of v"),
        pytest.param({"k": ROWS}, ValueError, r"k has shape \[54, 4\], expected \[B, G, N, D\]", id="rank of k"),
        pytest.param(
            {"indices": INDICES.float()}, TypeError, "indices has dtype torch.float32", id="indices of floats"
        ),
        pytest.param(
            {"indices": INDICES[:1]},
            ValueError,
            r"indices has shape \[1, 3, 3\], expected .*\[2, 3\]",
            id="sequences of indices",
        ),
        pytest.param(
            {"indices": FLAT}, ValueError, r"indices has shape \[11\], expected \[B, G, M\]", id="rank of indices"
        ),
        pytest.param(
            {"indices": FLAT, "cu_indices": CU[:-1]},
            ValueError,
            r"cu_indices has shape \[6\], expected \[B\*G\+1\] = \[7\]",
            id="one offset too few",
        ),
        pytest.param(
            {"rotate": rotary(9, 4)[0]}, TypeError, "rotate is Tensor, expected None or a pair", id="cos alone"
        ),
        pytest.param(
            {"rotate": rotary(9, 6)},
            ValueError,
            r"rotate\[0\] has shape \[9, 3\], expected \[P, D/2\] with D = 4",
            id="width of cos",
        ),
        pytest.param({"first": CU[:6]}, ValueError, "first is given without rotate", id="first alone"),
        pytest.param(
            {"indices": changed(0, 2, 9)},
            ValueError,
            "indices holds 9 at place 2 of head 0, expected -1 or an index below .* 9",
            id="an index too large",
        ),
        pytest.param(
            {"indices": changed(1, 2, -2)}, ValueError, "indices holds -2 at place 2 of head 1", id="an index below -1"
        ),
        pytest.param(
            {"rotate": rotary(5, 4)},
            ValueError,
            r"rotate has 5 rows, but the key at place 2 of head 0 .* by 6 positions",
            id="a table too short",
        ),
    ],
)
@pytest.mark.parametrize("function", [ops.compact, ops.compact_], ids=["compact", "compact_"])
def test_bad_input_is_named_and_writes_nothing(
    function: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = K.clone(), V.clone()
    with pytest.raises(error, match=message):
        function(**{"k": K, "v": V, "indices": INDICES, **change})
    assert torch.equal(K, before[0])
    assert torch.equal(V, before[1])


def test_in_place_refuses_what_would_overwrite_its_own_rows() -> None:
    k, v = cache()
    for rows in ([4, 0, 8], [0, 0, 1], [0, -1, 2]):
        with pytest.raises(ValueError, match=r"at place [12] of head 5 after -?\d, expected them ascending"):
            ops.compact_(k, v, torch.cat([INDICES.flatten(0, 1)[:5], torch.tensor([rows])]).view(2, 3, 3))
    assert torch.equal(k, cache()[0])
    with pytest.raises(ValueError, match=r"k\[0\] and v\[0\] overlap in memory"):
        ops.compact_(k, k, INDICES)
    with pytest.raises(ValueError, match=r"v\[0\] has strides .* expected a tensor whose elements are its own"):
        ops.compact_(k, v[:1].expand(2, -1, -1, -1), INDICES)
