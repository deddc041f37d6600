"""What a benchmark case is: an op at a shape, its rivals, the bytes and operations it cannot avoid, and its goals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OURS = "condense_core"


@dataclass(frozen=True)
class Goal:
    """What the op should reach: `value` of `kind`.

    Kinds: "speed-up" over the fastest variant whose name starts with `over`; "copy", a share of the copy's bandwidth;
    "us", at most so long; "temporaries", at most so many bytes; "layer", at most this share of a layer's prefill.
    """

    kind: str
    value: float
    over: str = ""


def _itself(out: Tensor) -> Tensor:
    return out


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        inputs: makes the tensors of one call from a seed.
        variants: named functions of those tensors; `OURS` is first.
        expected: the result in fp32 from the specification, from the same tensors.
        result: takes what is checked from what `OURS` returns.
        tolerance: of the relative error (Frobenius) against it; the output is rounded to `dtype` once, sums are in
        fp32.
    """

    name: str
    shape: str
    bytes: int
    flops: int
    inputs: Callable[[int], tuple[Tensor, ...]]
    variants: dict[str, Callable[..., Any]]
    expected: Callable[..., Tensor]
    goals: tuple[Goal, ...] = ()
    tolerance: float = 1e-2
    result: Callable[[Any], Tensor] = _itself


@dataclass(frozen=True)
class Sizes:
    """A model's shapes; the smoke test has small ones."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    width: int = 4096
    tokens: int = 1_750
    long: int = 32_768
    short: int = 2_048
    middle: int = 8_192
    layers: int = 32


def normal(seed: int, device: torch.device, *shape: int) -> Tensor:
    """Random bf16 tensors, the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
