"""The CUDA kernels on a real GPU, through the public ops: answers, captured graphs, no waiting.

Without a GPU the same sources run in the emulation (`tests/csrc/cuda`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import native, reference
from condense_core.ops.arguments import AttentionPoolArgs, CompactArgs, SelectArgs
from condense_core.ops.backends import REGISTRY

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(native.missing() is not None, reason=f"no extension: {native.missing()}"),
    pytest.mark.usefixtures("cuda_backend"),
]


@pytest.fixture
def cuda_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op runs on the CUDA kernels, or its test fails."""
    monkeypatch.setenv("CONDENSE_BACKEND", "cuda")


def runs_on_cuda(op: str, arguments: Any) -> None:
    assert REGISTRY.resolve(op, arguments).name == "cuda"


def captured(call: Callable[[], Any]) -> Any:
    """The result of a call replayed from a CUDA graph, in which nothing may wait for the device."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):  # a workspace that is not left as it was found shows in the second replay
        graph.replay()
    torch.cuda.synchronize()
    return out


def scores(*shape: int) -> Tensor:
    """Few distinct values, so that ties matter, with NaN, infinities and padding."""
    x = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(0)).float() / 7
    x[..., 5::17], x[..., 3::29], x[..., 1::31] = float("nan"), float("-inf"), float("inf")
    return x.cuda()


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("tokens", [1, 33, 1_000, 32_768, 40_001, 200_000])
def test_select(tokens: int, scope: Any) -> None:
    x = scores(2, 4, tokens)
    protect = torch.tensor([[[0, 4], [tokens - 9, tokens]]], device="cuda")
    for budget in {0, 1, tokens // 4, tokens}:
        arguments = (x, budget, scope == "layer", protect)
        runs_on_cuda("select", SelectArgs(*arguments))
        expected = reference.select(x.cpu(), budget, scope == "layer", protect.cpu())
        for _ in range(2):
            for actual, wanted in zip(ops.select(x, budget, scope=scope, protect=protect), expected, strict=True):
                assert torch.equal(actual.cpu(), wanted)
    graph = captured(lambda: ops.select(x, tokens // 4, scope=scope))
    assert torch.equal(graph[0].cpu(), reference.select(x.cpu(), tokens // 4, scope == "layer")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layers", "dim"), [(1, 128), (3, 80), (70, 5)])
def test_compact(layers: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ks, vs = ([torch.randn(2, 3, 301, dim, generator=generator).to(dtype) for _ in range(layers)] for _ in range(2))
    places = [ops.select(torch.randn(2, 3, 301, generator=generator), 100)[0] for _ in range(layers)]
    angles = torch.arange(301)[:, None] * torch.rand(dim // 2, generator=generator)
    on_gpu = [[t.cuda() for t in tensors] for tensors in (ks, vs, places)]
    for tables in (None, (angles.cos(), angles.sin())) if dim % 2 == 0 else (None,):
        rotation = tables or (None, None)
        expected = reference.compact(ks, vs, [], places, [], *rotation)
        options: dict[str, Any] = {"rotate": tuple(t.cuda() for t in tables)} if tables else {}
        runs_on_cuda("compact", CompactArgs(on_gpu[0], on_gpu[1], [], on_gpu[2], [], None, None, None))
        actual = captured(lambda options=options: ops.compact(*on_gpu, **options))
        for out, wanted in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(out.cpu(), wanted, rtol=1e-2 if tables else 0, atol=1e-2 if tables else 0)
        ks_, vs_ = ([t.clone() for t in tensors] for tensors in on_gpu[:2])
        ops.compact_(ks_, vs_, on_gpu[2], **options)
        for out, wanted in zip([*ks_, *vs_], [*actual[0], *actual[1]], strict=True):
            assert torch.equal(out[:, :, :100], wanted)


def test_ragged_append_from_a_captured_graph() -> None:
    k, v = torch.zeros(2, 40, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    offsets, lengths = torch.tensor([0, 10, 14, 40], device="cuda"), torch.tensor([3, 3, 0], device="cuda")
    k_new, v_new = torch.randn(2, 1, 3, 1, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.ragged_append(k, v, offsets, lengths, k_new, v_new)
    for _ in range(2):
        graph.replay()
    assert lengths.tolist() == [5, 5, 2]
    for row, head in ((3, 0), (4, 0), (13, 1), (14, 2), (15, 2)):
        assert torch.equal(k[row], k_new[0, head, 0])
        assert torch.equal(v[row], v_new[0, head, 0])
    assert int((k != 0).any(1).sum()) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ratio", "halo"), [(4, 0), (7, 2), (300, 0)])
def test_attention_pool(ratio: int, halo: int, dtype: torch.dtype) -> None:
    x, q = torch.randn(1_001, 512, device="cuda", dtype=dtype), torch.randn(4, 128, device="cuda", dtype=dtype)
    weight, bias = torch.rand(512, device="cuda", dtype=dtype), torch.randn(4, ratio + 2 * halo, device="cuda")
    options: dict[str, Any] = {"ratio": ratio, "halo": halo, "norm_weight": weight, "window_bias": bias}
    runs_on_cuda("attention_pool", AttentionPoolArgs(x, q, ratio, None, halo, 0.1, weight, bias, 1e-6))
    actual = ops.attention_pool(x, q, cu_seqlens=torch.tensor([0, 5, 5, 1_001]), **options)
    floats = {name: t.float() if isinstance(t, Tensor) else t for name, t in options.items()}
    expected = reference.attention_pool(x.float(), q.float(), cu_seqlens=torch.tensor([0, 5, 5, 1_001]), **floats)
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)
