"""The scoring methods, one file each; ``METHODS`` has them by name.

ThinK is left out: it drops channels of keys, not tokens, and would need caches whose keys are narrower than their
values.
"""

from condense_core.pruning.base import ScoringMethod
from condense_core.pruning.methods.compactor import Compactor
from condense_core.pruning.methods.expected_attention import ExpectedAttention
from condense_core.pruning.methods.finch import Finch
from condense_core.pruning.methods.keydiff import KeyDiff
from condense_core.pruning.methods.knorm import Knorm
from condense_core.pruning.methods.kvzip import KVzip
from condense_core.pruning.methods.lagkv import LagKV
from condense_core.pruning.methods.leverage import LeverageScore
from condense_core.pruning.methods.non_causal import NonCausal
from condense_core.pruning.methods.observed_attention import ObservedAttention
from condense_core.pruning.methods.qfilter import QFilter
from condense_core.pruning.methods.random import Random
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.methods.streaming_llm import StreamingLLM
from condense_core.pruning.methods.tova import TOVA

METHODS: dict[str, type[ScoringMethod]] = {
    method.name: method
    for method in (
        Random,
        StreamingLLM,
        Knorm,
        KeyDiff,
        QFilter,
        LagKV,
        SnapKV,
        TOVA,
        Finch,
        ObservedAttention,
        ExpectedAttention,
        LeverageScore,
        NonCausal,
        Compactor,
        KVzip,
    )
}

__all__ = [
    "METHODS",
    "Random",
    "StreamingLLM",
    "Knorm",
    "KeyDiff",
    "QFilter",
    "LagKV",
    "SnapKV",
    "TOVA",
    "Finch",
    "ObservedAttention",
    "ExpectedAttention",
    "LeverageScore",
    "NonCausal",
    "Compactor",
    "KVzip",
]
