"""The CPU kernel of ragged_append against the specification: rows are copied."""

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import RaggedAppendArgs
from condense_core.ops.cpu.ragged_append import ragged_append

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(args: RaggedAppendArgs) -> None:
    """What is left in k, v and lengths is what the specification leaves in copies of them; both are written."""
    after = args._replace(k=args.k.clone(), v=args.v.clone(), lengths=args.lengths.clone())
    reference.ragged_append(*after)
    ragged_append(args)
    for mine, theirs in zip(args, after, strict=True):
        assert torch.equal(mine, theirs)


# Valid rows of four heads with room for 25, 10, none and 25, the last of it beyond a cache of 50 rows.
LENGTHS = {"room for all, for two, for none": [3, 8, 0, 4], "full, beyond the room, negative": [0, 10, 99, -5]}


# Rows of one element, of a part of a vector, of whole ones, of several and a rest.
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("added", [0, 1, 3, 20])
@pytest.mark.parametrize("head_dim", [1, 7, 64, 130])
def test_rows_go_behind_those_that_are_there(added: int, head_dim: int, dtype: torch.dtype) -> None:
    for index, lengths in zip((torch.int64, torch.int32), LENGTHS.values(), strict=True):
        check(
            RaggedAppendArgs(
                k=drawn(50, head_dim, dtype=dtype),
                v=drawn(50, head_dim, dtype=dtype, seed=1),
                cu_seqlens=torch.tensor([0, 25, 35, 35, 60], dtype=index),
                lengths=torch.tensor(lengths, dtype=index),
                k_new=drawn(2, 2, added, head_dim, dtype=dtype, seed=2),
                v_new=drawn(2, 2, added, head_dim, dtype=dtype, seed=3),
            )
        )


@pytest.mark.usefixtures("isa")
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rooms_and_lengths(data: st.DataObject) -> None:
    batch, heads, added = (data.draw(st.integers(low, 3)) for low in (1, 1, 0))
    rooms = torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=batch * heads, max_size=batch * heads)))
    lengths = data.draw(st.lists(st.integers(-2, 8), min_size=batch * heads, max_size=batch * heads))
    rows = max(0, int(rooms.sum()) + data.draw(st.integers(-3, 3)))
    check(
        RaggedAppendArgs(
            k=drawn(rows, 5),
            v=drawn(rows, 5, seed=1),
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), rooms.cumsum(0)]),
            lengths=torch.tensor(lengths),
            k_new=drawn(batch, heads, added, 5, seed=2),
            v_new=drawn(batch, heads, added, 5, seed=3),
        )
    )


# Of k, in a cache that holds keys and values of a token next to each other, and in one with every other column.
STRIDES = {"rows apart": drawn(40, 2, 16)[:, 0], "columns apart": drawn(40, 32)[:, ::2]}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("k", STRIDES.values(), ids=STRIDES)
def test_strides_do_not_matter(k: Tensor, dtype: torch.dtype) -> None:
    new = drawn(1, 5, 2, 16, dtype=dtype, seed=2).transpose(1, 2)
    check(
        RaggedAppendArgs(
            k=torch.empty_strided(k.shape, k.stride(), dtype=dtype).copy_(k),
            v=drawn(40, 2, 16, dtype=dtype)[:, 1],
            cu_seqlens=torch.tensor([0, 9, 20, 9, 40])[::2],
            lengths=torch.tensor([4, 0, 7])[::2],
            k_new=new,
            v_new=new[..., ::2].repeat(1, 1, 1, 2),
        )
    )


@pytest.mark.usefixtures("isa")
def test_enough_rows_for_several_threads() -> None:
    check(
        RaggedAppendArgs(
            k=drawn(900, 128),
            v=drawn(900, 128, seed=1),
            cu_seqlens=torch.tensor([0, 300, 600, 700]),
            lengths=torch.tensor([80, 150, 0]),
            k_new=drawn(1, 3, 200, 128, seed=2),
            v_new=drawn(1, 3, 200, 128, seed=3),
        )
    )
