"""The CUDA kernel of ragged_append in the emulation, against the specification: rows are copied."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import RaggedAppendArgs
from condense_core.ops.cuda.ragged_append import ragged_append


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(dtype: torch.dtype = torch.float32, head_dim: int = 8, added: int = 3) -> RaggedAppendArgs:
    """Room for all, for a part, for none, and offsets beyond the cache."""
    return RaggedAppendArgs(
        k=torch.zeros(20, head_dim, dtype=dtype),
        v=torch.zeros(20, head_dim, dtype=dtype),
        cu_seqlens=torch.tensor([0, 4, 6, 6, 22]),
        lengths=torch.tensor([1, 2, 0, 11]),
        k_new=drawn(2, added, 2, head_dim).to(dtype).transpose(1, 2),
        v_new=drawn(2, added, 2, head_dim, seed=1).to(dtype).transpose(1, 2),
    )


def check(args: RaggedAppendArgs, run: Callable[[RaggedAppendArgs], object]) -> None:
    """What `run` leaves in k, v and lengths is what the specification leaves in copies of them."""
    after = args._replace(k=args.k.clone(), v=args.v.clone(), lengths=args.lengths.clone())
    reference.ragged_append(*after)
    run(args)
    for mine, theirs in zip(args, after, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "added"),
    [(torch.float32, 5, 1), (torch.bfloat16, 64, 3), (torch.float16, 8, 0)],
    ids=["elements", "units of 16 bytes", "nothing new"],
)
def test_it_equals_the_reference(
    dtype: torch.dtype, head_dim: int, added: int, index: torch.dtype, emulation: Any
) -> None:
    args = arguments(dtype, head_dim, added)
    args = args._replace(cu_seqlens=args.cu_seqlens.int(), lengths=args.lengths.to(index))
    check(args, lambda args: emulation.run("ragged_append", **args._asdict()))


STRIDES = {
    "contiguous": lambda: torch.zeros(20, 8),
    "columns apart": lambda: torch.zeros(8, 20).t(),
    "odd addresses": lambda: torch.zeros(20, 9)[:, 1:],
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
def test_caches_of_any_strides(make: Callable[[], Tensor], launched: list[str]) -> None:
    args = arguments()
    check(
        args._replace(
            k=make(),
            v=make(),
            cu_seqlens=torch.stack([args.cu_seqlens, args.cu_seqlens], 1)[:, 0],
            lengths=torch.tensor([1, 9, 2, 3], dtype=torch.int32),
            k_new=args.k_new.mT.contiguous().mT,
        ),
        ragged_append,
    )
    assert launched == ["ragged_append"]


def test_arguments_that_do_not_fit_are_refused(emulation: Any) -> None:
    valid = arguments()._asdict()
    changes: dict[str, dict[str, Any]] = {
        "k has shape [20, 7], expected [any, 8]": {"k": torch.zeros(20, 7)},
        "v has shape [19, 8], expected [20, 8]": {"v": torch.zeros(19, 8)},
        "k is float16, expected float32, the dtype of k_new": {"k": torch.zeros(20, 8).half()},
        "v_new has shape [2, 2, 2, 8], expected [2, 2, 3, 8]": {"v_new": torch.zeros(2, 2, 2, 8)},
        "cu_seqlens has shape [4], expected [5]": {"cu_seqlens": torch.tensor([0, 4, 6, 6])},
        "lengths is float32, expected int32 or int64": {"lengths": torch.zeros(4)},
    }
    refused = emulation.refusals([("ragged_append", valid | change) for change in ({}, *changes.values())])
    assert refused == {i + 1: f"ragged_append: {text}" for i, text in enumerate(changes)}
