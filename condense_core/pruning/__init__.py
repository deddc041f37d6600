"""KV-cache pruning: read a context once, keep the keys and values that matter, drop the rest for real.

``with prune(model, SnapKV(keep=0.25)): model.generate(**inputs)`` prunes whatever runs inside;
``PrunedCache.prefill(model, ids, SnapKV(keep=0.25))`` makes a cache to keep, to save and to ask.
"""

from condense_core.pruning.base import Kept, LayerContext, Method, ScoringMethod, ScoringPass, Traits, Wrapper
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.methods import *  # noqa: F403  # the registry of methods is the list of names
from condense_core.pruning.methods import METHODS, OWN_METHODS
from condense_core.pruning.session import Session, prune
from condense_core.pruning.wrappers import *  # noqa: F403  # likewise
from condense_core.pruning.wrappers import OWN_WRAPPERS, WRAPPERS

__all__ = [
    "prune",
    "Session",
    "PrunedCache",
    "METHODS",
    "WRAPPERS",
    "Method",
    "ScoringMethod",
    "Wrapper",
    "LayerContext",
    "Kept",
    "ScoringPass",
    "Traits",
    *OWN_METHODS,
    *OWN_WRAPPERS,
]
