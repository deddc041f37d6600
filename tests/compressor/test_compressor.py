"""From token ids to soft tokens: counts, packs, segments, checkpoints, gradients, and exactly Mistral-7B."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import WEIGHTS_NAME, CompressorConfig, num_kept
from condense_core.training.plan import meta_model

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

TOLERANCES = {
    # fp32 through two layers with activations of order 1 to 10, SDPA in batches of another shape.
    "layers": {"atol": 2e-4, "rtol": 2e-4},
    # Every parameter under test is one that bf16 can hold; the norm of embeddings is rounded to it, by up to 2^-9.
    "saved": {"atol": 1e-3, "rtol": 2**-8},
    # fp32 sums of at most some hundred softmax weights.
    "scores": {"atol": 1e-6, "rtol": 1e-5},
}
RATIO = 4
METHODS = ("pool", "mixed", "select", "mean", "memory")
TRAINED = ("pool", "mixed", "mean", "memory")

Build = Callable[..., PreTrainedModel]


def make_config(method: str, **changes: object) -> CompressorConfig:
    fields: dict[str, object] = {
        "method": method,
        "d_model": 48,
        "encoder_layers": 2,
        "ratios": (1, 2, RATIO, 8),
        "num_heads": 4 if method in ("pool", "mixed") else 1,
        "window": 8 if method == "mixed" else 0,
        "residual": method == "mixed",
        "mlp_hidden": 24,
        "segment_tokens": 64 if method == "memory" else 0,
    }
    return CompressorConfig(**(fields | changes))


def trained(compressor: Compressor, seed: int = 1) -> Compressor:
    """Parameters as after training: none is zero, all hold values that bf16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in compressor.trainable_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_((parameter + noise).bfloat16())
    return compressor


@pytest.fixture(scope="module")
def model(build_model: Build) -> PreTrainedModel:
    return build_model()


@pytest.fixture(scope="module", params=METHODS)
def compressor(request: pytest.FixtureRequest, model: PreTrainedModel) -> Compressor:
    return trained(Compressor(model, make_config(request.param)))


def tokens(count: int) -> Tensor:
    """Ids that do not repeat, so that a row of embeddings tells its token."""
    return torch.randperm(400, generator=torch.Generator().manual_seed(0))[:count]


@torch.no_grad()
def compress(compressor: Compressor, ids: Tensor, lengths: list[int] | None = None, ratio: int = RATIO) -> Tensor:
    return compressor(ids, compressor.offsets(lengths or [len(ids)], ratio), ratio)


