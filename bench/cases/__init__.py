"""The benchmark cases, a module for each op; a case's rivals are in `bench.baselines`."""

from collections.abc import Iterator
from importlib import import_module

from bench.case import Case, Setting

OPS = (
    "attention_pool",
    "cross_pool",
    "window_scores",
    "key_norm",
    "key_similarity",
    "lag_scores",
    "query_moments",
    "expected_attention",
    "non_causal_chunks",
    "value_projection_norm",
    "select",
    "compact",
    "ragged_append",
    "ragged_decode_attention",
)
"""The stems, in the order of the tables. A backward op and `compact_` are measured under their op's stem."""


def cases(setting: Setting, ops: tuple[str, ...] = OPS) -> Iterator[Case]:
    """The cases of these ops, one after another, so that one's tensors are gone before the next one's are made."""
    for op in ops:
        yield from import_module(f"bench.cases.{op}").cases(setting)
