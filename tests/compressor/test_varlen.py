"""Attention over sequences of different lengths in one call: what the kernel is asked for, and when it is asked.

On a CPU a stand-in computes what the kernel's documentation says; on a GPU the kernel itself is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from condense_core.compressor import varlen
from condense_core.compressor.encoder import Encoder
from condense_core.compressor.packed import Packing, attend_fixed, packed_attention

LENGTHS = {"odd": [5, 9, 13], "with empty ones": [0, 7, 0, 3, 0], "single tokens": [1, 6, 1, 1]}
# bf16 rounds weights and outputs, of order 1, to 2^-9 of their values; several roundings lie between the two ways.
TOLERANCES = {"atol": 0.03, "rtol": 0.0}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def documented(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **how: Any
) -> Tensor:
    """`varlen_attn` as its documentation has it: `window_size` counts the tokens on either side, -1 is all."""
    assert cu_q.dtype == torch.int32
    assert torch.equal(cu_q, cu_k)
    left, right = how["window_size"]
    assert how["enable_gqa"] == (q.shape[1] != k.shape[1])
    ends = cu_q.tolist()
    assert max(b - a for a, b in pairwise(ends)) <= max_q == max_k
    parts = []
    for a, b in pairwise(ends):
        behind = torch.arange(b - a)[:, None] - torch.arange(b - a)  # how far a key lies before its query
        seen = (behind <= (left if left >= 0 else b)) & (-behind <= (right if right >= 0 else b))
        keys, values = (t[a:b].float().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q[a:b].float(), keys) * how["scale"]
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(parts).to(q.dtype)


class Kernel:
    """A stand-in that counts its calls and keeps what it was called with."""

    def __init__(self, off_by: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.off_by = off_by

    def __call__(self, *tensors: Any, window_size: tuple[int, int], **how: Any) -> Tensor:
        self.calls.append((*tensors, window_size))
        left, right = window_size
        return documented(*tensors, window_size=(left + self.off_by * (left > 0), right), **how)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(varlen, "kernel", made)
    monkeypatch.setattr(varlen, "works", lambda device, dtype: True)
    return made


def inputs(
    total: int, *, heads: int = 4, groups: int = 2, width: int = 16, dtype: torch.dtype = torch.bfloat16, device="cpu"
) -> tuple[Tensor, ...]:
    """Queries, keys and values `[1, heads, T, D]`, strided as a layer's are."""
    draw = torch.Generator().manual_seed(total)
    made = (torch.randn(1, total, n, width, generator=draw) for n in (heads, groups, groups))
    return tuple(t.to(device, dtype).transpose(1, 2) for t in made)


def attend(tensors: tuple[Tensor, ...], packing: Packing, **how: Any) -> Tensor:
    return packed_attention(nn.Identity(), *tensors, None, packing=packing, **how)[0]


