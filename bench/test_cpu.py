"""The CPU kernels against their rivals, at the shapes of Mistral-7B: `pytest bench/ --benchmark-only`.

Every op is checked against the specification before it is timed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import baselines, layer
from bench.conftest import Contest, Goal
from condense_core import ops
from condense_core.ops import native, reference

DTYPES = [torch.float32, torch.bfloat16]
# Of the largest value: one rounding of the result, and what fp32 sums leave.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no extension: {native.missing()}")


def dtypes(function: Callable[..., None]) -> Callable[..., None]:
    """Run the benchmark in fp32 and bf16."""
    return pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])(function)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal to within a share of the largest finite value."""
    finite = expected.isfinite()
    limit = TOLERANCE[dtype] * float(expected[finite].abs().max())
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=limit)


def hidden_states(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x `[1750, 4096]`, q `[32, 128]` and norm weights `[4096]`."""
    generator = torch.Generator().manual_seed(0)
    x, q = (torch.randn(shape, generator=generator).to(dtype) for shape in ((1750, 4096), (32, 128)))
    return x, q, torch.rand(4096, generator=generator).add(0.5).to(dtype)


@dtypes
def test_attention_pool(contest: Contest, dtype: torch.dtype) -> None:
    x, q, w = hidden_states(dtype)
    ours = partial(ops.attention_pool, x, q, ratio=4, norm_weight=w)
    close(ours(), reference.attention_pool(x.float(), q.float(), ratio=4, norm_weight=w.float()), dtype)
    eager = {
        "eager einsum": partial(baselines.pool_einsum, x[None], q, w, ratio=4, eps=1e-6),
        "eager elementwise": partial(baselines.pool_elementwise, x[None], q, w, ratio=4, eps=1e-6),
    }
    compiled = torch.compile(baselines.pool_elementwise, dynamic=False)
    target = torch.empty_like(x)
    rivals = {
        **eager,
        "torch.compile": partial(compiled, x[None], q, w, ratio=4, eps=1e-6),
        "copy of x": partial(target.copy_, x),
    }
    result = contest(ours, rivals, (Goal("eager", 10), Goal("torch.compile", 2.5)))
    moved = x.nbytes * 5 / 4  # x once, a row for every four
    share = moved / result.ours_ms / (2 * x.nbytes / result.rivals_ms["copy of x"])
    result.notes.append(f"{share:.0%} of the copy's bandwidth over {moved / 1e6:.0f} MB (goal 50%)")


@dtypes
def test_attention_pool_backward(contest: Contest, dtype: torch.dtype) -> None:
    x, q, w = (t.requires_grad_() for t in hidden_states(dtype))
    grad = torch.randn(438, 4096).to(dtype)

    def backward(out: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(out, (x, q, w), grad, retain_graph=True)

    ours = backward(ops.attention_pool(x, q, ratio=4, norm_weight=w))
    x32, q32, w32 = (t.detach().float().requires_grad_() for t in (x, q, w))
    out = reference.attention_pool(x32, q32, ratio=4, norm_weight=w32)
    for actual, expected in zip(ours(), torch.autograd.grad(out, (x32, q32, w32), grad.float()), strict=True):
        close(actual, expected, dtype)
    eager = {
        f"eager {name}": backward(pool(x[None], q, w, ratio=4, eps=1e-6))
        for name, pool in (("einsum", baselines.pool_einsum), ("elementwise", baselines.pool_elementwise))
    }
    contest(ours, eager, (Goal("eager", 4),))


GOALS = {
    "Knorm": (1.5, 1.5),
    "KeyDiff": (3.0, 3.0),
    "LagKV": (8.0, 8.0),
    "SnapKV": (3.0, 3.0),
    "ExpectedAttention": (10.0, 10.0),
    "CriticalKV(SnapKV)": (2.0, 4.0),
}


@dtypes
@pytest.mark.parametrize("method", GOALS)
def test_layer(contest: Contest, method: str, dtype: torch.dtype) -> None:
    tensors = layer.mistral(2048, dtype)
    name, rival = layer.rival(method, tensors)
    ours = torch.no_grad()(partial(layer.OURS[method], tensors))
    k, _ = ours()
    theirs, _ = rival()
    # Their rows stand in the order of the scores. Scores tie: in bf16, where they also lose digits on the way, and
    # those of LagKV, which are ranks inside chunks, at the last place everywhere.
    common = len(set(map(bytes, _rows(k))) & set(map(bytes, _rows(theirs)))) / len(_rows(k))
    enough = {"LagKV": (0.98, 0.8), "SnapKV": (0.999, 0.8)}.get(method, (0.999, 0.9))[DTYPES.index(dtype)]
    assert common > enough, f"{common:.1%} of the kept keys are kvpress's"
    goals = (Goal(name, GOALS[method][DTYPES.index(dtype)]), *[Goal("", 4, "MiB")] * (method == "SnapKV"))
    result = contest(ours, {name: rival}, goals, seconds=5.0)
    result.notes.append(f"{common:.1%} of the kept keys are theirs too")


def _rows(k: Tensor) -> Any:
    return k.flatten(0, 2).view(torch.uint8).numpy()


@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotated"])
@dtypes
def test_compact(contest: Contest, dtype: torch.dtype, rotated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 8, 16_384, 128, generator=generator).to(dtype) for _ in range(2))
    indices, _ = ops.select(torch.randn(1, 8, 16_384, generator=generator), 8_192)
    angles = torch.arange(16_384)[:, None] * 10_000.0 ** (-torch.arange(64) / 64)
    ours = partial(ops.compact, k, v, indices, rotate=(angles.cos(), angles.sin()) if rotated else None)
    rows = indices[..., None].expand(-1, -1, -1, 128)
    assert torch.equal(ours()[1], v.gather(2, rows))
    half = k[:, :, :8_192].contiguous()

    def copy() -> tuple[Tensor, Tensor]:
        return half.clone(), half.clone()  # into new tensors, as compact does

    goals = () if rotated else (Goal("copy", 0.75),)
    contest(ours, {"copy of as many bytes": copy, "gather": lambda: (k.gather(2, rows), v.gather(2, rows))}, goals)


def test_select(contest: Contest) -> None:
    scores = torch.randn(1, 8, 32_768, generator=torch.Generator().manual_seed(0))
    ours = partial(ops.select, scores, 8_192)

    def topk() -> Tensor:
        return scores.topk(8_192, dim=-1, sorted=False).indices.sort(dim=-1).values

    assert torch.equal(ours()[0], topk())
    contest(ours, {"topk + sort": topk}, (Goal("topk + sort", 6),))


def test_ragged_decode_attention(contest: Contest) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 32, 128, generator=generator)
    k, v = (torch.randn(1, 8, 16_384, 128, generator=generator) for _ in range(2))
    offsets = torch.arange(9) * 16_384
    ours = partial(ops.ragged_decode_attention, q, k.view(-1, 128), v.view(-1, 128), offsets)
    expected = baselines.sdpa_decode(q, k, v)
    close(ours(), expected, torch.float32)
    target = torch.empty_like(k)
    contest(ours, {"sdpa": partial(baselines.sdpa_decode, q, k, v), "copy of k": partial(target.copy_, k)})
