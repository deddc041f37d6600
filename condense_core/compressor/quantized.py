"""Linears whose weights are kept in 8 bits, with a scale for each output channel, and used in the model's dtype.

int8 holds a weight to half a step of its row, a 127th of the row's largest; fp8 (e4m3) to a 16th of the weight itself.
Products are those of the model's dtype over weights that are converted for each call: on CPUs that is twice as fast as
torch's own product of 16-bit rows with int8 weights (``torch._weight_int8pack_mm``), once there are as many rows as a
context has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_FORMATS = ("int8", "fp8")
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_SMALLEST_SCALE = 2.0**-120
_ROUND_UP = 1 + 2**-8 + 2**-14  # bfloat16 rounds a scale down by a 256th of it at most, and nothing may be clipped


def check_weight_format(name: str | None) -> None:
    """``ValueError`` unless ``name`` is one of ``WEIGHT_FORMATS``, or None."""
    if name is not None and name not in WEIGHT_FORMATS:
        raise ValueError(f"encoder_weights: got {name!r}, expected one of {', '.join(WEIGHT_FORMATS)}")


class QuantizedLinear(nn.Module):
    """``x W^T + b`` with W ``[out, in]`` in 8 bits.

    values: ``[out, in]``, int8; of fp8 its bits, as uint8. scales: ``[out]`` fp32, each a bfloat16 number, so that a
    product in 16 bits is scaled without another rounding of the scale.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, weight_format: str) -> None:
        """Quantize the weight of ``linear``; ``ValueError`` where it is not finite."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_format, self.dtype, self.bias = weight_format, linear.weight.dtype, linear.bias
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(1, keepdim=True)
        if not largest.isfinite().all():
            raise ValueError("encoder_weights: a weight is not finite, expected finite ones")
        scales = (largest / _LARGEST[weight_format] * _ROUND_UP).bfloat16().float().clamp_min(_SMALLEST_SCALE)
        scaled = weight / scales
        values = scaled.round().to(torch.int8) if weight_format == "int8" else scaled.to(torch.float8_e4m3fn)
        self.register_buffer("values", values if weight_format == "int8" else values.view(torch.uint8))
        self.register_buffer("scales", scales.squeeze(1))

    @property
    def weight(self) -> Tensor:
        """The weight that is computed with, ``[out, in]`` in the model's dtype."""
        return (self._numbers(torch.float32) * self.scales[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # sums of products with values up to 448 would leave its range
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        y = F.linear(x, self._numbers(x.dtype)).mul_(self.scales.to(x.dtype))
        return y if self.bias is None else y.add_(self.bias)

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        """``values`` as numbers, without their scales; both formats fit into 16 bits exactly."""
        values = self.values if self.weight_format == "int8" else self.values.view(torch.float8_e4m3fn)
        return values.to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.weight_format}"


@torch.no_grad()
def quantize_linears(layers: nn.Module, weight_format: str) -> None:
    """Replace every ``nn.Linear`` below ``layers`` by a ``QuantizedLinear``, one after the other.

    Weights that are no linear's, such as those of experts, stay as they are.
    """
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantizedLinear(child, weight_format))
