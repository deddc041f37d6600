"""Padding and masks against loops; attention functions under a name of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_eager

from condense_core.pruning.attention import PREFIX, base_attention, switch, switch_back
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.masks import as_base_mask, visible
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.padding import Padding
from condense_core.pruning.session import prune
from condense_core.pruning.wrappers import AdaKV, PyramidKV

Build = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(
    ("rows", "bounds"),
    [
        (["1111", "1111"], None),
        (["0011", "1111"], [(2, 4), (0, 4)]),
        (["1100", "1110"], [(0, 2), (0, 3)]),
        (["0110", "1111"], [(1, 3), (0, 4)]),
        (["0000", "0001"], [(0, 0), (3, 4)]),
    ],
)
def test_padding_is_read_from_a_mask(rows: list[str], bounds: list[tuple[int, int]] | None) -> None:
    mask = torch.tensor([[int(c) for c in row] for row in rows])
    for kind in (torch.long, torch.bool, torch.float32):
        padding = Padding.of(mask.to(kind))
        if bounds is None:
            assert padding is None
            continue
        assert padding is not None
        assert padding.bounds.tolist() == [list(b) for b in bounds]
        assert padding.bounds.dtype == torch.int64
        assert padding.starts == tuple(start for start, _ in bounds)
        assert padding.lengths == tuple(stop - start for start, stop in bounds)
        assert torch.equal(padding.mask, mask.bool())


@pytest.mark.parametrize("row", ["1011", "0101", "1001"])
def test_padding_between_tokens_is_refused(row: str) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [int(c) for c in row]])
    with pytest.raises(ValueError, match=r"attention_mask: sequence 1 has .* expected them next to each other"):
        Padding.of(mask)


def test_a_mask_without_columns() -> None:
    assert Padding.of(torch.ones(2, 0)) is None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
@pytest.mark.parametrize("num_queries", [1, 4, 9])
def test_what_a_query_sees(num_queries: int, window: int | None, padded: bool) -> None:
    num_held = 9
    real = torch.ones(2, num_held, dtype=torch.bool)
    if padded:
        real[0, :3] = False
        real[1, 7:] = False
    found = visible(num_queries, num_held, torch.device("cpu"), real if padded else None, window)
    expected = torch.zeros(2, 1, num_queries, num_held, dtype=torch.bool)
    for b in range(2):
        for i in range(num_queries):
            query = num_held - num_queries + i
            for j in range(num_held):
                near = window is None or query - j < window
                expected[b, 0, i, j] = j == query or (j <= query and near and bool(real[b, j]))
    if found is None:  # plain causality: what scaled_dot_product_attention does by itself
        assert num_queries in (1, num_held)
        assert torch.equal(expected, torch.ones_like(expected).tril(num_held - num_queries))
    else:
        assert torch.equal(found.expand_as(expected), expected)
        assert found.any(-1).all()
    for dtype in (torch.float32, torch.float16):
        query_states = torch.zeros(2, 4, num_queries, 8, dtype=dtype)
        eager = as_base_mask(found, "eager", query_states, num_held)
        assert as_base_mask(found, "sdpa", query_states, num_held) is found
        if eager is None:
            assert num_queries == 1
            assert found is None
            continue
        assert eager.dtype == dtype
        low = torch.finfo(dtype).min
        assert torch.equal(eager.expand_as(expected), torch.where(expected, 0.0, low).to(dtype))


def test_functions_are_registered_once_under_a_name_of_their_own(build_model: Build) -> None:
    one, two = build_model(), build_model("llama", attn_implementation="sdpa")
    own = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    for model in (one, two, one):
        switch(model)
        assert model.config._attn_implementation == f"{PREFIX}sdpa"
    first = ALL_ATTENTION_FUNCTIONS[f"{PREFIX}sdpa"]
    switch_back(one)
    assert one.config._attn_implementation == f"{PREFIX}sdpa"  # a session is still open
    switch_back(one)
    switch_back(two)
    assert one.config._attn_implementation == two.config._attn_implementation == "sdpa"
    switch(two)
    assert ALL_ATTENTION_FUNCTIONS[f"{PREFIX}sdpa"] is first
    switch_back(two)
    assert (ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]) == own


def test_the_models_own_eager_attention_is_found(build_model: Build) -> None:
    attention = build_model("llama").model.layers[0].self_attn
    assert base_attention(attention, "eager") is llama_eager
    assert base_attention(attention, "sdpa") is ALL_ATTENTION_FUNCTIONS["sdpa"]

    class Changed(LlamaAttention):
        """A user's, defined where no eager function is."""

    attention.__class__ = Changed
    assert base_attention(attention, "eager") is llama_eager


