"""What a benchmark case is: an op at a shape, its rivals, the bytes and operations it cannot avoid, and its goals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.goal import Goal

OURS = "condense_core"


@dataclass(frozen=True)
class Setting:
    """Where and at which of Mistral-7B's shapes the cases are measured.

    Attributes:
        device: of the tensors that an op takes.
        dtype: of these tensors.
        heads: query heads of the model, as `kv_heads`, `head_dim` and `width` are the model's.
        layers: how many one launch of `compact` moves.
        tokens: of a text that is pooled.
        packs: how many texts are pooled in one call, a case for each number.
        lengths: tokens of the cache of a layer that is scored, a case for each.
        middle: tokens of a cache that is compacted.
        long: tokens of a cache that is selected from or decoded over.
        compiled: whether torch.compile makes rivals of all baselines, where that takes minutes in all.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    width: int = 4096
    layers: int = 32
    tokens: int = 1_750
    packs: tuple[int, ...] = (1, 16)
    lengths: tuple[int, ...] = (2_048, 32_768)
    middle: int = 8_192
    long: int = 32_768
    compiled: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of an element of `dtype`."""
        return self.dtype.itemsize

    def normal(self, seed: int, *shape: int) -> Tensor:
        """A random tensor, the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32).to(self.dtype)

    def compile(self, name: str, baseline: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """The baseline through torch.compile as a variant of that name, or none where `compiled` is false."""
        return {f"compile {name}": torch.compile(baseline)} if self.compiled else {}


def _itself(out: Tensor) -> Tensor:
    return out


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        name: begins with the op's stem, or the stem's backward op.
        shape: in words.
        bytes: every input once and every output once.
        flops: multiply-adds of its products, twice.
        inputs: makes the tensors of one call from a seed.
        variants: named functions of those tensors; `OURS` is first.
        expected: the result in fp32 from the specification, from the same tensors.
        goals: by device type.
        tolerance: of the relative error (Frobenius) against `expected`; None stands for one rounding of the output to
            the setting's dtype, as sums are in fp32: 1e-2 in 16 bits, 1e-5 in fp32.
        result: takes what is checked from what `OURS` returns.
    """

    name: str
    shape: str
    bytes: int
    flops: int
    inputs: Callable[[int], tuple[Tensor, ...]]
    variants: dict[str, Callable[..., Any]]
    expected: Callable[..., Tensor]
    goals: Mapping[str, tuple[Goal, ...]] = field(default_factory=dict)
    tolerance: float | None = None
    result: Callable[[Any], Tensor] = _itself

    def limit(self, dtype: torch.dtype) -> float:
        """The relative error that is allowed in this dtype."""
        if self.tolerance is not None:
            return self.tolerance
        return 1e-5 if dtype == torch.float32 else 1e-2


class Backward:
    """The gradient of the first input alone: the graph is made once for each set of inputs, and walked every time."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward
        self.graphs: dict[int, tuple[Tensor, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if inputs[0].data_ptr() not in self.graphs:
            leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
            out = self.forward(*leaves)
            generator = torch.Generator(out.device).manual_seed(99)
            grad = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.bfloat16).to(out.dtype)
            self.graphs[inputs[0].data_ptr()] = (out, leaves, grad)
        out, leaves, grad = self.graphs[inputs[0].data_ptr()]
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)[0].flatten(0, -2)
