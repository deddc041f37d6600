"""The CPU kernels of attention_pool, forward and backward, and of cross_pool against the specification."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import native, reference
from condense_core.ops.arguments import AttentionPoolArgs, AttentionPoolBackwardArgs, CrossPoolArgs
from condense_core.ops.cpu.attention_pool import attention_pool
from condense_core.ops.cpu.attention_pool_backward import attention_pool_backward
from condense_core.ops.cpu.cross_pool import cross_pool

# Of the largest value: sums in another order in fp32; in 16 bits one rounding of the result, the inputs being the same.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
# Gradients of q, the norm weights and the bias are sums over all rows, of terms of both signs.
GRADIENT_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    limit = tolerance * max(float(expected.abs().max()), 1e-3) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=limit)


# heads, head_dim, sequence lengths, ratio, halo: whole and partial vectors of columns and of heads; short last windows,
# empty sequences, windows wider than everything, more than one block of 16 tokens, halos beyond the next window.
CASES = [
    (4, 32, [37], 4, 0),
    (3, 20, [5, 0, 1, 30], 4, 0),
    (17, 5, [23], 7, 2),
    (2, 48, [40, 3], 3, 5),
    (1, 1, [1], 1, 0),
    (2, 16, [9, 50], 100, 0),
    (2, 16, [70], 20, 1),
    (3, 64, [70, 5], 20, 1),
    (2, 8, [], 4, 0),
]


def inputs(case: tuple[Any, ...], dtype: torch.dtype, own_queries: bool, extras: bool) -> tuple[Any, ...]:
    """Arguments of the registered op, in its order."""
    heads, head_dim, lengths, ratio, halo = case
    generator = torch.Generator().manual_seed(0)
    tokens, d = sum(lengths), heads * head_dim
    rows = sum(-(-n // ratio) for n in lengths)
    x = torch.randn(tokens, d, generator=generator).to(dtype)
    q = torch.randn(*((rows,) if own_queries else ()), heads, head_dim, generator=generator).to(dtype)
    cu = None if len(lengths) == 1 else torch.tensor([0, *lengths]).cumsum(0)
    weight = torch.rand(d, generator=generator).add(0.5).to(dtype) if extras else None
    bias = torch.randn(heads, ratio + 2 * halo, generator=generator) if extras else None
    return x, q, ratio, cu, halo, head_dim**-0.5, weight, bias, 1e-5


def exact(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("own_queries", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: tuple[Any, ...], dtype: torch.dtype, own_queries: bool) -> None:
    for extras in (False, True):
        arguments = inputs(case, dtype, own_queries, extras)
        out, lse = attention_pool(AttentionPoolArgs(*arguments))
        expected, expected_lse = reference.attention_pool_with_lse(*exact(arguments))
        close(out, expected, TOLERANCES[dtype])
        close(lse, expected_lse, 2e-6)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        actual = attention_pool_backward(AttentionPoolBackwardArgs(grad, *arguments[:2], out, lse, *arguments[2:]))
        wanted = reference.attention_pool_backward(
            grad.double(), *exact(arguments)[:2], expected, expected_lse, *exact(arguments)[2:]
        )
        for mine, theirs, argument in zip(actual, wanted, (*arguments[:2], *arguments[6:8]), strict=True):
            close(mine, theirs, GRADIENT_TOLERANCES[dtype])
            assert argument is None or mine.dtype == argument.dtype


def test_the_number_of_threads_changes_no_bit() -> None:
    arguments = inputs((8, 64, [301, 40], 5, 2), torch.float32, False, True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, lse = attention_pool(AttentionPoolArgs(*arguments))
            results.append(
                (
                    out,
                    lse,
                    *attention_pool_backward(AttentionPoolBackwardArgs(out, *arguments[:2], out, lse, *arguments[2:])),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.usefixtures("isa")
def test_strides_and_a_nan_that_stays_in_its_window() -> None:
    x = torch.randn(24, 2, 64).transpose(0, 1)[0]  # rows far apart
    q = torch.randn(2, 32)
    expected, _ = attention_pool(AttentionPoolArgs(x.contiguous(), q, 4, None, 0, 0.2, None, None, 1e-6))
    assert torch.equal(attention_pool(AttentionPoolArgs(x, q, 4, None, 0, 0.2, None, None, 1e-6))[0], expected)
    assert torch.equal(
        attention_pool(AttentionPoolArgs(x.t().contiguous().t(), q, 4, None, 0, 0.2, None, None, 1e-6))[0], expected
    )
    x = x.clone()
    x[9, 3] = float("nan")
    out, _ = attention_pool(AttentionPoolArgs(x, q, 4, None, 0, 0.2, None, None, 1e-6))
    assert out.isnan().all(1).tolist() == [False, False, True, False, False, False]
    assert torch.equal(out[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])


def test_the_public_op_runs_on_it_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDENSE_BACKEND", "cpu")
    calls = []
    run = native.call
    monkeypatch.setattr(native, "call", lambda name, **arguments: (calls.append(name), run(name, **arguments)))
    x, q = torch.randn(10, 8, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    ops.attention_pool(x, q, ratio=4).square().sum().backward()
    assert calls == ["attention_pool", "attention_pool_backward"]
    assert x.grad is not None
    assert q.grad is not None


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 48), (3, 5), (1, 1)])
def test_cross_pool(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, heads * head_dim, generator=generator).to(dtype)
    q = torch.randn(150, heads, head_dim, generator=generator).to(dtype)
    weight = torch.rand(heads * head_dim, generator=generator).to(dtype)
    cu, cu_queries = torch.tensor([0, 7, 7, 299, 300]), torch.tensor([0, 1, 4, 149, 150])
    for offsets in ((None, None), (cu, cu_queries)):
        for norm_weight in (None, weight):
            arguments = (x, q, *offsets, head_dim**-0.5, norm_weight, 1e-5)
            out, lse = cross_pool(CrossPoolArgs(*arguments))
            expected, expected_lse = reference.cross_pool_with_lse(*exact(arguments))
            close(out, expected, TOLERANCES[dtype])
            empty = expected_lse.isinf()
            assert torch.equal(lse.double()[empty], expected_lse[empty])
            close(lse[~empty], expected_lse[~empty], 2e-6)
    assert cross_pool(CrossPoolArgs(x, q[:0], None, None, 1.0, None, 1e-5))[0].shape == (0, heads * head_dim)
