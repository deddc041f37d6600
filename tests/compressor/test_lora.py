"""Adapters: what is trained is what is saved, merging equals applying, and nothing unfit is merged in part."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.compressor import lora
from condense_core.compressor.encoder import Encoder

# fp32. The adapters under test hold values that bf16 can hold, so that saving loses nothing and what remains is the
# order of sums, x W' + x B A against x (W' + B A), through two layers.
TOLERANCES = {"forward": {"atol": 2e-4, "rtol": 2e-4}, "weights": {"atol": 1e-6, "rtol": 1e-6}}
RANK, ALPHA = 4, 6.0
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

Build = Callable[..., PreTrainedModel]


@pytest.fixture
def model(build_model: Build) -> PreTrainedModel:
    return build_model()


def attached(model: PreTrainedModel) -> Encoder:
    """An encoder of two layers whose adapters are as after training: B is not zero."""
    encoder = Encoder(model, 2)
    with torch.no_grad():
        for i, parameter in enumerate(lora.attach(encoder.layers, RANK, ALPHA)):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.copy_((noise * 0.2).bfloat16())
    return encoder


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    """An adapter of two layers as it is saved."""
    lora.save(attached(model).layers, tmp_path, rank=RANK, alpha=ALPHA, base_model="maker/model")
    return tmp_path


@torch.no_grad()
def run(encoder: Encoder, model: PreTrainedModel) -> Tensor:
    ids = torch.arange(0, 150, 10)
    return encoder(model.model.embed_tokens(ids), [0, len(ids)])[0]


def edit(folder: Path, **changes: object) -> None:
    path = folder / lora.CONFIG_NAME
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(model: PreTrainedModel) -> None:
    encoder = Encoder(model, 2)
    plain = run(encoder, model)
    parameters = lora.attach(encoder.layers, RANK, ALPHA)
    assert len(parameters) == 2 * 2 * len(lora.TARGETS)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    assert torch.equal(run(encoder, model), plain)
    assert not torch.allclose(run(attached(model), model), plain, atol=0.1)


def test_merging_what_was_saved_equals_applying_the_adapter(model: PreTrainedModel, folder: Path) -> None:
    merged = Encoder(model, 2)
    lora.merge(merged.layers, folder)
    torch.testing.assert_close(run(merged, model), run(attached(model), model), **TOLERANCES["forward"])


def test_the_decoders_weights_stay(model: PreTrainedModel, folder: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attached(model)
    merged = Encoder(model, 2)
    lora.merge(merged.layers, folder)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    own = model.model.layers[0]
    assert merged.layers[0].mlp.up_proj.weight.data_ptr() != own.mlp.up_proj.weight.data_ptr()
    assert merged.layers[0].input_layernorm.weight is own.input_layernorm.weight  # only what changed has its own memory


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, ALPHA / RANK), (True, ALPHA / math.sqrt(RANK))])
def test_the_scale_of_a_merged_adapter(model: PreTrainedModel, folder: Path, use_rslora: bool, scaling: float) -> None:
    edit(folder, use_rslora=use_rslora)
    tensors = load_file(folder / lora.WEIGHTS_NAME)
    merged = Encoder(model, 2)
    lora.merge(merged.layers, folder)
    delta = tensors[f"{Q0}.lora_B.weight"].float() @ tensors[f"{Q0}.lora_A.weight"].float()
    expected = model.model.layers[0].self_attn.q_proj.weight + scaling * delta
    torch.testing.assert_close(merged.layers[0].self_attn.q_proj.weight, expected, **TOLERANCES["weights"])


def test_an_adapter_that_was_saved_is_trained_on(model: PreTrainedModel, folder: Path) -> None:
    encoder = Encoder(model, 2)
    parameters = lora.attach(encoder.layers, RANK, ALPHA)
    lora.load(encoder.layers, folder)
    expected = attached(model)
    embeds = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(encoder(embeds, [0, 9])[0], expected(embeds, [0, 9])[0], **TOLERANCES["forward"])
    assert all(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize(("layers", "rank"), [(1, RANK), (2, RANK + 1)], ids=["fewer layers", "another rank"])
def test_an_adapter_for_others_is_not_trained_on(model: PreTrainedModel, folder: Path, layers: int, rank: int) -> None:
    encoder = Encoder(model, layers)
    lora.attach(encoder.layers, rank, ALPHA)
    with pytest.raises(ValueError, match=r"the adapter does not fit the attached one: .*lora_A.weight is another"):
        lora.load(encoder.layers, folder)


def test_files_have_the_names_and_shapes_of_peft(model: PreTrainedModel, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(folder / "adapter_model.safetensors")
    linears = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert set(tensors) == {
        f"base_model.model.model.layers.{layer}.{linear}.lora_{which}.weight"
        for layer in (0, 1)
        for linear in linears
        for which in "AB"
    }
    down = "base_model.model.model.layers.1.mlp.down_proj"
    assert tensors[f"{down}.lora_A.weight"].shape == (RANK, 64)
    assert tensors[f"{down}.lora_B.weight"].shape == (48, RANK)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, ALPHA)


def test_peft_loads_it(model: PreTrainedModel, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    expected = run(attached(model), model)
    theirs = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    torch.testing.assert_close(run(Encoder(theirs, 2), theirs), expected, **TOLERANCES["forward"])


def without(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / lora.WEIGHTS_NAME)
        del tensors[name]
        save_file(tensors, folder / lora.WEIGHTS_NAME)

    return spoil


def adding(name: str, *shape: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / lora.WEIGHTS_NAME)
        save_file(tensors | {name: torch.ones(shape, dtype=torch.bfloat16)}, folder / lora.WEIGHTS_NAME)

    return spoil


def setting(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **changes)


def writing(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def truncate(folder: Path) -> None:
    path = folder / lora.WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])


SPOILED = {
    "no config": lambda folder: (folder / lora.CONFIG_NAME).unlink(),
    "no weights": lambda folder: (folder / lora.WEIGHTS_NAME).unlink(),
    "config is no JSON": writing(lora.CONFIG_NAME, b"{"),
    "config is no table": writing(lora.CONFIG_NAME, b"[]"),
    "config is no text": writing(lora.CONFIG_NAME, b"\xff\xfe"),
    "weights are a pickle": writing(lora.WEIGHTS_NAME, b"\x80\x04K\x01."),
    "weights are truncated": truncate,
    "another kind": setting(peft_type="IA3"),
    "DoRA": setting(use_dora=True),
    "biases": setting(bias="all"),
    "rank 0": setting(r=0),
    "rank is text": setting(r="4"),
    "rank of other tensors": setting(r=8),
    "no alpha": setting(lora_alpha=...),
    "alpha is text": setting(lora_alpha="6"),
    "alpha by layer": setting(alpha_pattern={"q_proj": 1}),
    "rank by layer": setting(rank_pattern={"q_proj": 1}),
    **{f"begun as {start}": setting(init_lora_weights=start) for start in ("pissa", "pissa_niter_4", "olora", "corda")},
    **{f"begun as {start}": setting(init_lora_weights=start) for start in ("loftq", "lora_ga", "some new way")},
    "transposed": setting(fan_in_fan_out=True),
    "whole modules": setting(modules_to_save=["embed_tokens"]),
    "replicated layers": setting(layer_replication=[[0, 2], [1, 2]]),
    "trained tokens": setting(trainable_token_indices=[3, 4]),
    "biases of its own": setting(lora_bias=True),
    "bare parameters": setting(target_parameters=["mlp.experts.gate_up_proj"]),
    "something new": setting(use_the_next_thing=True),
    "half a pair": without(f"{Q0}.lora_B.weight"),
    "unknown tensor": adding(f"{Q0}.lora_magnitude_vector", 4),
    "another prefix": adding("transformer.h.0.attn.lora_A.weight", RANK, 48),
    "a layer too far": adding("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", RANK, 48),
    "too wide": adding(f"{Q0}.lora_A.weight", RANK, 50),
    "ranks of a pair differ": adding(f"{Q0}.lora_A.weight", RANK + 1, 48),
    "not a matrix": adding(f"{Q0}.lora_A.weight", RANK),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    model: PreTrainedModel, folder: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(folder)
    with pytest.raises(ValueError) as caught:
        lora.merge(Encoder(model, 2).layers, folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_merged_adapter_cannot_be_saved_again(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    """It would be written empty, and the copy would silently be another compressor."""
    merged = Encoder(model, 2)
    lora.merge(merged.layers, folder)
    with pytest.raises(ValueError, match="merged"):
        lora.save(merged.layers, tmp_path, rank=RANK, alpha=ALPHA, base_model="maker/model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which changes the base weights",
        ),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True, which this does not merge"),
    ],
)
def test_what_changes_an_adapter_s_meaning_is_named(
    model: PreTrainedModel, folder: Path, changes: dict[str, object], message: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        lora.merge(Encoder(model, 2).layers, folder)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_entries_that_are_off_or_start_on_the_base_are_fine(
    model: PreTrainedModel, folder: Path, start: object
) -> None:
    edit(folder, init_lora_weights=start, fan_in_fan_out=False, modules_to_save=None, loftq_config={}, new_thing=None)
    lora.merge(Encoder(model, 2).layers, folder)


def test_an_adapter_that_is_active_in_the_model_is_part_of_the_encoder(build_model: Build, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build_model(seed=4)
    bare = run(Encoder(model, 2), model)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings).eval()
    with pytest.raises(TypeError, match=r"got a PeftModel.*, expected the model inside it: pass model.get_base_model"):
        Encoder(wrapped, 2)
    inside = wrapped.get_base_model()
    found = run(Encoder(inside, 2), inside)
    with pytest.raises(ValueError, match="of the model carries an adapter already; expected a model without one"):
        lora.merge(Encoder(inside, 2).layers, folder)
    with wrapped.disable_adapter():
        torch.testing.assert_close(run(Encoder(inside, 2), inside), bare, **TOLERANCES["forward"])
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(found, run(Encoder(merged, 2), merged), **TOLERANCES["forward"])
    assert (found - bare).norm() > 0.01 * bare.norm()
