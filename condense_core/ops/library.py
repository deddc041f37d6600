"""Registration of the ops with `torch.library`, as `torch.ops.condense_core.*`, so that torch.compile and export trace
them.

The public functions of `condense_core.ops` check shapes, dtypes and devices, which a tracer can follow, and call the
registered op. What stands behind it is opaque to a tracer: the registry chooses a backend for the real tensors. Values
(offsets that must ascend, say) are therefore checked behind it.

`torch.library.custom_op` would do the same for 10 us a call, several times what a kernel here takes; the plain
registration costs 1.5 us.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from condense_core.ops.registry import REGISTRY

NAMESPACE = "condense_core"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(op: str, schema: str, *, fake: Callable[..., Any], run: Callable[..., Any] | None = None) -> Any:
    """Register `condense_core::{op}` and return it, ready to be called.

    Args:
        op: its name, in `condense_core::` and in the registry of backends.
        schema: arguments and results as torch writes them, `(Tensor x, int ratio) -> Tensor`. Backends take the
        arguments
            in that order, by position.
        fake: the same signature on tensors without data: the shapes and dtypes of the results.
        run: what to run, by default the backend that the registry chooses.
    """
    _LIBRARY.define(op + schema)
    _LIBRARY.impl(op, run or partial(REGISTRY.call, op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), op).default
