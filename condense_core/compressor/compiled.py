"""An encoder's layers compiled by torch, for packs of any lengths.

Each layer is compiled, not the model around it: layers of one kind share what was compiled for the first of them. A
pack enters as a tensor of offsets and one number, so that no list of lengths is compiled for.

``reduce-overhead`` records CUDA graphs, one for every shape that comes. Packs are therefore filled up to few shapes: to
a bucket of tokens, with sequences of padding behind the others, and to a power of two of sequences and of the longest
one's tokens.
"""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from condense_core.compressor import varlen
from condense_core.compressor.packed import FixedPacking, Packing

MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
_SMALLEST_BUCKET = 64
_STEPS = 4  # buckets in each doubling: padding is a fifth of a pack at most, and there are 36 up to 32,768 tokens


def check_mode(mode: str | None, method: str | None = None) -> None:
    """``ValueError`` unless ``mode`` is one of ``MODES``, or None; of it and a method, unless both go together."""
    if mode is None:
        return
    if mode not in MODES:
        raise ValueError(f"compile_encoder: got {mode!r}, expected one of {', '.join(MODES)}")
    if method == "select":
        raise ValueError(
            f"compile_encoder: got {mode!r} for the method 'select', which observes its layers; expected another one"
        )


def bucket(tokens: int) -> int:
    """The smallest bucket that holds so many tokens: 64, 80, 96, 112, 128, 160, ..."""
    if tokens <= _SMALLEST_BUCKET:
        return _SMALLEST_BUCKET
    step = _power_of_two(tokens) // 2 // _STEPS
    return -(-tokens // step) * step


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


class CompiledLayers:
    """The layers of a cut decoder, compiled; the decoder and its layers stay as they are.

    Attributes:
        graphs: whether results lie in memory that the next run overwrites.
    """

    def __init__(self, cut: Any, layers: nn.ModuleList, mode: str, backend: Any) -> None:
        check_mode(mode)
        self.graphs = mode == "reduce-overhead"
        how: dict[str, Any] = {"mode": mode} if backend == "inductor" else {}
        compiled: list[nn.Module] = []
        for layer in layers:
            own: Any = copy.copy(layer)  # shares submodules, so that weights replaced in them are met here too
            own.forward = torch.compile(layer.forward, backend=backend, dynamic=True, **how)
            compiled.append(own)
        self._cut = copy.copy(cut)
        self._cut.__dict__ |= {"_modules": dict(cut._modules) | {"layers": nn.ModuleList(compiled)}}

    def takes(self, embeds: Tensor, packing: Packing) -> bool:
        """Whether a pack is one for compiled layers: no gradient, no continued sequence, nobody who observes."""
        continued = any(parent is not None for parent in packing.parents)
        return not (torch.is_grad_enabled() or continued or packing.observe is not None)

    def step(self, embeds: Tensor, packing: Packing) -> tuple[Any, Tensor, Packing]:
        """The decoder to run next, and what ``fill`` makes of a pack."""
        filled, fixed = self.fill(embeds, packing)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self._cut, filled, fixed

    def fill(self, embeds: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
        """A pack for compiled layers: ``embeds [T, d]`` as ``[1, N, d]``, N - T zero rows behind them."""
        lengths = [n for n in packing.lengths if n]
        tokens, longest = len(embeds), max(lengths)
        total = bucket(tokens) if self.graphs else tokens
        # No padding is longer than the longest: attention stays cheap, and no position is beyond those of the texts.
        lengths += [min(longest, total - at) for at in range(tokens, total, longest)]
        # Of its own memory, as what a layer gives: a view would be compiled for apart.
        filled = embeds.new_zeros(1, total, embeds.shape[1])
        filled[0, :tokens] = embeds
        ends = [0, *accumulate(lengths)]
        if embeds.device.type != "cpu" and not varlen.works(embeds.device, embeds.dtype):
            return filled, Packing(ends, packing.causal)
        offsets = ends
        if self.graphs:
            longest = _power_of_two(longest)
            offsets = ends + ends[-1:] * (_power_of_two(len(lengths)) - len(lengths))
        tensor = torch.tensor(offsets, dtype=torch.int32, device=embeds.device)
        return filled, Packing(ends, packing.causal, fixed=FixedPacking(tensor, longest))
