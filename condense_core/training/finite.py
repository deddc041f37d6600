"""Steps without a finite loss: they are skipped, and several in a row end a run before it spoils what it learned."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


class DivergenceError(ArithmeticError):
    """A training run has no finite loss or weights any more; the message names the step and the last good state."""


class StepGuard:
    """Counts the steps that were skipped, altogether and in a row."""

    def __init__(self, saved_as: Path, *, limit: int, skipped: int = 0, saved_step: int = 0) -> None:
        """Of a run that saves what it has learned.

        Args:
            saved_as: where that lies, for messages.
            limit: so many skipped steps in a row end the run.
            skipped: steps skipped before the run was resumed.
            saved_step: the step of the last save; 0: there is none.
        """
        self.saved_as, self.limit = saved_as, limit
        self.skipped, self.saved_step = skipped, saved_step
        self._in_a_row = 0

    def accept(self, step: int, finite: bool) -> bool:
        """Whether step number ``step``, counted from 1, is to be taken.

        Raises:
            DivergenceError: it is the last of ``limit`` steps in a row that are not.
        """
        if finite:
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            raise DivergenceError(
                f"training: no finite loss or gradient in {self._in_a_row} steps in a row, the last of them {step}; "
                f"stopped, {self.last_good()}. Expected a lower learning rate, or other data"
            )
        return False

    def check_weights(self, step: int, modules: dict[str, nn.Module]) -> None:
        """Raise ``DivergenceError`` if a weight is not finite, before anything is saved."""
        for prefix, module in modules.items():
            if name := not_finite(module.state_dict().items()):
                raise DivergenceError(
                    f"training: the weight {prefix}/{name} is not finite after step {step}; it is not saved, "
                    f"{self.last_good()}"
                )

    def last_good(self) -> str:
        """Where the last save lies, for a message."""
        if not self.saved_step:
            return "nothing was saved before"
        return f"the last good checkpoint is that of step {self.saved_step}, {self.saved_as}"


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None: all are finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None
