"""Methods that need a tensor made once for a model, given as it is or as the path of its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import safe_open
from torch import Tensor

from condense_core.files.tensors import save_tensors
from condense_core.pruning.base import ScoringMethod


class FittedMethod(ScoringMethod):
    """A method whose field ``needs`` is a float tensor of three axes, or the path of a safetensors file that holds one.

    It must not be changed afterwards. Subclasses are dataclasses with ``eq=False``: a tensor has no plain equality.

    Attributes:
        axes: of the tensor, for messages.
        maker: what makes one.
    """

    axes: ClassVar[str]
    maker: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        name, what = type(self).__name__, self.needs
        given = getattr(self, what)
        tensor = load_fitted(name, what, given) if isinstance(given, str | Path) else given
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"{name}: {what} is {came}, expected a float tensor {self.axes} or the path of a safetensors file; "
                f"{self.maker} makes one"
            )
        if tensor.dim() != 3 or 0 in tensor.shape:
            raise ValueError(f"{name}: {what} has shape {list(tensor.shape)}, expected {self.axes}")
        object.__setattr__(self, what, tensor.detach())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, type(self))
            and self.settings() == other.settings()
            and torch.equal(self.fitted, other.fitted)
        )

    def __hash__(self) -> int:
        return hash((type(self), self.keep, self.budget, self.fitted.shape))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {self.needs: list(self.fitted.shape)}

    @property
    def fitted(self) -> Tensor:
        """The tensor."""
        return cast(Tensor, getattr(self, self.needs))


def save_fitted(name: str, tensor: Tensor, path: str | Path) -> None:
    """Write ``tensor`` under ``name`` to a safetensors file that holds nothing else."""
    save_tensors({name: tensor.detach().cpu().contiguous()}, Path(path))


def load_fitted(method: str, what: str, path: str | Path) -> Tensor:
    """The only tensor of a safetensors file, on the CPU; ``ValueError`` where there is no such file or tensor."""
    if not Path(path).is_file():
        raise ValueError(f"{method}: {what} is {str(path)!r}, expected the path of a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) == 1:
                tensor: Tensor = file.get_tensor(names[0])
                return tensor
    except Exception as error:
        raise ValueError(f"{method}: {what} is {str(path)!r}, which is no safetensors file ({error})") from error
    raise ValueError(f"{method}: {what} is {str(path)!r} with {len(names)} tensors, expected one")
