"""The pooling ops under torch.library: opcheck, torch.compile without a graph break, gradients through it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from condense_core import ops

NAMESPACE = torch.ops.condense_core


def tensors(rows: int | None, *, requires_grad: bool = False) -> dict[str, Tensor]:
    """x of 10 tokens, width 8, 2 heads; one query, or one for each of `rows` windows."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (10, 8), "q": (2, 4) if rows is None else (rows, 2, 4), "norm_weight": (8,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor.requires_grad_(requires_grad) for name, tensor in made.items()}


CU = torch.tensor([0, 3, 3, 10])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("static", [True, False], ids=["static", "per-window"])
def test_attention_pool_passes_opcheck(static: bool, packed: bool) -> None:
    rows = None if static else 3
    t = tensors(rows, requires_grad=True)
    bias = torch.randn(2, 6, requires_grad=True)
    arguments = (4, CU if packed else None, 1, 0.5, t["norm_weight"], bias, 1e-6)
    torch.library.opcheck(NAMESPACE.attention_pool.default, (t["x"], t["q"], *arguments))
    out, lse = (o.detach() for o in NAMESPACE.attention_pool(t["x"], t["q"], *arguments))
    plain = [a.detach() if isinstance(a, Tensor) else a for a in (t["x"], t["q"], out, lse, *arguments)]
    torch.library.opcheck(NAMESPACE.attention_pool_backward.default, (torch.ones_like(out), *plain))


@pytest.mark.parametrize("packed", [False, True])
def test_cross_pool_passes_opcheck(packed: bool) -> None:
    t = tensors(5, requires_grad=True)
    cu = (CU, torch.tensor([0, 2, 2, 5])) if packed else (None, None)
    arguments = (*cu, 0.5, t["norm_weight"], 1e-6)
    torch.library.opcheck(NAMESPACE.cross_pool.default, (t["x"], t["q"], *arguments))
    out, lse = (o.detach() for o in NAMESPACE.cross_pool(t["x"], t["q"], *arguments))
    plain = [a.detach() if isinstance(a, Tensor) else a for a in (t["x"], t["q"], out, lse, *arguments)]
    torch.library.opcheck(NAMESPACE.cross_pool_backward.default, (torch.ones_like(out), *plain))


CALLS: dict[str, tuple[int | None, Callable[..., Tensor]]] = {
    "attention_pool": (None, lambda x, q, norm_weight: ops.attention_pool(x, q, ratio=4, norm_weight=norm_weight)),
    "attention_pool packed": (None, lambda x, q, norm_weight: ops.attention_pool(x, q, ratio=4, cu_seqlens=CU, halo=1)),
    "attention_pool per window": (3, lambda x, q, norm_weight: ops.attention_pool(x, q, ratio=4, cu_seqlens=CU)),
    "cross_pool": (
        5,
        lambda x, q, norm_weight: ops.cross_pool(
            x, q, cu_seqlens=CU, cu_queries=torch.tensor([0, 1, 1, 5]), norm_weight=norm_weight
        ),
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph_with_the_same_gradients(call: str, dynamic: bool) -> None:
    rows, function = CALLS[call]

    def loss(x: Tensor, q: Tensor, norm_weight: Tensor) -> Tensor:
        return (2 * function(x, q, norm_weight)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager, traced = tensors(rows, requires_grad=True), tensors(rows, requires_grad=True)
    torch.testing.assert_close(compiled(**traced), loss(**eager))
    loss(**eager).backward()
    compiled(**traced).backward()
    for name in ("x", "q"):
        torch.testing.assert_close(traced[name].grad, eager[name].grad)


def test_offsets_are_checked_before_a_backend_runs_compiled_or_not() -> None:
    t = tensors(None)
    for run in (ops.attention_pool, torch.compile(ops.attention_pool, fullgraph=True, backend="eager")):
        with pytest.raises(ValueError, match="cu_seqlens ends at 11, expected 10"):
            run(t["x"], t["q"], ratio=4, cu_seqlens=torch.tensor([0, 11]))
