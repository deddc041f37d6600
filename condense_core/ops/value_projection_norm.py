"""`value_projection_norm`: the norm of what a value can add to the output.

Specification: condense_core/ops/reference/value_projection_norm.py. Kernels: kernels/value_projection_norm.py,
csrc/cpu/kernels/value_projection_norm.h.
"""

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import ValueProjectionNormArgs
from condense_core.ops.library import define


def value_projection_norm(v: Tensor, w_o: Tensor, *, bounds: Tensor | None = None) -> Tensor:
    """Score values by what they can add to the output: the mean of `||W_h v_i||_1` over the query heads h that share v.

    `W_h = w_o[:, h*D:(h+1)*D]` is the part of the output projection that reads head h; heads g*H/G to (g+1)*H/G - 1
    share the values of head g. Not differentiable. CriticalKV, arXiv 2502.03805.

    Args:
        v: `[B, G, N, D]` float32, bfloat16 or float16: values of B sequences and G key-value heads; N may be 0.
        w_o: `[d_model, H*D]`, the weight of the output projection as `nn.Linear` has it, of v's dtype and device; H is
            a multiple of G.
        bounds: `[B, 2]` int32 or int64 on v's device: the tokens start <= i < stop of each sequence are real, both
            clamped to [0, N]; the others score -inf. None: all are real.

    Returns:
        `[B, G, N]` float32.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    checks.check_cache("v", v)
    _check_projection(w_o, v)
    checks.check_bounds(bounds, v)
    scores: Tensor = _value_projection_norm(v, w_o, bounds)
    return scores


def _check_projection(w_o: Tensor, v: Tensor) -> None:
    """w_o must be `[d_model, H*D]` of v's dtype and device, H a multiple of v's G heads."""
    if not isinstance(w_o, Tensor):
        raise TypeError(f"w_o is a {type(w_o).__name__}, expected a torch.Tensor")
    if w_o.dtype != v.dtype:
        raise TypeError(f"w_o has dtype {w_o.dtype}, expected {v.dtype}, as v has")
    if w_o.layout != torch.strided:
        raise TypeError(f"w_o has layout {w_o.layout}, expected a dense (torch.strided) tensor")
    if w_o.device != v.device:
        raise ValueError(f"w_o is on {w_o.device}, expected {v.device}, where v is")
    heads, head_dim = v.shape[1], v.shape[3]
    if w_o.dim() != 2 or w_o.shape[0] < 1 or w_o.shape[1] < 1 or w_o.shape[1] % (heads * head_dim):
        raise ValueError(
            f"w_o has shape {list(w_o.shape)}, expected [d_model, H*D] with d_model >= 1, D = {head_dim} "
            f"and H a multiple of v's {heads} heads"
        )


def _fake(args: ValueProjectionNormArgs) -> Tensor:
    return args.v.new_empty(args.v.shape[:3], dtype=torch.float32)


_value_projection_norm = define("value_projection_norm", ValueProjectionNormArgs, "Tensor", fake=_fake)
