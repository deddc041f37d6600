"""The scoring methods, one file each; ``METHODS`` has them by name.

Every module of this folder is imported, and a class with a ``name`` registers itself: a new method is one new file.
The list below is for type checkers, which cannot follow that; a method that it lacks works all the same.

ThinK is left out: it drops channels of keys, not tokens, and would need caches whose keys are narrower than their
values.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from condense_core.pruning.base import METHODS

if TYPE_CHECKING:
    from condense_core.pruning.methods.compactor import Compactor as Compactor
    from condense_core.pruning.methods.expected_attention import ExpectedAttention as ExpectedAttention
    from condense_core.pruning.methods.finch import Finch as Finch
    from condense_core.pruning.methods.keydiff import KeyDiff as KeyDiff
    from condense_core.pruning.methods.knorm import Knorm as Knorm
    from condense_core.pruning.methods.kvzap import KVzap as KVzap
    from condense_core.pruning.methods.kvzip import KVzip as KVzip
    from condense_core.pruning.methods.lagkv import LagKV as LagKV
    from condense_core.pruning.methods.leverage import LeverageScore as LeverageScore
    from condense_core.pruning.methods.non_causal import NonCausal as NonCausal
    from condense_core.pruning.methods.observed_attention import ObservedAttention as ObservedAttention
    from condense_core.pruning.methods.peak_attention import PeakAttention as PeakAttention
    from condense_core.pruning.methods.qfilter import QFilter as QFilter
    from condense_core.pruning.methods.random import Random as Random
    from condense_core.pruning.methods.snapkv import SnapKV as SnapKV
    from condense_core.pruning.methods.streaming_llm import StreamingLLM as StreamingLLM
    from condense_core.pruning.methods.surprise import Surprise as Surprise
    from condense_core.pruning.methods.tova import TOVA as TOVA

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

OWN_METHODS = {kind.__name__: kind for kind in METHODS.values() if kind.__module__.startswith(f"{__name__}.")}
"""The methods of this package, by the name of their class."""

globals().update(OWN_METHODS)

if not TYPE_CHECKING:  # a checker would take it for the whole list, which it cannot compute
    __all__ = ["METHODS", *OWN_METHODS]
