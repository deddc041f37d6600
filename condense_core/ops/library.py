"""Registration of the ops with `torch.library`, as `torch.ops.condense_core.*`: torch.compile and export trace them.

The public functions of `condense_core.ops` check shapes, dtypes and devices, which a tracer can follow, and call the
registered op. What stands behind it is opaque to a tracer: the arguments become one record of
`condense_core.ops.arguments`, and the registry chooses a backend for the real tensors. Values (offsets that must
ascend, say) are therefore checked behind it.

`torch.library.custom_op` would do the same for 10 us a call, several times what a kernel here takes; the plain
registration costs 1.5 us.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from condense_core.ops.backends import REGISTRY

NAMESPACE = "condense_core"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    int: "int",
    float: "float",
    bool: "bool",
}


def define(
    op: str,
    arguments: type[NamedTuple],
    returns: str,
    *,
    fake: Callable[[Any], Any],
    check: Callable[[Any], Any] | None = None,
    mutates: Sequence[str] = (),
) -> Any:
    """Register `condense_core::{op}` and return it, ready to be called with the fields of `arguments` in their order.

    Args:
        op: its name, in `condense_core::` and in the registry of backends.
        arguments: the record that its arguments make; its fields and their types are the op's schema.
        returns: results as torch's schemas write them, `Tensor` or `(Tensor out, Tensor lse)`.
        fake: from a record of tensors without data to results of the right shapes and dtypes.
        check: from a record to the one that the backend gets: what only values tell is checked here, on every call, in
            compiled programs too.
        mutates: the arguments that are written.
    """

    def run(*values: Any) -> Any:
        record = arguments(*values)
        return REGISTRY.call(op, record if check is None else check(record))

    _LIBRARY.define(f"{op}({_parameters(arguments, mutates)}) -> {returns}")
    _LIBRARY.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{op}", lambda *values: fake(arguments(*values)), lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), op).default


def differentiate(
    op: str, arguments: type[NamedTuple], gradients: Callable[[Tensor, Any, Tensor, Tensor], dict[str, Tensor]]
) -> None:
    """Give an op that returns `(out, lse)` a gradient with respect to out.

    Args:
        op: its name, as given to `define`.
        arguments: the record that its arguments make.
        gradients: from the gradient of out, the record and both results to the gradients of tensors in the record, by
            name. What it gives for one that is None is dropped.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), *output)
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.others)
        *tensors, out, lse = ctx.saved_tensors
        saved = iter(tensors)
        record = arguments(*(next(saved) if other is None else other[0] for other in ctx.others))
        by_name = gradients(grad, record, out, lse)
        values = zip(record._fields, record, strict=True)
        return tuple(None if value is None else by_name.get(name) for name, value in values)

    torch.library.register_autograd(f"{NAMESPACE}::{op}", backward, setup_context=save)


def _parameters(arguments: type[NamedTuple], mutates: Sequence[str]) -> str:
    """The parameters of a schema; what is written has an alias of its own, `Tensor(a!)`."""
    parameters = []
    for name, hint in get_type_hints(arguments).items():
        written = f"({chr(ord('a') + mutates.index(name))}!)" if name in mutates else ""
        parameters.append(f"{_SCHEMA_TYPES[hint].replace('Tensor', f'Tensor{written}')} {name}")
    return ", ".join(parameters)
