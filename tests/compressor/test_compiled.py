"""Compiled layers: what they compute, how often they are compiled, and when they are not used."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from condense_core.compressor.compiled import MODES, CompiledLayers, bucket
from condense_core.compressor.condenser import Condenser
from condense_core.compressor.encoder import Encoder
from condense_core.compressor.packed import Packing
from condense_core.compressor.quantized import quantize_linears

# fp32 through up to four layers whose activations are of order 1 to 10; a padded product may sum in another order.
TOLERANCES = {"atol": 1e-4, "rtol": 1e-4}
Build = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packs(count: int = 10, longest: int = 60) -> list[list[int]]:
    """Lists of lengths, all different, with empty sequences among them."""
    draw = random.Random(0)
    return [
        [*(draw.randint(0, longest) for _ in range(draw.randint(0, 6))), draw.randint(2, longest)] for _ in range(count)
    ]


def embeds_of(model: PreTrainedModel, lengths: list[int]) -> Tensor:
    ids = torch.randint(400, (sum(lengths),), generator=torch.Generator().manual_seed(len(lengths)))
    return model.get_input_embeddings()(ids).detach()


def compiled(
    model: PreTrainedModel, mode: str, backend: str = "aot_eager"
) -> tuple[Encoder, CompileCounterWithBackend]:
    encoder, counter = Encoder(model, len(model.model.layers)), CompileCounterWithBackend(backend)
    encoder.compile_layers(mode, backend=counter)
    return encoder, counter


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_ten_lists_of_lengths_are_compiled_at_most_twice(build_model: Build, backend: str, mode: str) -> None:
    model = build_model()
    encoder, counter = compiled(model, mode, backend)
    plain = Encoder(model, len(model.model.layers))
    for lengths in packs():
        embeds, ends = embeds_of(model, lengths), [0, *accumulate(lengths)]
        torch.testing.assert_close(encoder(embeds, ends)[0], plain(embeds, ends)[0], **TOLERANCES)
    assert 1 <= counter.frame_count <= 2


FAMILIES = {
    "window": ("mistral", {"sliding_window": 5}),
    "full and sliding layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "norms of queries and keys": ("qwen3", {}),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_families(build_model: Build, family: tuple[str, dict]) -> None:
    model = build_model(family[0], **family[1])
    encoder, counter = compiled(model, "reduce-overhead", "eager")
    for lengths in packs(3):
        embeds, ends = embeds_of(model, lengths), [0, *accumulate(lengths)]
        plain = Encoder(model, len(model.model.layers))(embeds, ends)[0]
        torch.testing.assert_close(encoder(embeds, ends)[0], plain, **TOLERANCES)
    assert counter.frame_count


@torch.no_grad()
def test_weights_in_8_bits(build_model: Build) -> None:
    model = build_model()
    encoder, counter = compiled(model, "default", "eager")
    quantize_linears(encoder.layers, "int8")  # behind: compiled layers share their submodules with these
    embeds = embeds_of(model, [9, 4])
    found = encoder(embeds, [0, 9, 13])[0]
    assert counter.frame_count == 1
    encoder._compiled = None
    torch.testing.assert_close(found, encoder(embeds, [0, 9, 13])[0], **TOLERANCES)


def test_gradients_take_the_layers_as_they_are(build_model: Build) -> None:
    encoder, counter = compiled(build_model(), "default")
    embeds = embeds_of(build_model(), [9, 4]).requires_grad_()
    encoder(embeds, [0, 9, 13])[0].sum().backward()
    assert embeds.grad is not None
    assert not counter.frame_count


@torch.no_grad()
def test_who_observes_or_continues_is_not_compiled(build_model: Build) -> None:
    model = build_model()
    encoder, counter = compiled(model, "default")
    embeds, seen = embeds_of(model, [9, 4]), []
    encoder.read(embeds, Packing([0, 9, 13], observe=lambda layer, _: seen.append(layer)))
    encoder.read(embeds, Packing([0, 9, 13], parents=[None, 0]))
    assert seen == list(range(len(model.model.layers)))
    assert not counter.frame_count


def test_buckets_waste_a_fifth_at_most() -> None:
    sizes = sorted({bucket(n) for n in range(1, 32_769)})
    assert sizes[:6] == [64, 80, 96, 112, 128, 160]
    assert len(sizes) == 37
    for n in range(65, 32_769):
        assert n <= bucket(n) < 1.25 * n


@pytest.mark.parametrize("lengths", [[100], [70, 0, 3], [9] * 9, [1], [64], [0, 0, 5]], ids=str)
def test_a_pack_is_filled_up_with_sequences_of_padding(build_model: Build, lengths: list[int]) -> None:
    encoder, _ = compiled(build_model(), "reduce-overhead")
    layers = CompiledLayers(encoder._cut[0], encoder.layers, "reduce-overhead", "eager")
    embeds = torch.randn(sum(lengths), 8)
    filled, packing = layers.fill(embeds, Packing([0, *accumulate(lengths)]))
    assert filled.shape == (1, bucket(sum(lengths)), 8)
    assert torch.equal(filled[0, : len(embeds)], embeds)
    assert not filled[0, len(embeds) :].any()
    assert packing.cu_seqlens[-1] == filled.shape[1]
    real = [n for n in lengths if n]
    assert packing.lengths[: len(real)] == real
    assert max(packing.lengths) == max(real), "padding takes no position that no text has"
    assert packing.fixed is not None
    ends = packing.fixed.offsets.tolist()
    assert [b - a for a, b in pairwise(ends) if b > a] == packing.lengths
    assert max(real) <= packing.fixed.longest < 2 * max(real)
    assert (len(ends) - 1).bit_count() == packing.fixed.longest.bit_count() == 1, "few shapes come"


@pytest.mark.parametrize("mode", MODES)
def test_a_condenser_compiles_its_encoder(lively: Condenser, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[str] = []
    compile_layers = Encoder.compile_layers

    def eagerly(self: Encoder, mode: str, *, backend: str = "inductor") -> None:
        backends.append(mode)
        compile_layers(self, mode, backend="eager")

    monkeypatch.setattr(Encoder, "compile_layers", eagerly)
    options = {"method": "mean", "encoder_layers": 2}
    made = Condenser(lively.model, lively.tokenizer, compile_encoder=mode, **options)
    assert backends == [mode]
    plain = Condenser(lively.model, lively.tokenizer, **options)
    for text in ("The lamps are counted at dusk. " * 5, "The keeper writes."):
        found, expected = made.compress(text, ratio=4), plain.compress(text, ratio=4)
        torch.testing.assert_close(found.embeds, expected.embeds, **TOLERANCES)


@pytest.mark.parametrize("encoder_only", [False, True])
def test_an_unknown_mode_is_refused_before_anything_is_loaded(encoder_only: bool) -> None:
    expected = "expected one of default, reduce-overhead, max-autotune-no-cudagraphs$"
    with pytest.raises(ValueError, match=f"^compile_encoder: got 'fast', {expected}"):
        Condenser.from_pretrained("nowhere", compile_encoder="fast", encoder_only=encoder_only)


def test_what_cannot_be_compiled_is_refused(lively: Condenser) -> None:
    with pytest.raises(ValueError, match=r"^compile_encoder: got 'default' for the method 'select', "):
        Condenser(lively.model, lively.tokenizer, method="select", compile_encoder="default")
    with pytest.raises(
        ValueError, match=r"^compile_encoder: got 'default' for a live compressor, which stays as it is"
    ):
        Condenser(lively.model, lively.tokenizer, compressor=lively.compressor, compile_encoder="default")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_inductor(build_model: Build, mode: str) -> None:
    """The real compiler, on the CPU; it records no graphs there."""
    model = build_model()
    encoder, plain = Encoder(model, 2), Encoder(model, 2)
    encoder.compile_layers(mode)
    for lengths in packs(4):
        embeds, ends = embeds_of(model, lengths), [0, *accumulate(lengths)]
        torch.testing.assert_close(encoder(embeds, ends)[0], plain(embeds, ends)[0], **TOLERANCES)
