"""Sessions: what is generated inside one is what the model computes from the kept tokens; outside, nothing changes."""

from __future__ import annotations

import contextvars
import gc
import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import pruning_models as models
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, Fp8QuantizedLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from condense_core.pruning.base import LayerContext, ScoringMethod, Traits
from condense_core.pruning.cache_layers import prunable_layer
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.methods.expected_attention import ExpectedAttention
from condense_core.pruning.methods.knorm import Knorm
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.ragged import RaggedLayer
from condense_core.pruning.session import prune
from condense_core.pruning.wrappers import AdaKV, Decoding, PyramidKV, Rerotate

Build = Callable[..., PreTrainedModel]

FAMILIES = ("mistral", "llama", "qwen2", "qwen3")
ATTENTIONS = ("sdpa", "eager")
NUM_TOKENS = 90
# Relative to a float64 model of the same weights: three layers of sums of some fifty fp32 products each.
TOLERANCE = 2e-5

HALF = SnapKV(keep=0.5, window=8)
METHODS = {
    "uniform": HALF,
    "ragged": AdaKV(HALF),
    "pyramid": PyramidKV(HALF, beta=4),
    "ragged pyramid": AdaKV(PyramidKV(HALF, beta=4)),
}


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 400, (batch, count), generator=torch.Generator().manual_seed(seed))


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, count: int = 8, **options: Any) -> Any:
    """The new tokens; with ``return_dict_in_generate`` whatever transformers returns. No sequence ends early."""
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(input_ids=ids, attention_mask=mask, **settings)
    return out if options.get("return_dict_in_generate") else out[:, ids.shape[1] :]


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a session may change while it is open."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return model.config._attn_implementation, sum(hooks), model.config.to_json_string()


