"""The CPU kernel of attention_pool_backward against the specification."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import native, reference
from condense_core.ops.arguments import AttentionPoolArgs, AttentionPoolBackwardArgs
from condense_core.ops.cpu.attention_pool_backward import attention_pool_backward

# Of the largest value of each gradient: those of q, the norm weights and the bias are sums over all rows, of terms of
# both signs; in 16 bits one rounding of the result.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


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
    """Within a share of the largest value, at least of 0.1: gradients through a norm are differences of such terms."""
    assert actual.shape == expected.shape
    limit = tolerance * max(float(expected.abs().max()), 0.1) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=limit)


def backward_arguments(args: AttentionPoolArgs) -> AttentionPoolBackwardArgs:
    """With the results of the specification and a random gradient."""
    out, lse = reference.attention_pool_with_lse(*args)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return AttentionPoolBackwardArgs(grad=grad, out=out, lse=lse, **args._asdict())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "norm weight and bias"])
@pytest.mark.parametrize("own_queries", [False, True], ids=["shared query", "own queries"])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_it_equals_the_reference(pack: Pack, own_queries: bool, extras: bool, dtype: torch.dtype) -> None:
    args = backward_arguments(arguments(pack, dtype, own_queries, extras))
    doubles = exact(args)
    out, lse = reference.attention_pool_with_lse(*(getattr(doubles, name) for name in AttentionPoolArgs._fields))
    wanted = reference.attention_pool_backward(*doubles._replace(out=out, lse=lse))
    given = (args.x, args.q, args.norm_weight, args.window_bias)
    for mine, theirs, argument in zip(attention_pool_backward(args), wanted, given, strict=True):
        close(mine, theirs, TOLERANCES[dtype])
        assert argument is None or mine.dtype == argument.dtype


@pytest.mark.usefixtures("isa")
def test_rows_far_from_each_other() -> None:
    args = backward_arguments(arguments(PACKS["a halo beyond the next window"], torch.float32, True, True))
    apart = {name: torch.stack([t, t], 1)[:, 0] for name, t in (("x", args.x), ("grad", args.grad))}
    expected = attention_pool_backward(args)
    for mine, theirs in zip(attention_pool_backward(args._replace(**apart)), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_the_public_op_runs_on_it_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDENSE_BACKEND", "cpu")
    calls, run = [], native.call
    monkeypatch.setattr(native, "call", lambda name, **arguments: (calls.append(name), run(name, **arguments)))
    x, q = torch.randn(10, 8, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    ops.attention_pool(x, q, ratio=4).square().sum().backward()
    assert calls == ["attention_pool", "attention_pool_backward"]
    assert x.grad is not None
    assert q.grad is not None


@pytest.mark.parametrize("halo", [0, 2])
def test_threads_do_not_change_a_bit(halo: int, threads_agree: Callable[..., None]) -> None:
    pack = Pack(heads=8, head_dim=64, lengths=[301, 40], ratio=5, halo=halo)
    args = backward_arguments(arguments(pack, torch.float32, False, True))
    threads_agree(lambda: attention_pool_backward(args), 1, 2, 5)
