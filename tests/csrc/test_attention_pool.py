"""The CPU kernel of attention_pool against the specification."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import AttentionPoolArgs
from condense_core.ops.cpu.attention_pool import attention_pool

# Of the largest value: sums in another order in fp32; in 16 bits one rounding of the result, the inputs being the same.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
LSE_TOLERANCE = 2e-6  # in fp32 whatever the dtype


class Pack(NamedTuple):
    heads: int
    head_dim: int
    lengths: list[int]  # of the sequences
    ratio: int
    halo: int = 0


PACKS = {
    "whole vectors": Pack(heads=4, head_dim=32, lengths=[37], ratio=4),
    "empty sequences, head_dim with a rest": Pack(heads=3, head_dim=20, lengths=[5, 0, 1, 30], ratio=4),
    "more heads than a vector": Pack(heads=17, head_dim=5, lengths=[23], ratio=7, halo=2),
    "a halo beyond the next window": Pack(heads=2, head_dim=48, lengths=[40, 3], ratio=3, halo=5),
    "one number": Pack(heads=1, head_dim=1, lengths=[1], ratio=1),
    "windows wider than everything": Pack(heads=2, head_dim=16, lengths=[9, 50], ratio=100),
    "two blocks of 16 tokens": Pack(heads=2, head_dim=16, lengths=[70], ratio=20, halo=1),
    "paired vectors in bf16, two blocks": Pack(heads=3, head_dim=64, lengths=[70, 5], ratio=20, halo=1),
    "no tokens": Pack(heads=2, head_dim=8, lengths=[], ratio=4),
}


def arguments(pack: Pack, dtype: torch.dtype, own_queries: bool, extras: bool) -> AttentionPoolArgs:
    """Random ones; `own_queries`: every window has its own; `extras`: with norm weights and a bias."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    d, rows = pack.heads * pack.head_dim, sum(-(-n // pack.ratio) for n in pack.lengths)
    queries = (rows,) if own_queries else ()
    return AttentionPoolArgs(
        x=drawn(sum(pack.lengths), d).to(dtype),
        q=drawn(*queries, pack.heads, pack.head_dim).to(dtype),
        ratio=pack.ratio,
        cu_seqlens=None if len(pack.lengths) == 1 else torch.tensor([0, *pack.lengths]).cumsum(0),
        halo=pack.halo,
        scale=pack.head_dim**-0.5,
        norm_weight=(0.5 + drawn(d).abs()).to(dtype) if extras else None,
        window_bias=drawn(pack.heads, pack.ratio + 2 * pack.halo) if extras else None,
        eps=1e-5,
    )


def exact(args: NamedTuple) -> Any:
    """The same arguments in float64."""
    return args._replace(
        **{
            name: value.double()
            for name, value in args._asdict().items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
    )


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within a share of the largest value."""
    assert actual.shape == expected.shape
    limit = tolerance * max(float(expected.abs().max()), 1e-3) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=limit)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "norm weight and bias"])
@pytest.mark.parametrize("own_queries", [False, True], ids=["shared query", "own queries"])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_it_equals_the_reference(pack: Pack, own_queries: bool, extras: bool, dtype: torch.dtype) -> None:
    args = arguments(pack, dtype, own_queries, extras)
    (out, lse), (expected, expected_lse) = attention_pool(args), reference.attention_pool_with_lse(*exact(args))
    close(out, expected, TOLERANCES[dtype])
    close(lse, expected_lse, LSE_TOLERANCE)


@pytest.mark.usefixtures("isa")
def test_strides_and_a_nan_that_stays_in_its_window(dtype: torch.dtype) -> None:
    args = arguments(Pack(heads=2, head_dim=32, lengths=[24], ratio=4), dtype, False, True)
    expected, _ = attention_pool(args)
    x = args.x
    apart = torch.stack([x, x], 1)[:, 0]  # rows far from each other
    for same in (apart, x.t().contiguous().t()):
        assert torch.equal(attention_pool(args._replace(x=same))[0], expected)
    x[9, 3] = float("nan")
    out, _ = attention_pool(args)
    assert out.isnan().all(1).tolist() == [False, False, True, False, False, False]
    assert torch.equal(out[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])


def test_threads_do_not_change_a_bit(threads_agree: Callable[..., None]) -> None:
    args = arguments(Pack(heads=8, head_dim=64, lengths=[301, 40], ratio=5, halo=2), torch.float32, False, True)
    threads_agree(lambda: attention_pool(args), 1, 2, 5)