# -- nothing evicted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_generates_what_the_model_does(lively_model: Build, family: str, attention: str) -> None:
    model = lively_model(family, attention)
    ids, mask, _ = models.padded(tokens(3, NUM_TOKENS), (NUM_TOKENS, 61, 40), "left")
    for batch in ((ids[:1], None), (ids, mask)):
        expected = generate(model, *batch)
        for method in (SnapKV(keep=1.0), AdaKV(SnapKV(keep=1.0)), Rerotate(SnapKV(keep=1.0))):
            with prune(model, method):
                assert generate(model, *batch).tolist() == expected.tolist()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_keeping_all_searches_and_samples_alike(lively_model: Build, attention: str) -> None:
    model = lively_model("llama", attention)
    ids, mask, _ = models.padded(tokens(2, NUM_TOKENS), (NUM_TOKENS, 50), "left")
    ways = {"beams": {"num_beams": 3}, "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 20}}
    for options in ways.values():
        torch.manual_seed(7)
        expected = generate(model, ids, mask, **options)
        torch.manual_seed(7)
        with prune(model, SnapKV(keep=1.0)):
            assert generate(model, ids, mask, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("window", [24, 200])
def test_keeping_all_of_a_sliding_window(lively_model: Build, window: int, attention: str) -> None:
    """The window is shorter than the prompt, or longer; it slides on while 40 tokens are generated."""
    model = lively_model("mistral", attention, sliding_window=window)
    ids, mask, _ = models.padded(tokens(3, NUM_TOKENS), (NUM_TOKENS, 61, 13), "left")
    for batch in ((ids[:1], None), (ids, mask)):
        expected = generate(model, *batch, count=40)
        # A budget of more tokens than the window has evicts what no later token will see, and nothing else.
        for method in (SnapKV(keep=1.0), SnapKV(budget=60, window=8), AdaKV(SnapKV(budget=60, window=8))):
            if window == 24 or (isinstance(method, SnapKV) and method.keep):
                with prune(model, method):
                    assert generate(model, *batch, count=40).tolist() == expected.tolist(), method


def test_layers_with_a_window_and_layers_without(lively_model: Build) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    model, ids = lively_model("qwen2", **changes), tokens(1, NUM_TOKENS)
    expected = generate(model, ids, count=30)
    for method in (SnapKV(keep=1.0), AdaKV(SnapKV(keep=1.0))):
        with prune(model, method):
            assert generate(model, ids, count=30).tolist() == expected.tolist()
    with prune(model, SnapKV(budget=60, window=8)):
        assert [layer.held for layer in model(ids).past_key_values.layers] == [60, 23, 23]
    with prune(model, Rerotate(HALF)), pytest.raises(ValueError, match=r"its layers keep 23 to 45 tokens"):
        model(ids)


# -- what was evicted is not seen, what was kept stands where it stood -------------------------------------------------


def check_generated(model: PreTrainedModel, method: Any, ids: Tensor, mask: Tensor, sequences: list[Tensor]) -> None:
    """Logits and tokens of a generation inside a session, sequence by sequence, against the reference."""
    first: dict[str, Any] = {}

    def remember(module: Any, args: Any, output: Any) -> None:
        first.setdefault("kept", [models.kept(output.past_key_values, b, len(s)) for b, s in enumerate(sequences)])

    handle = model.register_forward_hook(remember)
    try:
        with prune(model, method):
            out = generate(model, ids, mask, 6, return_dict_in_generate=True, output_logits=True)
    finally:
        handle.remove()
    logits = torch.stack(out.logits, 1)  # [B, 6, V]
    reference = models.Reference(model)
    for b, sequence in enumerate(sequences):
        context = reference.prefill(sequence)
        models.close(logits[b, 0], context.logits[-1], TOLERANCE)
        columns = first["kept"][b]
        positions = [[list(range(len(head))) for head in layer] for layer in columns] if method.traits.rotates else None
        if method.traits.rotates:
            columns = moved_columns(model, method, sequence)
        start = len(columns[0][0]) if method.traits.rotates else len(sequence)
        new = out.sequences[b, ids.shape[1] :]
        expected = reference.answer(context, columns, new[:-1], start, positions)
        models.close(logits[b, 1:], expected, TOLERANCE)
        assert expected.argmax(-1).tolist() == new[1:].tolist()
        total = sum(len(head) for layer in columns for head in layer)
        budgets = [method.num_kept(len(sequence), index, len(columns)) for index in range(len(columns))]
        assert total == sum(budgets) * len(columns[0])
        assert total < len(sequence) * len(columns) * len(columns[0])


def moved_columns(model: PreTrainedModel, method: Rerotate, sequence: Tensor) -> Any:
    """The columns that the method inside keeps: where a cache was moved, its positions do not say."""
    with prune(model, method.method):
        cache = model(sequence[None]).past_key_values
    return models.kept(cache, 0, len(sequence))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_sees_the_kept_tokens(lively_model: Build, attention: str, name: str) -> None:
    ids = tokens(1, NUM_TOKENS)
    check_generated(lively_model("mistral", attention), METHODS[name], ids, torch.ones_like(ids), [ids[0]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["uniform", "ragged", "pyramid"])
def test_generation_of_a_batch_sees_each_sequences_kept_tokens(lively_model: Build, family: str, name: str) -> None:
    ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), (NUM_TOKENS, 61, 40), "left")
    check_generated(lively_model(family), METHODS[name], ids, mask, sequences)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_goes_on_behind_moved_keys(lively_model: Build, attention: str) -> None:
    model, method = lively_model("qwen2", attention), Rerotate(HALF)
    ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), (NUM_TOKENS, 61, 40), "left")
    check_generated(model, method, ids[:1], mask[:1], sequences[:1])
    check_generated(model, method, ids, mask, sequences)


@pytest.mark.parametrize("name", ["uniform", "ragged"])
def test_embeddings_generate_what_their_ids_do(lively_model: Build, name: str) -> None:
    model = lively_model("qwen2")
    ids, mask, _ = models.padded(tokens(2, NUM_TOKENS), (NUM_TOKENS, 40), "left")
    with prune(model, METHODS[name]):
        expected = generate(model, ids, mask)
        embeds = model.get_input_embeddings()(ids)
        found = model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    assert found.tolist() == expected.tolist()


