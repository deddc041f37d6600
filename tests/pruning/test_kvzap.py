"""KVzap: its fit against torch's least squares, and that it ranks as KVzip does on the texts it was fitted to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from condense_core.decoder.embedded import embedded_model_path
from condense_core.decoder.model import open_decoder
from condense_core.pruning import AcrossLayers, KVzap, KVzip, PrunedCache, text
from condense_core.pruning.build import build
from condense_core.pruning.dense import DensePrefill
from condense_core.pruning.methods.fitted import save_fitted
from condense_core.pruning.methods.kvzap import LEAST, SurrogateFit
from condense_core.pruning.surrogate import fit
from condense_core.tasks.generators import TaskConfig, make_tasks
from condense_core.tasks.sources import open_source


def test_the_fit_is_least_squares_with_a_ridge() -> None:
    torch.manual_seed(0)
    sizes, heads, width, ridge = (40, 25, 1), 2, 6, 0.05
    inputs = [[torch.randn(n, width) for _ in range(2)] for n in sizes]
    scores = [[torch.rand(heads, n) for _ in range(2)] for n in sizes]
    found = SurrogateFit()
    for own, wanted in zip(inputs, scores, strict=True):
        found.add(own, wanted)
    assert found.num_tokens == sum(sizes)
    solved = found.solve(ridge)
    for layer in range(2):
        x = torch.cat([F.rms_norm(own[layer], (width,)) for own in inputs])
        y = torch.cat([(wanted[layer] + LEAST).log() for wanted in scores], 1).mT
        # A ridge is a row of the square root of the penalty for each channel, whose target is 0.
        penalty = torch.cat([torch.eye(width) * (ridge * len(x)) ** 0.5, torch.zeros(width, 1)], 1)
        rows = torch.cat([torch.cat([x, torch.ones(len(x), 1)], 1), penalty]).double()
        expected = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(width, heads)]).double()).solution.mT
        torch.testing.assert_close(solved[layer].double(), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="texts: no token was added"):
        SurrogateFit().solve()
    with pytest.raises(ValueError, match="scores: not all finite"):
        SurrogateFit().add([torch.randn(2, 3)], [torch.tensor([[0.5, torch.inf]])])


@pytest.mark.slow
def test_it_foretells_what_kvzip_keeps(tmp_path: Path) -> None:
    """On texts it was not fitted to the two share most of what they keep, where chance would share half."""
    model, tokenizer = open_decoder(embedded_model_path())
    shape = TaskConfig(min_chars=1000, max_chars=1500, num_facts=4, num_questions=1)
    texts = [task.context for task in make_tasks("question", open_source(None), 8, seed=1, config=shape)]
    surrogate = fit(model, tokenizer, texts[:6])
    assert surrogate.shape[0] == model.config.num_hidden_layers
    save_fitted("kvzap", surrogate, tmp_path / "own.safetensors")
    method = build(f"across_layers(kvzap:{tmp_path / 'own.safetensors'})", keep=0.5)
    assert method == AcrossLayers(KVzap(keep=0.5, surrogate=surrogate))
    for held_out in texts[6:]:
        prompt = text.prompt_of(model, tokenizer, held_out)
        dense = DensePrefill(model, torch.tensor([prompt.input_ids]))
        wanted = torch.stack(dense.pass_scores(KVzip(keep=0.5, sink=0).for_prompt(prompt)))[..., prompt.text_start :]
        weights = surrogate[:, :, :-1]
        x = torch.stack([F.rms_norm(own.float(), own.shape[-1:]) for own in dense.layer_inputs])[:, prompt.text_start :]
        guessed = torch.einsum("ltd,lgd->lgt", x, weights) + surrogate[:, :, -1:]
        count = wanted.numel() // 2
        kept = [set(scores.flatten().topk(count).indices.tolist()) for scores in (wanted, guessed)]
        assert len(kept[0] & kept[1]) / count > 0.7
        cache = text.prefill(model, tokenizer, held_out, method)
        assert isinstance(cache, PrunedCache)
        assert 1.8 < cache.ratio < 2.2
