"""The CPU kernel of cross_pool against the specification."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import CrossPoolArgs
from condense_core.ops.cpu.cross_pool import cross_pool

# Of the largest value: sums in another order in fp32; in 16 bits one rounding of the result, the inputs being the same.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
LSE_TOLERANCE = 2e-6  # in fp32 whatever the dtype


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


def arguments(heads: int, head_dim: int, dtype: torch.dtype, num_queries: int = 150) -> CrossPoolArgs:
    """Of one sequence of 300 tokens."""
    generator = torch.Generator().manual_seed(0)
    return CrossPoolArgs(
        x=torch.randn(300, heads * head_dim, generator=generator).to(dtype),
        q=torch.randn(num_queries, heads, head_dim, generator=generator).to(dtype),
        cu_seqlens=None,
        cu_queries=None,
        scale=head_dim**-0.5,
        norm_weight=None,
        eps=1e-5,
    )


PACKS = {
    "one sequence": {},
    # An empty one, one of more than a block of 64 queries and of 128 tokens, one of a single token.
    "four sequences": {
        "cu_seqlens": torch.tensor([0, 7, 7, 299, 300]),
        "cu_queries": torch.tensor([0, 1, 4, 149, 150]),
    },
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("weighted", [False, True], ids=["no norm weight", "norm weight"])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 48), (3, 5), (1, 1)], ids=["48 columns", "5 columns", "1 column"])
def test_it_equals_the_reference(
    heads: int, head_dim: int, pack: dict[str, Tensor], weighted: bool, dtype: torch.dtype
) -> None:
    args = arguments(heads, head_dim, dtype)._replace(**pack)
    if weighted:
        args = args._replace(norm_weight=torch.linspace(0.2, 1.5, heads * head_dim).to(dtype))
    (out, lse), (expected, expected_lse) = cross_pool(args), reference.cross_pool_with_lse(*exact(args))
    close(out, expected, TOLERANCES[dtype])
    empty = expected_lse.isinf()
    assert torch.equal(lse.double()[empty], expected_lse[empty])
    close(lse[~empty], expected_lse[~empty], LSE_TOLERANCE)


def test_no_queries_give_no_rows() -> None:
    out, lse = cross_pool(arguments(2, 8, torch.float32, num_queries=0))
    assert out.shape == (0, 16)
    assert lse.shape == (0, 2)


def test_threads_do_not_change_a_bit(threads_agree: Callable[..., None]) -> None:
    args = arguments(4, 32, torch.float32)._replace(**PACKS["four sequences"])
    threads_agree(lambda: cross_pool(args), 1, 2, 5)
