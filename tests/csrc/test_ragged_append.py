"""The CPU kernel of ragged_append against the specification."""

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import RaggedAppendArgs
from condense_core.ops.cpu.ragged_append import ragged_append

# Rows are copied.
TOLERANCES = {"rtol": 0, "atol": 0}


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: Tensor, k_new: Tensor, v_new: Tensor) -> None:
    mine, theirs = ([k.clone(), v.clone(), lengths.clone()] for _ in range(2))
    ragged_append(RaggedAppendArgs(*mine[:2], cu_seqlens, mine[2], k_new, v_new))
    reference.ragged_append(*theirs[:2], cu_seqlens, theirs[2], k_new, v_new)
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCES)


# One new token and several; rows of whole vectors, of a part, of one element.
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("added", [0, 1, 3, 20])
@pytest.mark.parametrize("head_dim", [1, 7, 64, 130])
def test_rows_go_behind_those_that_are_there(added: int, head_dim: int, dtype: torch.dtype) -> None:
    k, v = drawn(50, head_dim, dtype=dtype), drawn(50, head_dim, dtype=dtype, seed=1)
    new = [drawn(2, 2, added, head_dim, dtype=dtype, seed=seed) for seed in (2, 3)]
    # Room for all, for two, for none, and offsets beyond the cache.
    for index, lengths in ((torch.int64, [3, 8, 0, 4]), (torch.int32, [0, 10, 99, -5])):
        cu_seqlens = torch.tensor([0, 25, 35, 35, 60], dtype=index)
        check(k, v, cu_seqlens, torch.tensor(lengths, dtype=index), *new)


@pytest.mark.usefixtures("isa")
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    cache = drawn(40, 2, 16, dtype=dtype)
    new = drawn(1, 5, 2, 16, dtype=dtype, seed=2).transpose(1, 2)
    offsets = torch.tensor([0, 9, 20, 9, 40])[::2]
    for k in (cache[:, 0], drawn(40, 32, dtype=dtype)[:, ::2]):
        lengths = torch.tensor([4, 0, 7])[::2]
        theirs, their_lengths = [k.clone(), cache[:, 1].clone()], lengths.clone()
        reference.ragged_append(*theirs, offsets, their_lengths, new, new.flip(3))
        ragged_append(RaggedAppendArgs(k, cache[:, 1], offsets, lengths, new, new.flip(3)))
        torch.testing.assert_close([k, cache[:, 1]], theirs, **TOLERANCES)
        assert torch.equal(lengths, their_lengths)
    check(cache[:, 0], cache[:, 1], offsets, torch.tensor([0, 0]), new[..., ::2].repeat(1, 1, 1, 2), new)


@pytest.mark.usefixtures("isa")
def test_enough_rows_for_several_threads() -> None:
    k, v = drawn(900, 128, dtype=torch.float32), drawn(900, 128, dtype=torch.float32, seed=1)
    new = [drawn(1, 3, 200, 128, dtype=torch.float32, seed=seed) for seed in (2, 3)]
    check(k, v, torch.tensor([0, 300, 600, 700]), torch.tensor([80, 150, 0]), *new)
