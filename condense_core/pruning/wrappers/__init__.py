"""Wrappers: each changes one stage of the method inside it, and they compose, ``AdaKV(CriticalKV(SnapKV(keep=0.25)))``.

One file for each, imported and registered as in ``methods``; ``nesting`` says which do not go together.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from condense_core.pruning.base import WRAPPERS

if TYPE_CHECKING:
    from condense_core.pruning.wrappers.across_layers import AcrossLayers as AcrossLayers
    from condense_core.pruning.wrappers.adakv import AdaKV as AdaKV
    from condense_core.pruning.wrappers.chunkkv import ChunkKV as ChunkKV
    from condense_core.pruning.wrappers.criticalkv import CriticalKV as CriticalKV
    from condense_core.pruning.wrappers.decoding import Decoding as Decoding
    from condense_core.pruning.wrappers.merge import Merge as Merge
    from condense_core.pruning.wrappers.per_layer import PerLayer as PerLayer
    from condense_core.pruning.wrappers.pyramidkv import PyramidKV as PyramidKV
    from condense_core.pruning.wrappers.query_aware import QueryAware as QueryAware
    from condense_core.pruning.wrappers.rerotate import Rerotate as Rerotate
    from condense_core.pruning.wrappers.sentences import Sentences as Sentences
    from condense_core.pruning.wrappers.threshold import Threshold as Threshold

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

OWN_WRAPPERS = {kind.__name__: kind for kind in WRAPPERS.values() if kind.__module__.startswith(f"{__name__}.")}
"""The wrappers of this package, by the name of their class."""

globals().update(OWN_WRAPPERS)

if not TYPE_CHECKING:  # a checker would take it for the whole list, which it cannot compute
    __all__ = ["WRAPPERS", *OWN_WRAPPERS]
