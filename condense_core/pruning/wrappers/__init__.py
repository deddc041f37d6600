"""Wrappers: each changes one stage of the method inside it, and they compose, ``AdaKV(CriticalKV(SnapKV(keep=0.25)))``.

One file for each; `nesting` says which do not go together.
"""

from condense_core.pruning.base import Wrapper
from condense_core.pruning.wrappers.adakv import AdaKV
from condense_core.pruning.wrappers.chunkkv import ChunkKV
from condense_core.pruning.wrappers.criticalkv import CriticalKV
from condense_core.pruning.wrappers.decoding import Decoding
from condense_core.pruning.wrappers.merge import Merge
from condense_core.pruning.wrappers.per_layer import PerLayer
from condense_core.pruning.wrappers.pyramidkv import PyramidKV
from condense_core.pruning.wrappers.query_aware import QueryAware
from condense_core.pruning.wrappers.rerotate import Rerotate
from condense_core.pruning.wrappers.threshold import Threshold

WRAPPERS: dict[str, type[Wrapper]] = {
    wrapper.name: wrapper
    for wrapper in (
        AdaKV,
        PyramidKV,
        PerLayer,
        ChunkKV,
        CriticalKV,
        Rerotate,
        Threshold,
        Merge,
        Decoding,
        QueryAware,
    )
}
"""Every wrapper by its name."""

__all__ = [
    "AdaKV",
    "PyramidKV",
    "PerLayer",
    "ChunkKV",
    "CriticalKV",
    "Rerotate",
    "Threshold",
    "Merge",
    "Decoding",
    "QueryAware",
    "WRAPPERS",
]