def test_a_switched_model_without_a_session_is_the_plain_model(build_model: Build) -> None:
    for implementation in ("sdpa", "eager"):
        model = build_model("qwen3", attn_implementation=implementation)
        ids = torch.arange(3, 63)[None].repeat(2, 1)
        mask = torch.ones_like(ids)
        mask[1, :20] = 0
        cases: list[dict[str, Any]] = [{}, {"attention_mask": mask}, {"use_cache": False}]
        expected: list[Tensor] = [model(ids, **case).logits for case in cases]
        switch(model)
        try:
            for case, logits in zip(cases, expected, strict=True):
                assert torch.equal(model(ids, **case).logits, logits)
        finally:
            switch_back(model)


def flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float = 1.0, **kwargs: Any
) -> tuple[Tensor, None]:
    """What a flash attention is asked for: queries are the last of the keys, a mask says which keys are no padding."""
    batch, heads, num_queries, _ = query.shape
    num_held, window = key.shape[2], kwargs.get("sliding_window")
    assert mask is None or (mask.shape == (batch, num_held) and not mask.all())
    out = torch.zeros_like(query)
    for b in range(batch):
        for i in range(num_queries):
            last = num_held - num_queries + i
            first = 0 if window is None else max(0, last - window + 1)
            seen = torch.arange(first, last + 1)
            if mask is not None:
                seen = seen[mask[b, first : last + 1]]
            for h in range(heads):
                g = h * key.shape[1] // heads
                weights = (key[b, g, seen] @ query[b, h, i] * scaling).softmax(0)
                out[b, h, i] = weights @ value[b, g, seen]
    return out.transpose(1, 2), None


@pytest.mark.parametrize("window", [None, 12])
def test_a_flash_attention_is_asked_for_what_sdpa_computes(
    build_model: Build, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Needs no GPU: the stand-in takes what transformers' flash attentions take."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    options = {"sliding_window": window, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    models = [build_model(**options) for _ in range(2)]
    models[1].config._attn_implementation = "flash_attention_2"
    ids = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    whole = SnapKV(keep=1.0)
    cases = (
        (whole, None),
        (whole, mask),
        (SnapKV(keep=0.5, window=4), None),
        (AdaKV(SnapKV(keep=0.5, window=4)), mask),
    )
    with torch.no_grad():
        for method, given in cases:
            found = []
            for model in models:
                with prune(model, method):
                    found.append(
                        model.generate(
                            input_ids=ids,
                            attention_mask=torch.ones_like(ids) if given is None else given,
                            max_new_tokens=5,
                            do_sample=False,
                            pad_token_id=0,
                            eos_token_id=None,
                        )
                    )
            assert torch.equal(*found), method
        for method in (whole, SnapKV(keep=0.5, window=4), PyramidKV(SnapKV(keep=0.5, window=4), beta=3)):
            logits = []
            for model in models:
                cache = PrunedCache.prefill(model, ids[:1], method, chunk_size=10)
                with cache.attached(model):
                    logits.append(model(**cache.inputs(ids[1:, :5])).logits)
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert models[1].config._attn_implementation == "flash_attention_2"
