"""The CUDA backend: functions that allocate results on the device and launch the compiled kernels of `csrc/cuda`.

One module per op that has a CUDA kernel, as in `csrc/cuda`; its function takes the op's record of
`condense_core.ops.arguments`. Launches go to torch's current stream.
"""

from typing import Any

import torch
from torch import Tensor

from condense_core.ops import native


def launch(function: str, device: torch.device, **arguments: Any) -> None:
    """Run `condense_core._C.cuda.{function}` on tensors, lists of tensors, numbers and None.

    Args:
        function: name of the kernel in csrc/cuda/cuda.h.
        device: where all tensors are.
        arguments: all its parameters but the stream, by the names that they have there.
    """
    views = {name: _argument(value) for name, value in arguments.items()}
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(native.extension().cuda, function)(**views, stream=stream)


def _argument(value: Any) -> Any:
    if isinstance(value, list):
        return [native.view(tensor) for tensor in value]
    return native.view(value) if isinstance(value, Tensor) else value