def test_positions_go_on_behind_all_tokens_seen(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    seen: list[list[int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"].flatten().tolist())

    prune(model, HALF)  # looks once at how the model turns its keys
    handle = model.model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with prune(model, HALF):
            out = generate(model, ids, count=3, return_dict_in_generate=True)
            with_shift = len(seen)
            moved = model(ids).past_key_values
        with prune(model, Rerotate(HALF)):
            generate(model, ids, count=3)
    finally:
        handle.remove()
    everything = list(range(NUM_TOKENS))
    assert seen[:with_shift] == [everything, [NUM_TOKENS], [NUM_TOKENS + 1]]
    assert seen[with_shift + 1 :] == [everything, [45], [46]]
    cache = out.past_key_values
    assert cache.get_seq_length() == NUM_TOKENS + 2
    assert [layer.held for layer in cache.layers] == [45 + 2] * 3
    assert moved.get_seq_length() == NUM_TOKENS
    assert cache.get_mask_sizes(4, 0) == (45 + 2 + 4, 45)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_evicting_while_generating(lively_model: Build, attention: str) -> None:
    """The reference: at every step the tokens that the cache says it holds, at the positions that it says."""
    model, ids = lively_model("mistral", attention), tokens(1, 40)
    method = Decoding(Knorm(keep=1.0), budget=30, interval=5)
    reference = models.Reference(model)
    with prune(model, method), torch.no_grad():
        out = model(ids)
        cache, sequence = out.past_key_values, ids
        sizes = []
        for _ in range(20):
            sequence = torch.cat([sequence, out.logits[:, -1:].argmax(-1)], 1)
            before = [layer.all_positions() for layer in cache.layers]
            out = model(sequence[:, -1:], past_key_values=cache)
            sizes.append({layer.held for layer in cache.layers})
            keys_at_first_layer = cache.layers[0].keys
            at = cache.layers[0].all_positions()
            whole = reference.prefill(sequence[0])
            for g in range(2):
                places = at[0, g].tolist()
                expected = reference.turned(whole.keys[0][g, places], places)
                models.close(keys_at_first_layer[0, g], expected, TOLERANCE)
            assert before[0] is None or before[0].shape[2] >= 30
    assert all(len(size) == 1 for size in sizes)
    assert {min(size) for size in sizes} == set(range(30, 35))
    assert cache.get_seq_length() == 60


class Watching(ScoringMethod):
    """Keeps the tokens of the first positions, and remembers the queries that it was given in the first layer."""

    traits = Traits(reads_rotary=True)

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        if ctx.layer_idx == 0:
            WATCHED.append((q, ctx.cos, ctx.sin))
        return -torch.arange(k.shape[2], device=k.device).float().expand(k.shape[:3])


WATCHED: list[tuple[Tensor, Tensor, Tensor]] = []


def test_an_eviction_is_told_the_last_queries(lively_model: Build) -> None:
    """Also behind a turn of several tokens, and behind tokens that were taken back."""
    model, ids = lively_model("llama"), tokens(1, 60)
    reference, inner = models.Reference(model), model.model
    cache, sequence = DynamicCache(), ids[:, :20]
    WATCHED.clear()
    with prune(model, Decoding(Watching(keep=1.0), budget=18, interval=6)), torch.no_grad():
        model(sequence, past_key_values=cache)
        model(ids[:, 20:21], past_key_values=cache)
        model(ids[:, 21:24], past_key_values=cache)
        cache.crop(-1)
        sequence = ids[:, :23]
        for step in range(23, 60):
            new = ids[:, step : step + 1]
            sequence = torch.cat([sequence, new], 1)
            before = len(WATCHED)
            model(new, past_key_values=cache)
            for q, cos, sin in WATCHED[before:]:
                count = q.shape[2]
                assert count == (4 if before == 0 else 6)  # those since the prefill, or since the last eviction
                hidden = inner.layers[0].input_layernorm(inner.embed_tokens(sequence[0, -count:]))
                raw = inner.layers[0].self_attn.q_proj(hidden).view(count, 4, 12).transpose(0, 1)
                places = range(len(sequence[0]) - count, len(sequence[0]))
                for h in range(4):
                    models.close(q[0, h], reference.turned(raw[h].double(), places), TOLERANCE)
                expected_cos, expected_sin = inner.rotary_emb(hidden[None], torch.tensor([list(places)]))
                models.close(cos, expected_cos, TOLERANCE)
                models.close(sin, expected_sin, TOLERANCE)
    assert len(WATCHED) == 7


def test_padded_batches_do_not_shrink_while_generating(lively_model: Build) -> None:
    """They are refused before anything is generated; a cache that was padded before the session, at its first token."""
    model = lively_model()
    ids, mask, _ = models.padded(tokens(2, NUM_TOKENS), (NUM_TOKENS, 47), "left")
    for inner in (Knorm(keep=1.0), Knorm(keep=0.5)):
        method = Decoding(inner, budget=30, interval=1)
        with prune(model, method), pytest.raises(ValueError, match="cannot evict from a padded batch"):
            model(ids, attention_mask=mask)
        with prune(model, inner):
            cache = model(ids, attention_mask=mask).past_key_values
        with prune(model, method), pytest.raises(ValueError, match="cannot evict from a padded batch"):
            model(ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=cache)


# -- the model is left as it was ---------------------------------------------------------------------------------------


class Failing(ScoringMethod):
    """Raises in the layer ``at``."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        object.__setattr__(self, "keep", 0.5)
        object.__setattr__(self, "budget", None)
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "error", error)

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        if ctx.layer_idx == self.at:  # type: ignore[attr-defined]
            raise self.error("on purpose")  # type: ignore[attr-defined]
        return k.float().norm(dim=-1)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_model_as_it_was(
    lively_model: Build, attention: str, error: type[BaseException]
) -> None:
    model, ids = lively_model("llama", attention), tokens(1, NUM_TOKENS)
    before, expected = state(model), generate(model, ids)
    cache = DynamicCache()
    with pytest.raises(error, match="on purpose"), prune(model, Failing(1, error)):
        model(ids, past_key_values=cache)
    assert state(model) == before
    assert not any(layer.in_session for layer in cache.layers if isinstance(layer, UniformLayer))
    assert generate(model, ids).tolist() == expected.tolist()
    with prune(model, HALF):  # and a new session begins from nothing
        out = generate(model, ids, return_dict_in_generate=True)
    assert out.past_key_values.layers[2].num_kept == 45
    assert state(model) == before


def test_an_exception_inside_a_session_does_not_spoil_it(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    with prune(model, HALF):
        expected = generate(model, ids)
    with prune(model, HALF) as session:
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=torch.ones(1, 1, NUM_TOKENS, NUM_TOKENS))
        assert session._state.call is None
        assert generate(model, ids).tolist() == expected.tolist()


def test_the_innermost_session_prunes(lively_model: Build) -> None:
    model, other, ids = lively_model(), lively_model("qwen3"), tokens(1, NUM_TOKENS)
    before = state(model), state(other)

    def held() -> int:
        return model(ids).past_key_values.layers[0].held

    with prune(model, SnapKV(keep=0.5, window=8)):
        assert held() == 45
        with prune(model, SnapKV(budget=20, window=8)):
            assert held() == 20
            with prune(other, SnapKV(budget=11, window=8)):  # another model's does not count
                assert held() == 20
                assert other(ids).past_key_values.layers[0].held == 11
        assert held() == 45
        assert type(other(ids).past_key_values.layers[0]) is not UniformLayer
    assert (state(model), state(other)) == before
    assert type(model(ids).past_key_values.layers[0]) is not UniformLayer


def test_sessions_may_end_in_any_order(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    before = state(model)
    outer, inner = prune(model, SnapKV(budget=30, window=8)), prune(model, SnapKV(budget=20, window=8))
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert model(ids).past_key_values.layers[0].held == 20
    inner.__exit__(None, None, None)
    assert state(model) == before


def test_a_session_is_opened_once(lively_model: Build) -> None:
    model = lively_model()
    before = state(model)
    session = prune(model, HALF)
    with session:
        with pytest.raises(RuntimeError, match="open already"), session:
            pass
        assert model(tokens(1, NUM_TOKENS)).past_key_values.layers[0].held == 45
    assert state(model) == before
    with session:  # but again, once it has ended
        assert model(tokens(1, NUM_TOKENS)).past_key_values.layers[0].held == 45
    assert state(model) == before


def test_generate_outside_is_unaffected(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    expected = model(ids).logits
    with prune(model, HALF):
        pass
    assert torch.equal(model(ids).logits, expected)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_have_sessions_of_their_own(lively_model: Build) -> None:
    """Two threads prune by different methods, a third without a session gets the plain model's bits meanwhile."""
    model = lively_model("llama")
    ids, mask, _ = models.padded(tokens(2, NUM_TOKENS), (NUM_TOKENS, 47), "left")
    methods = [HALF, AdaKV(SnapKV(budget=30, window=8)), None]
    before, expected = state(model), []
    for method in methods:
        if method is None:
            expected.append(model(ids, attention_mask=mask).logits)
        else:
            with prune(model, method):
                expected.append(generate(model, ids, mask, 4))
    barrier, wrong, errors = Barrier(3), [], []

    def work(index: int) -> None:
        try:
            barrier.wait()
            for _ in range(12):
                method = methods[index]
                if method is None:
                    same = torch.equal(model(ids, attention_mask=mask).logits, expected[index])
                else:
                    with prune(model, method):
                        same = torch.equal(generate(model, ids, mask, 4), expected[index])
                if not same:
                    wrong.append(index)
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=work, args=(index,)) for index in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads take turns inside a layer, not only between passes
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert not wrong
    assert state(model) == before


@pytest.mark.parametrize("where", ["before", "behind", "layer"])
def test_a_session_may_end_amid_a_pass_of_another_thread(lively_model: Build, where: str) -> None:
    """torch has collected a module's hooks by then, but no longer knows that they take keyword arguments."""
    model, ids = lively_model("qwen2"), tokens(1, NUM_TOKENS)
    prune(model, HALF)  # the model has been looked at once, before anything waits in it
    expected = model(ids).logits
    reached, ended = Event(), Event()

    def wait(*_: Any) -> None:
        reached.set()
        assert ended.wait(20)

    module = model.model.layers[1].self_attn if where == "layer" else model.model
    handle = (module.register_forward_hook if where == "behind" else module.register_forward_pre_hook)(wait)
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(model(ids).logits)
        except Exception as error:
            found.append(error)

    thread = Thread(target=work)
    try:
        with prune(model, HALF):
            thread.start()
            assert reached.wait(20)
    finally:
        ended.set()
        thread.join()
        handle.remove()
    assert isinstance(found[0], Tensor), found[0]
    assert torch.equal(found[0], expected)


def test_a_copy_of_the_context_takes_the_session_along(lively_model: Build) -> None:
    model, ids, held = lively_model(), tokens(1, NUM_TOKENS), []

    def work() -> None:
        held.append(model(ids).past_key_values.layers[0])

    with prune(model, HALF):
        context = contextvars.copy_context()
        for target in (work, lambda: context.run(work)):
            thread = Thread(target=target)
            thread.start()
            thread.join()
    assert type(held[0]) is not UniformLayer
    assert held[1].held == 45


# -- caches and masks that come in -------------------------------------------------------------------------------------


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_a_users_cache_is_pruned_in_place(lively_model: Build, configured: bool, window: int | None) -> None:
    model, ids = lively_model("mistral", sliding_window=window), tokens(1, NUM_TOKENS)
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    with prune(model, SnapKV(budget=20, window=8)):
        out = model(ids, past_key_values=cache)
    assert out.past_key_values is cache
    assert [layer.held for layer in cache.layers] == [20] * 3
    assert cache.get_seq_length() == NUM_TOKENS
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    with prune(model, AdaKV(SnapKV(budget=20, window=8))):
        model(ids, past_key_values=cache)
    assert all(isinstance(layer, RaggedLayer) for layer in cache.layers)


def test_a_cache_that_was_filled_before_is_taken_over_as_it_is(lively_model: Build) -> None:
    """A prefill is a pass with an empty cache: a session that opens later prunes nothing, and changes nothing."""
    for window in (None, 40):
        model, ids = lively_model("mistral", sliding_window=window), tokens(1, NUM_TOKENS)
        plain, taken = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for cache in (plain, taken):
            model(ids[:, :80], past_key_values=cache)
        for step in ids[:, 80:].split(5, 1):
            expected = model(step, past_key_values=plain).logits
            with prune(model, HALF):
                models.close(model(step, past_key_values=taken).logits, expected, TOLERANCE)
        assert taken.get_seq_length() == NUM_TOKENS


def test_caches_that_cannot_be_pruned_are_refused(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    before = state(model)
    with prune(model, HALF):
        with pytest.raises(ValueError, match=r"StaticLayer, expected a DynamicCache or a PrunedCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=120))
        with pytest.raises(ValueError, match=r"StaticLayer, expected a DynamicCache"):
            generate(model, ids, cache_implementation="static")
        offloaded = DynamicCache()
        offloaded.offloading = True  # made so by offloading=True, which wants a GPU
        with pytest.raises(ValueError, match=r"cannot prune an offloaded cache .* expected a DynamicCache"):
            model(ids, past_key_values=offloaded)
    assert state(model) == before
    quantized = Cache(layers=[Fp8QuantizedLayer()])  # a growing layer, too, but not with keys in `keys` alone
    with pytest.raises(ValueError, match=r"type Fp8QuantizedLayer, expected a DynamicCache"):
        prunable_layer(quantized, 0)


def test_masks_that_say_too_much_are_refused(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(2, NUM_TOKENS)
    with prune(model, HALF):
        with pytest.raises(ValueError, match=r"expected \[B, tokens\] or None, to prune by"):
            model(ids, attention_mask=torch.ones(2, 1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril())
        mask = torch.ones_like(ids)
        mask[1, 30:33] = 0
        with pytest.raises(ValueError, match=r"sequence 1 has 87 tokens .* padding on the left or on the right"):
            model(ids, attention_mask=mask)


def test_flex_attention_is_refused(build_model: Build) -> None:
    model = build_model()
    model.config._attn_implementation = "flex_attention"
    before = state(model)
    with (
        pytest.raises(ValueError, match=r"'flex_attention' cannot be pruned, expected one of sdpa, eager"),
        prune(model, HALF),
    ):
        pass
    assert state(model) == before


def test_what_is_no_method_or_no_decoder_is_refused(lively_model: Build) -> None:
    for bad in (None, "snapkv", SnapKV):
        with pytest.raises(TypeError, match=r"expected a pruning method such as SnapKV\(keep=0.25\)"):
            prune(lively_model(), bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model: Linear has no embed_tokens, .*; supported are Mistral"):
        prune(torch.nn.Linear(2, 2), HALF)  # type: ignore[arg-type]


def test_a_budget_below_the_window_is_refused_and_a_short_prompt_is_kept(lively_model: Build) -> None:
    model, method = lively_model(), SnapKV(keep=0.25, window=16)
    with prune(model, method):
        with pytest.raises(ValueError, match=r"10 of 40 tokens in layer 0, fewer than the 16 .* at least 0.400"):
            model(tokens(1, 40))
        assert model(tokens(1, 12)).past_key_values.layers[0].held == 12  # all of it is the window
        assert model(tokens(1, 64)).past_key_values.layers[0].held == 16
        padded, mask, _ = models.padded(tokens(2, 64), (64, 12), "left")
        cache = model(padded, attention_mask=mask).past_key_values
        assert cache.layers[0].lengths.tolist() == [16, 16, 12, 12]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_without_a_cache_nothing_changes(lively_model: Build, attention: str) -> None:
    model = lively_model("llama", attention)
    ids, mask, _ = models.padded(tokens(2, NUM_TOKENS), (NUM_TOKENS, 30), "left")
    packed = torch.cat([torch.arange(50), torch.arange(40)])[None]
    holes = torch.ones_like(ids)
    holes[:, 20:25] = 0
    square = torch.zeros(1, 1, NUM_TOKENS, NUM_TOKENS)
    square[..., 7] = -math.inf  # all queries but one see something
    square[..., 7, 7] = 0
    cases: list[dict[str, Any]] = [
        {},
        {"attention_mask": mask},
        {"attention_mask": holes},
        {"attention_mask": square},
        {"position_ids": packed},
    ]
    for case in cases:
        given = ids[:1] if "position_ids" in case else ids
        expected = model(given, use_cache=False, **case).logits
        with prune(model, HALF):
            found = model(given, use_cache=False, **case)
        assert found.past_key_values is None
        real = torch.ones_like(given, dtype=torch.bool)  # what padding computes is nobody's business
        if "attention_mask" in case and case["attention_mask"].dim() == 2:
            real = case["attention_mask"].bool()
        assert torch.equal(found.logits[real], expected[real]), list(case)
    expected = generate(model, ids, mask, 4)
    with prune(model, HALF):
        assert generate(model, ids, mask, 4, use_cache=False).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["uniform", "ragged"])
def test_gradients_flow_through_a_prefill(lively_model: Build, name: str) -> None:
    """What the prefill computes does not depend on what is kept behind it: neither do its gradients."""
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    grads = []
    for method in (None, METHODS[name]):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        if method is None:
            model(inputs_embeds=embeds).logits.square().sum().backward()
        else:
            with prune(model, method):
                out = model(inputs_embeds=embeds)
                out.logits.square().sum().backward()
                again = model.get_input_embeddings()(ids[:, :1]).detach().requires_grad_()
                model(inputs_embeds=again, past_key_values=out.past_key_values)
            assert not any(layer.keys.requires_grad for layer in out.past_key_values.layers if name == "ragged")
        grads.append(embeds.grad)
    assert torch.equal(*grads)
    model.zero_grad(set_to_none=True)


def test_attention_weights_are_still_to_be_had(lively_model: Build) -> None:
    model, ids = lively_model("llama", "eager"), tokens(1, NUM_TOKENS)
    expected = model(ids, output_attentions=True).attentions
    with prune(model, HALF):
        out = generate(model, ids, count=2, output_attentions=True, return_dict_in_generate=True)
    for found, weights in zip(out.attentions[0], expected, strict=True):
        assert torch.equal(found, weights)
    assert out.attentions[1][0].shape == (1, 4, 1, 46)


def test_a_rotary_embedding_that_is_not_understood_is_refused_where_it_is_needed(build_model: Build) -> None:
    model = build_model()
    own = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: own(x, position_ids**2)
    prune(model, HALF)  # needs no rotary embedding
    for method in (Rerotate(HALF), ExpectedAttention(keep=0.5)):
        with pytest.raises(ValueError, match=r"layer 0 of MistralForCausalLM do not move .*; supported: rotary"):
            prune(model, method)


# -- nothing is left behind --------------------------------------------------------------------------------------------


def test_sessions_leak_nothing(build_model: Build) -> None:
    """Objects, hooks and tensors after 200 cycles are those after 20."""
    model = build_model(num_hidden_layers=1, max_position_embeddings=512)
    ids = tokens(1, 40)
    before = state(model)

    def cycle() -> weakref.ref[Any]:
        with prune(model, AdaKV(HALF)) as session:
            generate(model, ids, count=3)
        return weakref.ref(session)

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is Tensor]
        return len(gc.get_objects()), len(tensors)

    for _ in range(20):
        cycle()
    objects, tensors = alive()
    sessions = [cycle() for _ in range(180)]
    objects_after, tensors_after = alive()
    assert all(session() is None for session in sessions)
    assert tensors_after <= tensors
    assert objects_after - objects < 360, "less than two objects a cycle, of which the weak references are one"
    assert state(model) == before
    names = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if name.startswith("condense_pruning|")]
    assert len(names) == len(set(names)) <= 4


# -- devices -----------------------------------------------------------------------------------------------------------


def test_a_model_that_accelerate_dispatched(build_model: Build, tmp_path: Path) -> None:
    """One layer's weights are loaded for each call from the disk, one's from the CPU's state: hooks around modules."""
    accelerate = pytest.importorskip("accelerate")
    plain, model = build_model("llama", max_position_embeddings=512), build_model("llama", max_position_embeddings=512)
    ids = tokens(1, NUM_TOKENS)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert model.model.layers[1].self_attn.o_proj.weight.device.type == "meta"
    for method in (HALF, AdaKV(HALF)):
        with prune(plain, method):
            expected = generate(plain, ids)
        with prune(model, method):
            assert generate(model, ids).tolist() == expected.tolist()
