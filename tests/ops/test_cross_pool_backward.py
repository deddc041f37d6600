"""cross_pool_backward: gradients against finite differences and autograd, and through torch.library."""

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


def test_the_specification_differentiates_as_finite_differences() -> None:
    double = torch.float64
    inputs = [3 * draw(7, 4, dtype=double), draw(4, 2, 2, seed=1, dtype=double), draw(4, seed=2, dtype=double)]

    def pool(x: Tensor, q: Tensor, norm_weight: Tensor) -> Tensor:
        ends = {"cu_seqlens": torch.tensor([0, 4, 4, 7]), "cu_queries": torch.tensor([0, 2, 3, 4])}
        return reference.cross_pool(x, q, norm_weight=norm_weight, **ends)

    assert torch.autograd.gradcheck(pool, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize(
    ("lengths", "queries"),
    [
        pytest.param([12], [3], id="one sequence"),
        pytest.param([3, 0, 9, 1], [2, 2, 0, 1], id="a pack"),
        pytest.param([0], [2], id="no tokens"),
        pytest.param([4], [0], id="no queries"),
    ],
)
@pytest.mark.parametrize("norm", [True, False], ids=["norm weight", "plain"])
def test_written_gradients_equal_autograd(lengths: list[int], queries: list[int], norm: bool) -> None:
    inputs = {
        "x": 3 * draw(sum(lengths), 8),
        "q": draw(sum(queries), 2, 4, seed=1),
        "norm_weight": draw(8, seed=2) if norm else None,
    }
    options = {"cu_seqlens": cumulative(lengths), "cu_queries": cumulative(queries), "scale": 0.7, "eps": 1e-5}
    grad = draw(sum(queries), 8, seed=3)
    out, lse = reference.cross_pool_with_lse(**inputs, **options)
    actual = reference.cross_pool_backward(grad=grad, out=out, lse=lse, **inputs, **options)
    leaves = {name: None if value is None else value.clone().requires_grad_() for name, value in inputs.items()}
    reference.cross_pool(**leaves, **options).backward(grad)
    for value, leaf in zip(actual, leaves.values(), strict=True):
        torch.testing.assert_close(value, grad.new_empty(0) if leaf is None else leaf.grad, **TOLERANCE)


CU_SEQLENS = torch.tensor([0, 3, 3, 10])


@pytest.mark.parametrize("packed", [False, True], ids=["one sequence", "packed"])
def test_both_ops_pass_opcheck(packed: bool) -> None:
    x, q, norm_weight = (t.requires_grad_() for t in (draw(10, 8), draw(5, 2, 4, seed=1), draw(8, seed=2)))
    ends = (CU_SEQLENS, torch.tensor([0, 2, 2, 5])) if packed else (None, None)
    arguments = (*ends, 0.5, norm_weight, 1e-6)
    namespace = torch.ops.condense_core
    torch.library.opcheck(namespace.cross_pool.default, (x, q, *arguments))
    out, lse = (o.detach() for o in namespace.cross_pool(x, q, *arguments))
    plain = [a.detach() if isinstance(a, Tensor) else a for a in (x, q, out, lse, *arguments)]
    torch.library.opcheck(namespace.cross_pool_backward.default, (torch.ones_like(out), *plain))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_it_compiles_into_one_graph_with_the_same_gradients(dynamic: bool) -> None:
    def tensors() -> list[Tensor]:
        return [tensor.requires_grad_() for tensor in (draw(10, 8), draw(5, 2, 4, seed=1), draw(8, seed=2))]

    def loss(x: Tensor, q: Tensor, norm_weight: Tensor) -> Tensor:
        ends = {"cu_seqlens": CU_SEQLENS, "cu_queries": torch.tensor([0, 1, 1, 5])}
        return (2 * ops.cross_pool(x, q, norm_weight=norm_weight, **ends)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager, traced = tensors(), tensors()
    plain, graph = loss(*eager), compiled(*traced)
    torch.testing.assert_close(graph, plain)
    plain.backward()
    graph.backward()
    for mine, theirs in zip(traced, eager, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
