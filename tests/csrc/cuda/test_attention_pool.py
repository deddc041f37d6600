"""The CUDA kernel of attention_pool in the emulation, against the specification."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import AttentionPoolArgs
from condense_core.ops.cuda.attention_pool import attention_pool

# One rounding of the result to 16 bits; the log-sum-exp is in fp32. Both are sums in another order.
TOLERANCES = {
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-4},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}


class Pack(NamedTuple):
    heads: int
    head_dim: int
    lengths: list[int]  # of the sequences
    ratio: int
    halo: int = 0


PACKS = {
    "a part of a chunk of columns": Pack(heads=3, head_dim=16, lengths=[13], ratio=4),
    "two chunks, an empty sequence": Pack(heads=5, head_dim=128, lengths=[3, 0, 9], ratio=7, halo=2),
    "four chunks": Pack(heads=7, head_dim=256, lengths=[5], ratio=3),
    "a window of many blocks of tokens": Pack(heads=2, head_dim=8, lengths=[30], ratio=30),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(pack: Pack, dtype: torch.dtype, own_queries: bool) -> AttentionPoolArgs:
    """Random ones, with own queries, norm weights and a bias, or with none of these."""
    d, rows = pack.heads * pack.head_dim, sum(-(-n // pack.ratio) for n in pack.lengths)
    return AttentionPoolArgs(
        x=drawn(sum(pack.lengths), d).to(dtype),
        q=drawn(*((rows,) if own_queries else ()), pack.heads, pack.head_dim, seed=1),
        ratio=pack.ratio,
        cu_seqlens=None if len(pack.lengths) == 1 else torch.tensor([0, *pack.lengths]).cumsum(0),
        halo=pack.halo,
        scale=pack.head_dim**-0.5,
        norm_weight=drawn(d, seed=2).abs() if own_queries else None,
        window_bias=drawn(pack.heads, pack.ratio + 2 * pack.halo, seed=3) if own_queries else None,
        eps=1e-5,
    )


def check(args: AttentionPoolArgs) -> None:
    (out, lse), (expected, expected_lse) = (
        attention_pool(args),
        reference.attention_pool_with_lse(*args._replace(x=args.x.float())),
    )
    torch.testing.assert_close(out.float(), expected, **TOLERANCES[args.x.dtype])
    torch.testing.assert_close(lse, expected_lse, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("own_queries", [False, True], ids=["shared query", "own queries"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_it_equals_the_reference(pack: Pack, dtype: torch.dtype, own_queries: bool, launched: list[str]) -> None:
    check(arguments(pack, dtype, own_queries))
    assert launched == ["attention_pool"]


@pytest.mark.parametrize("offsets", [None, [0, 5, 10], [0, 3, 3, 10], [0, 0, 0], [0]], ids=str)
@pytest.mark.usefixtures("launched")
def test_packs_of_one_length_need_no_offsets(offsets: list[int] | None) -> None:
    args = arguments(Pack(heads=2, head_dim=16, lengths=[10], ratio=3, halo=1), torch.float16, False)
    if offsets is not None:
        args = args._replace(x=args.x[: offsets[-1]], cu_seqlens=torch.tensor(offsets))
    check(args)


@pytest.mark.parametrize("shut", [0, 3, 4, 6])
@pytest.mark.usefixtures("launched")
def test_a_bias_may_shut_places_out(shut: int) -> None:
    args = arguments(Pack(heads=2, head_dim=16, lengths=[14], ratio=7), torch.float16, False)
    bias = torch.zeros(2, 7)
    bias[:, :shut] = float("-inf")
    check(args._replace(window_bias=bias))


def test_arguments_that_do_not_fit_are_refused(emulation: Any) -> None:
    valid = {
        "x": torch.zeros(6, 32, dtype=torch.float16),
        "q": torch.zeros(2, 16),
        "ratio": 2,
        "seqlen": 6,
        "cu_seqlens": None,
        "row_offsets": None,
        "halo": 0,
        "scale": 1.0,
        "norm_weight": torch.zeros(32),
        "window_bias": torch.zeros(2, 2),
        "eps": 1e-6,
        "out": torch.zeros(3, 32, dtype=torch.float16),
        "lse": torch.zeros(3, 2),
    }
    odd = torch.zeros(6, 34, dtype=torch.float16)[:, 2:]
    changes: dict[str, dict[str, Any]] = {
        "x is float32, expected bfloat16 or float16": {"x": torch.zeros(6, 32)},
        "x has rows at odd addresses, expected them at multiples of 16 bytes": {"x": odd},
        "q has 2 heads of 8 columns, expected them to make up x's 32": {"q": torch.zeros(2, 8)},
        "out is bfloat16, expected float16": {"out": torch.zeros(3, 32, dtype=torch.bfloat16)},
        "lse has shape [3, 1], expected [3, 2]": {"lse": torch.zeros(3, 1)},
        "norm_weight has shape [31], expected [32]": {"norm_weight": torch.zeros(31)},
        "window_bias has shape [2, 3], expected [2, 2]": {"window_bias": torch.zeros(2, 3)},
        "seqlen is 5, expected sequences of it to make up 6 tokens and 3 rows": {"seqlen": 5},
        "ratio is 0, expected 1 to 2^30": {"ratio": 0},
        "cu_seqlens and row_offsets are expected together, or neither": {"cu_seqlens": torch.tensor([0, 6])},
    }
    refused = emulation.refusals([("attention_pool", valid | change) for change in ({}, *changes.values())])
    assert refused == {i + 1: f"attention_pool: {text}" for i, text in enumerate(changes)}
