"""define and differentiate: records become schemas, and what is registered behaves as torch's own ops do."""

import inspect
from importlib import import_module
from typing import Any, get_type_hints

import pytest
import torch

from condense_core import ops
from condense_core.ops import arguments
from condense_core.ops.backends import REGISTRY

RECORDS = {name: record for name, record in vars(arguments).items() if name.endswith("Args")}


def record_of(op: str) -> Any:
    return RECORDS["".join(part.capitalize() for part in op.rstrip("_").split("_")) + "Args"]


@pytest.mark.parametrize("op", REGISTRY.ops)
def test_the_schema_of_an_op_is_its_record(op: str) -> None:
    assert ops.key_norm  # the schemas are registered when the ops are imported
    schema = getattr(torch.ops.condense_core, op).default._schema
    assert [argument.name for argument in schema.arguments] == list(record_of(op)._fields)
    optional = {
        name for name, hint in get_type_hints(record_of(op)).items() if type(None) in getattr(hint, "__args__", ())
    }
    assert {a.name for a in schema.arguments if str(a.type).startswith("Optional")} == optional


@pytest.mark.parametrize("op", REGISTRY.ops)
def test_the_reference_takes_the_fields_of_the_record(op: str) -> None:
    """By name, in the record's order; a field that the specification gives a default is one that the op fills in."""
    module = import_module(f"condense_core.ops.reference.{op.rstrip('_')}")
    function = getattr(module, f"{op}_with_lse", None) or getattr(module, op)
    assert list(inspect.signature(function).parameters) == list(record_of(op)._fields)


def test_written_arguments_are_marked() -> None:
    written = {
        op: [a.name for a in getattr(torch.ops.condense_core, op).default._schema.arguments if a.is_write]
        for op in REGISTRY.ops
    }
    assert {op: names for op, names in written.items() if names} == {
        "compact_": ["k", "v"],
        "ragged_append": ["k", "v", "lengths"],
    }


def test_new_memory_is_spoiled_in_tests_of_ops() -> None:
    x = torch.zeros(2, 3)
    for memory in (torch.empty(3), torch.empty_like(x), x.new_empty(2), torch.empty(2, dtype=torch.bfloat16)):
        assert memory.isnan().all()
    assert (x.new_empty(2, dtype=torch.int32) == 2**31 - 1).all()
    assert torch.empty(2, dtype=torch.bool).all()
