"""The layers of a cache as a whole: made prunable, told of each other, and read from records."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from condense_core.pruning.layers import PrunedLayer, UniformLayer
from condense_core.pruning.ragged import RaggedLayer
from condense_core.pruning.records import LayerRecord


def prunable_layer(cache: Cache, index: int) -> PrunedLayer:
    """Layer ``index`` of ``cache`` as one that can be pruned; a growing layer of transformers' is replaced in place.

    ``ValueError`` for a cache of another kind.
    """
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        raise ValueError(
            f"past_key_values: cannot prune an offloaded cache or a {type(cache).__name__}, expected a DynamicCache or "
            "a PrunedCache"
        )
    while len(cache.layers) <= index:
        cache.layers.append(UniformLayer())
    layer = cache.layers[index]
    if isinstance(layer, PrunedLayer):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ValueError(
            f"past_key_values: cannot prune a layer of type {type(layer).__name__}, expected a DynamicCache or a "
            "PrunedCache"
        )
    own = UniformLayer()
    if layer.is_initialized and layer.keys is not None and layer.get_seq_length():
        own.hold(layer.keys, layer.values, layer.get_seq_length())
    cache.layers[index] = own
    return own


def moved_lengths(cache: Cache, lengths: Sequence[int]) -> tuple[int, ...]:
    """Tokens of each sequence, of ``lengths`` once, after a prefill whose method moved the kept ones to the front.

    ``ValueError`` where layers kept different numbers, since some of them have a sliding window.
    """
    layer = cache.layers[0]
    counts = sorted({int(other.get_seq_length()) for other in cache.layers})
    if len(counts) > 1:
        raise ValueError(
            f"model: its layers keep {counts[0]} to {counts[-1]} tokens, since some have a sliding window, so that the "
            "next one would have a different position in each; expected a method that leaves keys where they are"
        )
    if isinstance(layer, RaggedLayer):
        return tuple(layer.lengths.view(layer.batch, -1)[:, 0].tolist())
    assert isinstance(layer, UniformLayer)
    return tuple(lengths) if layer.num_kept is None else (layer.num_kept,) * len(lengths)


def mark_uneven(cache: Cache) -> None:
    """Tell layers whether others hold other numbers of tokens."""
    held = {layer.held if isinstance(layer, UniformLayer) else -1 for layer in cache.layers}
    for layer in cache.layers:
        if isinstance(layer, UniformLayer):
            layer.uneven = len(held) > 1


def mark_in_session(cache: Cache | None, in_session: bool) -> None:
    """Say whether the forward pass that is under way reads ``cache`` through this project's attention."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, PrunedLayer):
            layer.in_session = in_session


def layer_from_record(record: LayerRecord) -> PrunedLayer:
    """The layer that ``to_record`` described; it takes the record's tensors over."""
    kinds: dict[str, type[UniformLayer | RaggedLayer]] = {kind.kind: kind for kind in (UniformLayer, RaggedLayer)}
    return kinds[record.facts["kind"]].from_record(record)
