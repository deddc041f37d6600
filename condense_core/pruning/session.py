"""Sessions: while one is open, a model's prefills leave a pruned cache behind.

Hooks on the model's own modules tell the session what is being computed: the cache, the layer's input and its rotary
embedding. The session's attention function (``attention.py``) has the queries, so nothing is projected again. Behind a
layer's attention its method scores, selects and compacts, before the next layer runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from threading import Thread, current_thread
from threading import enumerate as enumerate_threads
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.checked import once_per_model
from condense_core.decoder.logits import decoder_logits
from condense_core.pruning.attention import SESSIONS, attention_of, base_attention, session_on, switch, switch_back
from condense_core.pruning.base import Method
from condense_core.pruning.cache_layers import mark_in_session, mark_uneven, moved_lengths, prunable_layer
from condense_core.pruning.extras import Extras, check_evicted, check_generation
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.padding import Padding
from condense_core.pruning.pruner import RECENT, Chunks, LayerCall, Pruner
from condense_core.pruning.ragged import RaggedLayer, refuse_gradients
from condense_core.pruning.rotary import Rotary
from condense_core.pruning.rotary_check import rotary_of
from condense_core.pruning.scoring_passes import prune_by_scoring_passes
from condense_core.pruning.session_check import check_session
from condense_core.pruning.state import ThreadState
from condense_core.pruning.surprise import token_surprise


class Session:
    """An open ``prune(model, method)`` block; with no method it prunes nothing, and lets a pruned cache be read.

    Sessions nest: the innermost on a model prunes. A session belongs to the thread (or task) that opened it; to call
    the model from another one, run that in a copy of the context (``contextvars.copy_context().run``).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method | None,
        *,
        checked: bool = True,
        observer: Callable[[LayerCall, Tensor, Tensor, Tensor, int | None], None] | None = None,
    ) -> None:
        """Of a model that computes its attention as ``check_session`` expects.

        Args:
            checked: look first whether the model computes the same in a session; what ``TypeError`` it gets if not.
            observer: called behind the attention of each layer with its call, queries, keys and values, and sliding
                window.
        """
        if method is not None and not isinstance(method, Method):
            raise TypeError(f"method is {type(method).__name__}, expected a pruning method such as SnapKV(keep=0.25)")
        self.inner: Any = decoder_parts(model)
        self.model, self.config = model, model.config
        self.attentions = [attention_of(layer) for layer in self.inner.layers]
        if checked and model.device.type != "meta":
            _check_model(model)
        self.pruner = None if method is None else Pruner(method, layer_rotaries(model, method), len(self.attentions))
        if (
            method is not None and method.traits.reads_surprise
        ):  # its first use runs the model, which no session may see
            decoder_logits(model, self.inner.embed_tokens.weight.new_zeros(1, self.inner.embed_tokens.weight.shape[1]))
        self.observer = observer
        self._state = ThreadState()
        self._shifts: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()
        self._hooks: list[Any] = []
        self._older_threads: WeakSet[Thread] = WeakSet()

    def __enter__(self) -> Session:
        self._older_threads = WeakSet(enumerate_threads())
        if self._hooks:
            raise RuntimeError("session: it is open already; expected a new prune(model, method)")
        switch(self.model)
        self._hooks = [
            self.inner.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.inner.register_forward_hook(self._after_model, with_kwargs=True, always_call=True),
            *(module.register_forward_pre_hook(self._before_layer, with_kwargs=True) for module in self.attentions),
        ]
        SESSIONS.set((*SESSIONS.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        SESSIONS.set(tuple(session for session in SESSIONS.get() if session is not self))
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        mark_in_session(self._state.cache, False)  # a keyboard interrupt ends a pass without the hook behind it
        self._state.end()
        switch_back(self.model)

    def prefill(
        self,
        cache: Cache,
        embeds: Tensor,
        mask: Tensor | None,
        chunk_size: int | None,
        ids: Tensor | None = None,
    ) -> Tensor | None:
        """Let the model read ``embeds [B, N, d_model]`` into an empty ``cache``; ``mask [B, N]`` if there is padding.

        ids: ``[B, N]``, the tokens, where they are known. Returns the last hidden states ``[B, N, d_model]``, or None
        where the prefill came in several passes.

        With chunk_size (only without mask, B = 1) in passes of at most so many tokens, of nearly equal length, with an
        eviction behind each.
        """
        num_tokens = embeds.shape[1]
        positions = torch.arange(num_tokens, device=embeds.device).unsqueeze(0)
        if mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        state = self._state
        if chunk_size is None or num_tokens <= chunk_size:
            state.given_ids = ids
            hidden: Tensor = self.inner(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
            return hidden
        count = -(-num_tokens // chunk_size)
        edges = [num_tokens * i // count for i in range(count + 1)]
        state.chunks = Chunks(num_tokens)
        try:
            for start, stop in pairwise(edges):
                state.chunks.final = stop == num_tokens
                state.given_ids = None if ids is None else ids[:, start:stop]
                self.inner(
                    inputs_embeds=embeds[:, start:stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                )
        finally:
            state.chunks = None
        for layer in cache.layers:
            if isinstance(layer, UniformLayer):
                layer.end_prefill()
        self._finish(cache, embeds, None)
        return None

    # -- around the model ----------------------------------------------------------------------------------------------

    # A thread that is inside the model while another one's session ends calls hooks that torch no longer knows to take
    # keyword arguments: such a call, with fewer arguments, is none of the session's.

    @torch.compiler.disable
    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        if session_on(self.config) is not self or kwargs is None:
            self._warn_new_thread()
            return None
        state, cache = self._state, kwargs.get("past_key_values")
        state.begin(cache)
        given = kwargs.get("input_ids", args[0] if args else None)
        state.ids, state.given_ids = (given if given is not None else state.given_ids), None
        state.fresh = cache is None or cache.get_seq_length() == 0
        if state.fresh and self.pruner is not None and not torch.compiler.is_compiling():
            check_generation()
        mark_in_session(cache, True)
        positions = kwargs.get("position_ids")
        if cache is not None and (shift := self._shifts.get(cache)) is not None:
            # generate counts on from the tokens that it gave; the kept ones have moved to the front.
            if positions is None:
                given, past = _given(args, kwargs), cache.get_seq_length()
                positions = torch.arange(past, past + given.shape[1], device=given.device).unsqueeze(0)
            state.positions = positions - shift.to(positions.device)
            return args, kwargs | {"position_ids": state.positions}
        state.positions = positions
        return None

    def _warn_new_thread(self) -> None:
        """Say once that a thread which began in the session has none: threads do not inherit the context."""
        thread = current_thread()
        if self.pruner is None or session_on(self.config) is not None or thread in self._older_threads:
            return
        self._older_threads.add(thread)
        warnings.warn(
            f"prune: {thread.name!r} was started in the session and is not in it, so that nothing is pruned there; "
            "expected contextvars.copy_context().run as its target, or a session that it opens itself",
            stacklevel=2,
        )

    @torch.compiler.disable
    def _after_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> None:
        if session_on(self.config) is not self:
            return
        state = self._state
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        mark_in_session(cache, False)
        padding = state.masks.known_padding
        if output is not None and (state.scored or state.chunks is not None):
            self._finish_scored(output, padding)
        state.end()
        if (
            output is None
            or cache is None
            or not state.fresh
            or state.pass_scores is not None
            or state.chunks is not None
        ):
            return
        self._finish(cache, _given(args, kwargs), padding)

    @torch.no_grad()
    def _finish_scored(self, output: Any, padding: Padding | None) -> None:
        """Prune the layers that have waited for each other."""
        state, pruner, surprise = self._state, self.pruner, None
        assert pruner is not None
        if pruner.method.traits.reads_surprise:
            if state.ids is None:
                raise ValueError(f"{pruner.method!r}: it reads tokens, expected input_ids and not inputs_embeds")
            surprise = token_surprise(self.model, output.last_hidden_state, state.ids, padding, state.chunks)
        if state.scored:
            pruner.finish(state.cache, state.scored, state.chunks, surprise)

    def _finish(self, cache: Cache, given: Tensor, padding: Padding | None) -> None:
        """Behind the whole prefill of ``given`` (ids or embeddings): what can only be decided now."""
        pruner = self.pruner
        if pruner is None:
            return
        if pruner.method.scoring_passes(1):
            with torch.no_grad():
                embeds = given if given.dim() == 3 else self.inner.embed_tokens(given)
                prune_by_scoring_passes(pruner, self.inner, self._state, cache, embeds, padding)
        if pruner.method.traits.rotates:
            lengths = padding.lengths if padding else (given.shape[1],)
            kept = moved_lengths(cache, lengths)
            self._shifts[cache] = torch.tensor([[n - m] for n, m in zip(lengths, kept, strict=True)])
            for layer in cache.layers:
                layer.uncounted = given.shape[1] - layer.seen
        mark_uneven(cache)

    # -- around a layer ------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before_layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        if session_on(self.config) is not self or kwargs is None:
            return
        cache = kwargs.get("past_key_values")
        layer = None if cache is None else prunable_layer(cache, int(module.layer_idx))  # type: ignore[arg-type]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        past = 0 if layer is None else layer.seen
        if self._state.positions is None:
            self._state.positions = torch.arange(past, past + hidden.shape[1], device=hidden.device).unsqueeze(0)
        positions = self._state.positions
        empty = layer is not None and past == 0
        self._state.call = LayerCall(module, cache, layer, hidden, positions, empty, self._state.memo)

    def attend(
        self,
        module: nn.Module,
        base: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention function: the model's own, or that of ragged layers; then the pruning.

        Args:
            base: name of the model's own attention function.
            query: ``[B, H, Q, D]``. key, value: ``[B, G, N, D]``, as the cache returned them.
            mask: ``[B, tokens seen]``, a mask of four dimensions that the caller made, or None.
        """
        call, self._state.call = self._state.call, None
        if call is None:
            raise RuntimeError(f"{type(module).__name__} computes attention more than once, or outside of its layer")
        layer, own = call.layer, base_attention(module, base)
        result: tuple[Tensor, Tensor | None]
        if mask is not None and mask.dim() == 4:
            if layer is not None and (self.pruner is not None or isinstance(layer, RaggedLayer)):
                raise ValueError(f"attention_mask: got {list(mask.shape)}, expected [B, tokens] or None, to prune by")
            result = own(module, query, key, value, mask, **kwargs)
            return result
        if isinstance(layer, RaggedLayer):
            if self.pruner is not None:
                _check_even(self.pruner.method, False)
            with torch.no_grad():
                real = self._state.masks.new_tokens(mask, query.shape[2])
                out = layer.attend(query, key, value, real, Extras.of(module, kwargs))
            return refuse_gradients(out, query), None
        if isinstance(layer, UniformLayer) and layer.head_shape != (key.shape[1], key.shape[3]):
            raise ValueError(
                f"{type(module).__name__} attends to {key.shape[1]} heads of {key.shape[3]}, but caches "
                f"{layer.head_shape[0]} of {layer.head_shape[1]}"
            )
        if isinstance(layer, UniformLayer) and layer.num_kept is not None:
            check_evicted(module, kwargs)
        seen = self._state.masks.visible(layer, query, key, mask, kwargs.get("sliding_window"), base)
        result = own(module, query, key, value, seen, **kwargs)
        if self.observer is not None:
            self.observer(call, query, key, value, kwargs.get("sliding_window"))
        if self.pruner is not None and isinstance(layer, UniformLayer):
            with torch.no_grad():
                tensors = query.detach(), key.detach(), value.detach()
                self._prune(self.pruner, call, layer, *tensors, mask, kwargs.get("sliding_window"))
        return result

    def _prune(
        self,
        pruner: Pruner,
        call: LayerCall,
        layer: UniformLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sliding_window: int | None,
    ) -> None:
        state = self._state
        if state.pass_scores is not None:
            pruner.score_pass(call, state.pass_scores, q, k, v)
        elif call.was_empty or state.chunks is not None:
            padding = state.masks.padding(mask)
            _check_even(pruner.method, padding is None)
            if not pruner.method.scoring_passes(1):  # otherwise once all layers have read everything
                scored = pruner.prefill(call, layer, q, k, v, padding, state.chunks, sliding_window)
                if scored is not None:
                    state.scored.append(scored)
        elif pruner.method.traits.decodes:
            layer.remember(q, RECENT)
            budget = pruner.method.decode_budget(k.shape[2], layer.seen) if q.shape[2] == 1 else None
            if budget is not None:
                _check_even(pruner.method, mask is None or bool(mask.all()))
                assert layer.recent is not None
                pruner.evict(call, layer, layer.recent, k, v, budget)


def _given(args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Ids ``[B, N]`` or embeddings ``[B, N, d_model]`` that the model was called with."""
    embeds: Tensor | None = kwargs.get("inputs_embeds")
    if embeds is not None:
        return embeds
    ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    return ids


def prune(model: PreTrainedModel, method: Method) -> Session:
    """``with prune(model, method):`` prunes the cache in every prefill that runs inside, whoever calls the model.

    A prefill is a forward pass with an empty cache. Each layer is pruned right behind its attention, so that at most
    one layer's full keys and values exist at a time beside what is kept; generation goes on at the right positions. A
    ``DynamicCache`` of the caller's gets pruned layers in place. Inside the block the model computes with its own
    attention function, chosen under another name; behind it, also after an exception, the model is as it was.

    Args:
        model: a Llama-shaped decoder of transformers, attention ``sdpa``, ``eager`` or a flash attention.
        method: such as ``SnapKV(keep=0.25)`` or ``AdaKV(SnapKV(keep=0.25))``.

    Raises:
        TypeError, ValueError: the model, its attention function, its cache, or a padding mask is not as described, or
            the budget is below what the method always keeps; the message says what would do.
    """
    if method is None:
        raise TypeError("method is None, expected a pruning method such as SnapKV(keep=0.25)")
    return Session(model, method)


@once_per_model
def _check_model(model: PreTrainedModel) -> None:
    check_session(model, Session(model, None, checked=False))


def layer_rotaries(model: PreTrainedModel, method: Method) -> tuple[Rotary, ...] | None:
    """The rotary embedding of every layer; None where it is not understood and ``method`` does not need it."""
    try:
        return rotary_of(model)
    except ValueError as error:
        if method.traits.rotates or method.traits.reads_rotary:
            raise ValueError(f"{method!r} needs to know how the model's keys turn: {error}") from None
        return None


def _check_even(method: Method, even: bool) -> None:
    if method.traits.decodes and not even:
        raise ValueError(f"{method!r}: cannot evict from a padded batch; expected sequences of one length")