@pytest.mark.parametrize("method", ["pool", "mean"])
def test_untrained_it_is_mean_pooling_at_the_norm_of_embeddings(model: PreTrainedModel, method: str) -> None:
    compressor = Compressor(model, make_config(method, encoder_layers=0))
    ids = tokens(10)
    table = model.model.embed_tokens.weight.detach()
    embeds = table[ids]
    normed = embeds / (embeds.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    means = torch.stack([part.mean(0) for part in normed.split(RATIO)])
    expected = means / means.norm(dim=-1, keepdim=True) * table.norm(dim=-1).mean()
    torch.testing.assert_close(compress(compressor, ids), expected, **TOLERANCES["layers"])


@pytest.mark.parametrize("ratio", [1, RATIO, 8])
def test_n_tokens_give_exactly_ceil_n_over_ratio(compressor: Compressor, ratio: int) -> None:
    for count in {1, ratio - 1, ratio, ratio + 1, 100} - {0}:
        soft = compress(compressor, tokens(count), ratio=ratio)
        assert soft.shape == (-(-count // ratio), 48)
        assert soft.isfinite().all()


@pytest.mark.parametrize("lengths", [[9, 9], [13, 1, 4, 30]], ids=str)
def test_a_pack_equals_one_by_one(compressor: Compressor, lengths: list[int]) -> None:
    ids = tokens(sum(lengths))
    alone = [compress(compressor, part) for part in ids.split(lengths)]
    torch.testing.assert_close(compress(compressor, ids, lengths), torch.cat(alone), **TOLERANCES["layers"])


def test_a_text_beyond_the_positions_is_read_in_segments(build_model: Build, compressor: Compressor) -> None:
    short = Compressor(build_model(max_position_embeddings=32), compressor.config)
    short.load_state_dict(compressor.state_dict())
    ids = tokens(80)
    ends = short.offsets([80], RATIO)
    # Memory slots take positions too: 24 tokens and their 6 slots fit 32, 28 and 7 do not.
    assert ends == ([0, 24, 48, 72, 80] if short.memory else [0, 32, 64, 80])
    segments = [compress(compressor, ids[a:b]) for a, b in pairwise(ends)]
    assert len(torch.cat(segments)) == 20
    torch.testing.assert_close(compress(short, ids), torch.cat(segments), **TOLERANCES["layers"])


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 500), min_size=1, max_size=4),
    ratio=st.integers(1, 70),
    method=st.sampled_from(METHODS),
    limit=st.sampled_from([40, 64]),
)
def test_segments_cover_every_token_and_cut_at_multiples_of_the_ratio(
    model: PreTrainedModel, lengths: list[int], ratio: int, method: str, limit: int
) -> None:
    compressor = Compressor(model, make_config(method, encoder_layers=0, segment_tokens=limit, ratios=()))
    ends = compressor.offsets(lengths, ratio)
    starts = list(accumulate(lengths, initial=0))
    assert ends[0] == 0
    assert ends[-1] == starts[-1]
    assert set(starts) <= set(ends)
    assert all(a < b for a, b in pairwise(ends))
    for a, b in pairwise(ends):
        assert b - a <= max(limit, ratio)
        assert b in starts or (b - a) % ratio == 0
    assert sum(-(-(b - a) // ratio) for a, b in pairwise(ends)) == sum(-(-n // ratio) for n in lengths)


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_checkpoint_comes_back(model: PreTrainedModel, tmp_path: Path, method: str, rank: int) -> None:
    config = make_config(method, lora_rank=rank, lora_alpha=6.0, window_queries=method == "pool")
    before = Compressor(model, config)
    before.attach_lora()
    trained(before).save(tmp_path)
    after = Compressor(model, CompressorConfig.load(tmp_path))
    after.load_weights(tmp_path)
    assert after.config == before.config
    ids = tokens(30)
    for ratio in (RATIO, 8):
        expected = compress(before, ids, ratio=ratio)
        torch.testing.assert_close(compress(after, ids, ratio=ratio), expected, **TOLERANCES["saved"])
        untrained = compress(Compressor(model, config), ids, ratio=ratio)
        assert not torch.allclose(expected, untrained, atol=0.05)
    for tensor in load_file(tmp_path / WEIGHTS_NAME).values():
        assert tensor.dtype == (torch.bfloat16 if tensor.dim() else torch.float32)


def test_an_adapter_alone_is_not_forgotten(model: PreTrainedModel, tmp_path: Path) -> None:
    """The adapter's share of what comes back: without it the result is another."""
    compressor = Compressor(model, make_config("mean", lora_rank=3, lora_alpha=6.0))
    compressor.attach_lora()
    trained(compressor).save(tmp_path)
    plain = Compressor(model, make_config("mean"))
    plain.load_weights(tmp_path)
    assert not torch.allclose(compress(plain, tokens(30)), compress(compressor, tokens(30)), atol=0.05)


def spoil_weights(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-10])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    del tensors["projection.log_gain"]
    save_file(tensors, folder / WEIGHTS_NAME)


def widen_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file(tensors | {"projection.norm_weight": torch.ones(49)}, folder / WEIGHTS_NAME)


@pytest.mark.parametrize(
    "spoil",
    [spoil_weights, drop_tensor, widen_tensor, lambda folder: (folder / WEIGHTS_NAME).unlink()],
    ids=["truncated", "a tensor missing", "another shape", "no weights"],
)
def test_a_spoiled_checkpoint_is_refused_by_name(
    model: PreTrainedModel, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    compressor = Compressor(model, make_config("pool"))
    compressor.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError) as caught:
        compressor.load_weights(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_compressor_of_another_width(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="d_model: the compressor has 52, the model 48"):
        Compressor(model, make_config("pool", d_model=52))


@pytest.mark.parametrize(
    ("method", "window_queries"), [("pool", False), ("pool", True), ("mean", False), ("memory", False)]
)
def test_gradients_reach_everything_that_is_trained_and_nothing_else(
    build_model: Build, method: str, window_queries: bool
) -> None:
    model = build_model().requires_grad_(False)
    config = make_config(method, lora_rank=2, lora_alpha=2.0, window_queries=window_queries, ratios=(2, RATIO))
    compressor = Compressor(model, config)
    compressor.attach_lora()
    trained(compressor)
    parameters = compressor.trainable_parameters()
    decoder = {id(p) for p in model.parameters()}
    assert not decoder & {id(p) for p in parameters}
    target = torch.randn(48, generator=torch.Generator().manual_seed(2))
    for ratio in config.ratios:  # a batch trains the window bias of its own ratio
        ids = tokens(30)
        (compressor(ids, compressor.offsets([17, 13], ratio), ratio) @ target).sum().backward()
    names = {id(p): name for name, p in compressor.named_parameters()}
    for parameter in parameters:
        name = names[id(parameter)]
        assert parameter.grad is not None, name
        if name == "memory.embeds":  # the slots that these lengths use
            assert parameter.grad.any(1).sum() >= 9
        else:
            assert parameter.grad.any(), name
    assert all(p.grad is None for p in model.parameters())
    missed = {name for i, name in names.items() if i not in {id(p) for p in parameters}}
    assert not {name for name in missed if name.startswith(("projection", "memory"))}
    assert not {name for name in missed if "lora_" in name}


@pytest.mark.parametrize("ratio", [2, 2.5, 5])
@torch.no_grad()
def test_select_of_ids_alone_keeps_the_runs_that_surprise_most(build_model: Build, ratio: float) -> None:
    """Against the losses of the model's own logits, squared; of the first token, which has none, the others' mean."""
    model = build_model()
    compressor = Compressor(model, make_config("select", ratios=()))
    ids = tokens(101)
    soft = compress(compressor, ids, ratio=ratio)
    table = model.model.embed_tokens.weight[ids]
    kept = [(table == row).all(-1).nonzero().item() for row in soft]
    budget = num_kept(101, ratio)
    assert kept == sorted(set(kept))
    assert len(kept) == budget
    losses = torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
    scores = torch.cat([losses.mean()[None], losses]).square()
    means = [run.mean().item() for run in scores.split(16)]
    best = sorted(range(len(means)), key=lambda run: -means[run])
    for run in best[: budget // 16]:
        assert set(range(16 * run, min(16 * run + 16, 101))) <= set(kept)


def test_select_needs_layers(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="encoder_layers: got 0, expected at least 1 for the method 'select'"):
        compress(Compressor(model, make_config("select", encoder_layers=0)), tokens(9))


def test_exactly_mistral_7b_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of the real thing without its memory, its weights or a hub."""

    def no_hub(*_: object, **__: object) -> None:
        raise OSError("no hub")

    monkeypatch.setattr("condense_core.training.plan.AutoConfig.from_pretrained", no_hub)
    model = meta_model("mistralai/Mistral-7B-Instruct-v0.2")
    assert sum(p.numel() for p in model.parameters()) == 7_241_732_096
    config = CompressorConfig("pool", 4096, 8, ratios=(4, 8), num_heads=32, mlp_hidden=8192, lora_rank=32)
    with torch.device("meta"):
        compressor = Compressor(model, config)
    compressor.attach_lora()
    for ratio in (4, 8):
        ids = torch.zeros(1792, dtype=torch.long, device="meta")
        soft = compressor(ids, compressor.offsets([1792], ratio), ratio)
        assert (soft.shape, soft.is_meta, soft.dtype) == ((1792 // ratio, 4096), True, torch.bfloat16)
