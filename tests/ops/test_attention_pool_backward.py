"""attention_pool_backward: gradients against finite differences and autograd, and through torch.library."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference
from tests.ops.oracles import cumulative

# float32 against float32: two orders of the same sums.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("halo", [0, 2])
@pytest.mark.parametrize(
    "lengths", [pytest.param([8], id="full windows"), pytest.param([3, 0, 6], id="short windows, an empty sequence")]
)
@pytest.mark.parametrize("per_window", [False, True], ids=["shared queries", "queries per window"])
def test_the_specification_differentiates_as_finite_differences(
    lengths: list[int], halo: int, per_window: bool
) -> None:
    rows = sum(ops.num_windows(length, 4) for length in lengths)
    double = torch.float64
    x, q = 3 * draw(sum(lengths), 4, dtype=double), draw(*[rows] * per_window, 2, 2, seed=1, dtype=double)
    norm_weight, bias = draw(4, seed=2, dtype=double), draw(2, 4 + 2 * halo, seed=3, dtype=double)

    def pool(x: Tensor, q: Tensor, norm_weight: Tensor, window_bias: Tensor) -> Tensor:
        options = {"ratio": 4, "halo": halo, "cu_seqlens": cumulative(lengths)}
        return reference.attention_pool(x, q, norm_weight=norm_weight, window_bias=window_bias, **options)

    assert torch.autograd.gradcheck(pool, [tensor.requires_grad_() for tensor in (x, q, norm_weight, bias)])


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([12], id="full windows"),
        pytest.param([13], id="a short last window"),
        pytest.param([3, 0, 9, 1], id="a pack"),
        pytest.param([0], id="no tokens"),
    ],
)
@pytest.mark.parametrize(
    ("ratio", "halo"),
    [pytest.param(4, 0, id="no halo"), pytest.param(3, 2, id="halo"), pytest.param(50, 60, id="wider than all")],
)
@pytest.mark.parametrize("per_window", [False, True], ids=["shared queries", "queries per window"])
@pytest.mark.parametrize("extras", [True, False], ids=["norm and bias", "plain"])
def test_written_gradients_equal_autograd(
    lengths: list[int], ratio: int, halo: int, per_window: bool, extras: bool
) -> None:
    rows = sum(ops.num_windows(length, ratio) for length in lengths)
    inputs = {
        "x": 3 * draw(sum(lengths), 8),
        "q": draw(*[rows] * per_window, 2, 4, seed=1),
        "norm_weight": draw(8, seed=2) if extras else None,
        "window_bias": draw(2, ratio + 2 * halo, seed=3) if extras else None,
    }
    options = {"ratio": ratio, "cu_seqlens": cumulative(lengths), "halo": halo, "scale": 0.7, "eps": 1e-5}
    grad = draw(rows, 8, seed=4)
    out, lse = reference.attention_pool_with_lse(**inputs, **options)
    actual = reference.attention_pool_backward(grad=grad, out=out, lse=lse, **inputs, **options)
    leaves = {name: None if value is None else value.clone().requires_grad_() for name, value in inputs.items()}
    reference.attention_pool(**leaves, **options).backward(grad)
    for value, leaf in zip(actual, leaves.values(), strict=True):
        torch.testing.assert_close(value, grad.new_empty(0) if leaf is None else leaf.grad, **TOLERANCE)


def test_gradients_keep_their_dtypes_and_match_float64() -> None:
    x, q, norm_weight = (
        tensor.bfloat16() for tensor in (5 * draw(9, 8), 2 * draw(2, 4, seed=1), 1 + 0.3 * draw(8, seed=2))
    )
    single = [x.clone().requires_grad_(), q.float().requires_grad_(), norm_weight.float().requires_grad_()]
    double = [tensor.detach().double().requires_grad_() for tensor in (x, q, norm_weight)]
    ops.attention_pool(single[0], single[1], ratio=4, norm_weight=single[2]).float().square().sum().backward()
    reference.attention_pool(double[0], double[1], ratio=4, norm_weight=double[2]).square().sum().backward()
    for ours, exact in zip(single, double, strict=True):
        assert ours.grad.dtype == ours.dtype
        # The gradient passes through the rounded output once more than the output itself does.
        torch.testing.assert_close(ours.grad.double(), exact.grad, atol=2e-2, rtol=2e-2)


CU_SEQLENS = torch.tensor([0, 3, 3, 10])


@pytest.mark.parametrize("packed", [False, True], ids=["one sequence", "packed"])
@pytest.mark.parametrize("per_window", [False, True], ids=["shared queries", "queries per window"])
def test_both_ops_pass_opcheck(per_window: bool, packed: bool) -> None:
    x, q = draw(10, 8).requires_grad_(), draw(*[3] * per_window, 2, 4, seed=1).requires_grad_()
    norm_weight, bias = draw(8, seed=2).requires_grad_(), draw(2, 6, seed=3).requires_grad_()
    arguments = (4, CU_SEQLENS if packed else None, 1, 0.5, norm_weight, bias, 1e-6)
    namespace = torch.ops.condense_core
    torch.library.opcheck(namespace.attention_pool.default, (x, q, *arguments))
    out, lse = (o.detach() for o in namespace.attention_pool(x, q, *arguments))
    plain = [a.detach() if isinstance(a, Tensor) else a for a in (x, q, out, lse, *arguments)]
    torch.library.opcheck(namespace.attention_pool_backward.default, (torch.ones_like(out), *plain))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("rows", "pool"),
    [
        pytest.param(None, lambda x, q, w: ops.attention_pool(x, q, ratio=4, norm_weight=w), id="one sequence"),
        pytest.param(
            None, lambda x, q, w: ops.attention_pool(x, q, ratio=4, cu_seqlens=CU_SEQLENS, halo=1), id="packed"
        ),
        pytest.param(3, lambda x, q, w: ops.attention_pool(x, q, ratio=4, cu_seqlens=CU_SEQLENS), id="per window"),
    ],
)
def test_it_compiles_into_one_graph_with_the_same_gradients(
    rows: int | None, pool: Callable[..., Tensor], dynamic: bool
) -> None:
    def tensors() -> list[Tensor]:
        q = draw(2, 4, seed=1) if rows is None else draw(rows, 2, 4, seed=1)
        return [tensor.requires_grad_() for tensor in (draw(10, 8), q, draw(8, seed=2))]

    def loss(x: Tensor, q: Tensor, norm_weight: Tensor) -> Tensor:
        return (2 * pool(x, q, norm_weight)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager, traced = tensors(), tensors()
    plain, graph = loss(*eager), compiled(*traced)
    torch.testing.assert_close(graph, plain)
    plain.backward()
    graph.backward()
    for mine, theirs in zip(traced[:2], eager[:2], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