def by_sequence(tensors: tuple[Tensor, ...], lengths: list[int], window: int | None, causal: bool, scale: float):
    """SDPA of each sequence alone, in fp32, with a mask in the project's words: `window` counts the token itself."""
    parts = []
    for q, k, v in zip(*(t.float().split(lengths, 2) for t in tensors), strict=True):
        apart = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        seen = (apart < (window or 10**6)) & ((apart >= 0) if causal else (apart > -(window or 10**6)))
        parts.append(F.scaled_dot_product_attention(q, k, v, seen.to(q.device), scale=scale, enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("window", [None, 1, 3, 64])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_one_call_equals_each_sequence_alone(kernel, lengths: list[int], window: int | None, causal: bool) -> None:
    packing = Packing([0, *accumulate(lengths)], causal)
    tensors = inputs(sum(lengths))
    found = attend(tensors, packing, sliding_window=window, scaling=0.3)
    assert len(kernel.calls) == 1
    torch.testing.assert_close(found.float(), by_sequence(tensors, lengths, window, causal, 0.3), **TOLERANCES)


def test_offsets_are_made_once_for_all_layers(kernel) -> None:
    packing = Packing([0, 5, 5, 9])
    for _ in range(3):
        attend(inputs(9), packing)
    offsets = {id(call[3]) for call in kernel.calls}
    assert len(kernel.calls) == 3
    assert len(offsets) == 1
    assert kernel.calls[0][3].tolist() == [0, 5, 9], "a sequence without tokens is none of the kernel's"


@pytest.mark.parametrize(
    ("packing", "changes", "how"),
    [
        pytest.param(Packing([0, 5, 9]), {"width": 12}, {}, id="heads of 12 channels"),
        pytest.param(Packing([0, 5, 9]), {"width": 264}, {}, id="heads of 264 channels"),
        pytest.param(Packing([0, 5, 9]), {}, {"softcap": 5.0}, id="softcap"),
        pytest.param(Packing([0, 5, 9]), {}, {"s_aux": torch.zeros(4)}, id="sinks"),
        pytest.param(Packing([0, 5, 9]), {}, {"dropout": 0.5}, id="dropout"),
        pytest.param(Packing([0, 5, 9], parents=[None, 0]), {}, {}, id="a continued sequence"),
        pytest.param(Packing([0, 9]), {}, {}, id="one sequence"),
        pytest.param(Packing([0, 3, 6, 9]), {}, {}, id="sequences of one length"),
    ],
)
def test_what_it_is_not_asked_for(kernel, packing: Packing, changes: dict[str, Any], how: dict[str, Any]) -> None:
    assert attend(inputs(packing.cu_seqlens[-1], **changes), packing, **how).isfinite().all()
    assert not kernel.calls


@pytest.mark.parametrize(("width", "asked"), [(128, True), (192, False)])
def test_gradients_pass_through_it(kernel, width: int, asked: bool) -> None:
    leaves = [t.detach().requires_grad_() for t in inputs(9, width=width)]
    weights = torch.randn(1, 9, 4, width, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((attend(tuple(leaves), Packing([0, 4, 9])).float() * weights).sum(), leaves)
    assert bool(kernel.calls) == asked
    expected = by_sequence(tuple(leaves), [4, 5], None, causal=True, scale=width**-0.5)
    for found, wanted in zip(grads, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(found.float(), wanted.float(), atol=0.1, rtol=0.02)  # sums of bf16 products


@torch.no_grad()
def test_an_encoder_asks_it_once_in_a_layer(kernel, build_model: Callable[..., PreTrainedModel]) -> None:
    model = build_model("mistral", sliding_window=5, head_dim=16).to(torch.bfloat16)
    encoder, embeds = Encoder(model, 2), model.model.embed_tokens(torch.arange(20))
    kernel.calls.clear()
    found = encoder(embeds, [0, 12, 12, 20])[0]
    assert [call[-1] for call in kernel.calls] == [(4, 0), (4, 0)]
    alone = torch.cat([encoder(embeds[:12], [0, 12])[0], encoder(embeds[12:], [0, 8])[0]])
    assert (found - alone).float().norm() / alone.float().norm() < 0.01  # as 2^-9 a rounding, over two layers


def test_float32_and_the_cpu_never_ask() -> None:
    assert not varlen.fits(*inputs(9))
    assert not varlen.works(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize(("off_by", "agrees"), [(0, True), (1, False), (-1, False)])
def test_a_kernel_that_counts_a_window_otherwise_is_found_out(
    monkeypatch: pytest.MonkeyPatch, off_by: int, agrees: bool
) -> None:
    monkeypatch.setattr(varlen, "kernel", Kernel(off_by))
    assert (varlen.probe(torch.device("cpu"), torch.bfloat16, 3) < 0.05) == agrees


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_the_operation_of_compiled_graphs(kernel, window: int | None, dtype: torch.dtype) -> None:
    q, k, v = (t[0].transpose(0, 1) for t in inputs(14, dtype=dtype))
    offsets = torch.tensor([0, 5, 14, 14, 14], dtype=torch.int32)  # filled up with empty sequences
    arguments = (q, k, v, offsets, 16, 0.3, window, True)
    found = attend_fixed(*arguments).float()
    torch.testing.assert_close(
        found[None], by_sequence(inputs(14, dtype=dtype), [5, 9], window, True, 0.3), **TOLERANCES
    )
    torch.library.opcheck(attend_fixed, arguments, test_utils=("test_schema", "test_faketensor"))


@GPU
@pytest.mark.parametrize("window", [None, 3, 64])
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), [1, 300, 0, 129]], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
def test_the_kernel_of_torch(lengths: list[int], window: int | None, heads: tuple[int, int]) -> None:
    device = torch.device("cuda")
    if not varlen.works(device, torch.bfloat16):
        pytest.skip("torch has no such kernel for this GPU")
    packing, shape = Packing([0, *accumulate(lengths)]), {"heads": heads[0], "groups": heads[1], "width": 64}
    leaves = [t.detach().requires_grad_() for t in inputs(sum(lengths), device=device, **shape)]
    found = attend(tuple(leaves), packing, sliding_window=window, scaling=0.125)
    expected = by_sequence(tuple(leaves), lengths, window, causal=True, scale=0.125)
    torch.testing.assert_close(found.float(), expected, **TOLERANCES)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device)
    grads = torch.autograd.grad((found.float() * weights).sum(), leaves)
    for got, wanted in zip(grads, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        assert (got.float() - wanted.float()).norm() <= 0.02 * wanted.float().norm().clamp_min(1.0)
