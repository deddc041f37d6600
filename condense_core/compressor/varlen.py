"""Attention over sequences of different lengths in one call: the flash kernel that torch ships.

``kernel`` is ``torch.nn.attention.varlen.varlen_attn``, or None where this torch has none with windows and grouped
heads. Whether it works on a device is found out by asking it: it must agree with SDPA on a small pack.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_MAX_HEAD_DIM_BACKWARD = 128  # above, the backward kernel is not there for every GPU
_PROBE_LENGTHS, _PROBE_WINDOW = (5, 9, 1), 3
_PROBE_TOLERANCE = 0.05  # of values of order 1 in bf16; a window that is off by one token gives more than 0.3


def _find() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


kernel: Callable[..., Any] | None = _find()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scaling: float,
    window: int | None,
    causal: bool,
) -> Tensor:
    """``[T, H, D]``: attention inside each sequence, by ``kernel``.

    Args:
        query, key, value: ``[T, H, D]``, ``[T, G, D]`` and ``[T, G, D]``.
        offsets: int32 ``[S + 1]`` on the device.
        longest: tokens of the longest sequence, or more.
        scaling: of the logits.
        window: how many tokens a token sees, itself among them; None: all. The kernel counts those beside it.
        causal: whether attention looks back only.
    """
    assert kernel is not None
    beside = -1 if window is None else window - 1
    out: Tensor = kernel(
        query,
        key,
        value,
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(beside, 0 if causal else beside),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``attend`` can compute with tensors like these: their device, dtype and width, and their gradients."""
    gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    width = query.shape[-1]
    if not serves(width) or value.shape[-1] != width or (gradients and width > _MAX_HEAD_DIM_BACKWARD):
        return False
    return works(query.device, query.dtype)


def serves(width: int) -> bool:
    """Whether the kernel knows heads of so many channels."""
    return width % 8 == 0 and width <= _MAX_HEAD_DIM


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is here, runs on ``device`` in ``dtype``, and gives what SDPA gives, in both directions."""
    if kernel is None or dtype not in _DTYPES or device.type != "cuda" or torch.version.hip is not None:
        return False
    return _agrees(device, dtype)


@cache
def _agrees(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return all(probe(device, dtype, window) <= _PROBE_TOLERANCE for window in (None, _PROBE_WINDOW))
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # no kernel for this GPU, or another signature
        return False


def probe(device: torch.device, dtype: torch.dtype, window: int | None) -> float:
    """The largest difference between ``attend`` and SDPA, of outputs and gradients, on a small pack."""
    total = sum(_PROBE_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    packed = [torch.randn(total, n, 16, generator=generator).to(device, dtype).requires_grad_() for n in (4, 2, 2)]
    ends = [0]
    for length in _PROBE_LENGTHS:
        ends.append(ends[-1] + length)
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    found = attend(packed[0], packed[1], packed[2], offsets, max(_PROBE_LENGTHS), 0.25, window, causal=True)
    parts = []
    for a, b in pairwise(ends):
        q, k, v = (t[a:b].transpose(0, 1).unsqueeze(0).float() for t in packed)  # [1, H, n, 16]
        distance = torch.arange(b - a, device=device)[:, None] - torch.arange(b - a, device=device)
        mask = (distance >= 0) & (distance < (window or total))
        parts.append(F.scaled_dot_product_attention(q, k, v, mask, scale=0.25, enable_gqa=True)[0].transpose(0, 1))
    expected = torch.cat(parts)
    weights = torch.randn(expected.shape, generator=generator).to(device)
    got = [found, *torch.autograd.grad((found.float() * weights).sum(), packed)]
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), packed)]
    return max(float((a.detach().float() - b.detach().float()).abs().max()) for a, b in zip(got, wanted, strict=True))
