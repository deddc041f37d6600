"""A decoder's first layers from its files: the same as in the whole model, nothing else read, and damage refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from condense_core.decoder import shards
from condense_core.decoder.architecture import SUPPORTED, decoder_parts, hidden_behind
from condense_core.decoder.embedded import embedded_model_path
from condense_core.decoder.identity import model_digest, same_weights
from condense_core.decoder.partial import UnloadedDecoder, check_whole, open_first_layers, whole_depth
from condense_core.pruning import PrunedCache, SnapKV
from condense_core.tasks.architectures import FAMILIES, Family

Build = Callable[..., PreTrainedModel]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.arange(3, 23)[None]


def whole(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def first_layers(folder: Path, num_layers: int = 2, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return UnloadedDecoder(folder, device="cpu", dtype=dtype).load(num_layers)


# -- the same as in the whole model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in {*SUPPORTED} - {"Mixtral"}], ids=lambda f: f.name)
def test_the_first_layers_are_those_of_the_whole_model(family: Family, tmp_path: Path) -> None:
    family.build().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    full, part = whole(tmp_path), first_layers(tmp_path)
    assert (part.config.num_hidden_layers, len(decoder_parts(part).layers), whole_depth(part)) == (2, 2, 3)
    assert model_digest(part) == model_digest(full)
    weights, buffers = dict(full.named_parameters()), dict(full.named_buffers())
    assert all(torch.equal(p, weights[name]) for name, p in part.named_parameters())
    assert len(list(part.named_buffers())) == len(buffers)
    for name, buffer in part.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name])
    assert not any(t.is_meta or t.requires_grad for t in (*part.parameters(), *part.buffers()))
    assert not part.training
    torch.testing.assert_close(
        hidden_behind(part, 2, input_ids=IDS), hidden_behind(full, 2, input_ids=IDS), atol=0, rtol=0
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_digest_is_that_of_the_whole_model(
    build_model: Build, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    build_model(seed=1, vocab_size=700, tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size="50KB")
    found = model_digest(first_layers(tmp_path, 1, dtype))
    assert found == model_digest(whole(tmp_path, dtype))
    assert same_weights(found, model_digest(whole(tmp_path)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_digest_of_the_embedded_model(dtype: torch.dtype) -> None:
    part, tokenizer = open_first_layers("condense-tiny", 2, device="cpu", dtype=dtype)
    assert model_digest(part) == model_digest(whole(embedded_model_path(), dtype))
    assert len(tokenizer) == 4096


def test_the_digest_stays_with_the_weights(build_model: Build, tmp_path: Path) -> None:
    build_model("qwen2").save_pretrained(tmp_path)
    part = first_layers(tmp_path)
    digest = model_digest(part)
    part.to(torch.bfloat16)
    assert model_digest(part) == digest
    with torch.no_grad():
        decoder_parts(part).layers[0].mlp.up_proj.weight.mul_(1.1)
    assert not same_weights(model_digest(part), digest)


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_files_that_hold_both_of_two_tied_weights(build_model: Build, equal: bool, tmp_path: Path) -> None:
    """transformers ties them where they are equal, and else keeps both."""
    build_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / shards.SINGLE_NAME)
    embed = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embed.clone() if equal else embed + 1
    save_file(tensors, tmp_path / shards.SINGLE_NAME, metadata={"format": "pt"})
    assert model_digest(first_layers(tmp_path)) == model_digest(whole(tmp_path))


def test_files_of_an_inner_model(build_model: Build, tmp_path: Path) -> None:
    build_model(tie_word_embeddings=True).model.save_pretrained(tmp_path)
    full, part = whole(tmp_path), first_layers(tmp_path)
    assert model_digest(part) == model_digest(full)
    assert torch.equal(part.model.embed_tokens.weight, full.model.embed_tokens.weight)


# -- nothing else is read ----------------------------------------------------------------------------------------------


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, int], list[int]]]:
    """Bytes of the tensors that are read from safetensors files, by name; and of each piece that is."""
    tensors: dict[str, int] = {}
    pieces: list[int] = []
    original, pread = shards.safe_open, os.pread

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = original(*args, **kwargs)
            self.keys = self.inner.keys

        def __enter__(self) -> File:
            self.inner.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.inner.__exit__(*args)

        def get_tensor(self, name: str) -> torch.Tensor:
            tensors[name] = (found := self.inner.get_tensor(name)).nbytes
            return found

    def read(descriptor: int, count: int, offset: int) -> bytes:
        if offset != 8:  # the header
            pieces.append(count)
        return pread(descriptor, count, offset)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "safe_open", File)
        patch.setattr(shards.os, "pread", read)
        yield tensors, pieces


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_no_tensor_of_a_later_layer_or_of_the_head_is_read(
    build_model: Build, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(num_hidden_layers=8, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    with recorded(monkeypatch) as (tensors, pieces):
        part = first_layers(tmp_path, 2)
    read = {name for name in tensors if name.startswith(("model.layers.0.", "model.layers.1."))}
    assert {*tensors} - read == {"model.embed_tokens.weight", "model.norm.weight"}
    assert sum(tensors.values()) == sum(p.nbytes for p in part.parameters())
    assert sum(tensors.values()) < 0.5 * sum(p.nbytes for p in model.parameters())
    assert max(pieces) <= 64 * 4  # what the digest covers
    assert len(pieces) <= 5 * len(list(model.parameters()))


def test_weights_of_16_bits_are_not_copied_where_16_bits_are_wanted(build_model: Build, tmp_path: Path) -> None:
    build_model().bfloat16().save_pretrained(tmp_path)
    part = first_layers(tmp_path, dtype=torch.bfloat16)
    path = str(tmp_path / shards.SINGLE_NAME)
    spans = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path)]
    bounds = [tuple(int(end, 16) for end in span.split("-")) for span in spans]
    for name, parameter in part.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in bounds), name


# -- what a part cannot do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(IDS),
        lambda model: model.generate(IDS, max_new_tokens=2),
        lambda model: check_whole(model, "logits"),
    ],
    ids=["forward", "generate", "check"],
)
@pytest.mark.parametrize(("num_layers", "layers"), [(1, " and 2 of its 3 layers"), (3, "")])
def test_logits_are_refused(build_model: Build, tmp_path: Path, use: Any, num_layers: int, layers: str) -> None:
    build_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^logits: .* was loaded without its output head{layers}; load it whole$"):
        use(first_layers(tmp_path, num_layers))


def test_pruning_is_refused(build_model: Build, tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^pruning: the model .* was loaded without its output head"):
        PrunedCache.prefill(first_layers(tmp_path), IDS, SnapKV(keep=0.5, window=8))


def test_a_whole_model_passes_the_check(build_model: Build) -> None:
    check_whole(build_model(), "logits")
    assert whole_depth(build_model()) == 3


# -- bad files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(build_model: Build, tmp_path: Path) -> Path:
    """A model of several files."""
    build_model().save_pretrained(tmp_path / "model", max_shard_size="50KB")
    return tmp_path / "model"


def damage_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / shards.INDEX_NAME
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def rename_in_index(filename: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        outside = folder.parent / "x.safetensors"
        shutil.copy(next(folder.glob("*.safetensors")), outside)  # it is there, and must not be read all the same
        damage_index(folder, lambda c: c["weight_map"].update({"model.norm.weight": filename.format(folder=folder)}))

    return damage


def truncate(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-7])


def drop(name: str) -> Callable[[Path], None]:
    """Take a tensor out of the file that the index names for it."""

    def damage(folder: Path) -> None:
        filename = json.loads((folder / shards.INDEX_NAME).read_text())["weight_map"][name]
        tensors = load_file(folder / filename)
        del tensors[name]
        save_file(tensors, folder / filename)

    return damage


def change_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        filename = json.loads((folder / shards.INDEX_NAME).read_text())["weight_map"]["model.norm.weight"]
        tensors = load_file(folder / filename)
        tensors["model.norm.weight"] = change(tensors["model.norm.weight"])
        save_file(tensors, folder / filename)

    return damage


def no_weights(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / shards.INDEX_NAME):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(truncate, r"model-\d+-of-\d+.safetensors: Error while deserializing header", id="truncated"),
        pytest.param(
            drop("model.layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.weight is not in it", id="absent"
        ),
        pytest.param(
            lambda f: damage_index(f, lambda c: c["weight_map"].pop("lm_head.weight") and None),
            "1 weights that its config asks for are missing, such as lm_head.weight",
            id="not in the index",
        ),
        pytest.param(rename_in_index("gone.safetensors"), "names gone.safetensors, which is not here", id="no file"),
        pytest.param(rename_in_index("../x.safetensors"), "norm.weight in '../x.safetensors', expected", id="above"),
        pytest.param(rename_in_index("{folder}/../x.safetensors"), "expected a .safetensors file in", id="absolute"),
        pytest.param(rename_in_index("..\\\\x.safetensors"), "expected a .safetensors file in", id="backslash"),
        pytest.param(rename_in_index("model.bin"), "in 'model.bin', expected a .safetensors file", id="pickle"),
        pytest.param(lambda f: damage_index(f, lambda c: {"weight_map": 3}), "is damaged", id="no map"),
        pytest.param(lambda f: (f / shards.INDEX_NAME).write_bytes(b"\xff{"), "is damaged", id="no json"),
        pytest.param(no_weights, "only safetensors are read", id="no weights"),
        pytest.param(change_tensor(lambda t: t[:-1].clone()), r"has the shape \[47\], expected \[48\]", id="shape"),
        pytest.param(change_tensor(lambda t: t.to(torch.int8)), "is of I8, expected F64, F32", id="integers"),
        pytest.param(lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter lies beside", id="adapter"),
    ],
)
def test_damaged_files_are_refused_in_one_line(folder: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=reason) as refused:
        first_layers(folder)
    assert str(refused.value).startswith(f"model: cannot load {str(folder)!r} (")
    assert "\n" not in str(refused.value)


def test_another_layout_is_refused(tmp_path: Path) -> None:
    next(f for f in FAMILIES if f.name == "Mixtral").build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hold weights such as .*experts.* in another layout; load it whole"):
        first_layers(tmp_path)


def test_quantized_weights_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="its weights are quantized; load it whole"):
        first_layers(folder)


@pytest.mark.parametrize("num_layers", [-1, 4])
def test_so_many_layers_are_refused(folder: Path, num_layers: int) -> None:
    with pytest.raises(ValueError, match=f"^num_layers: got {num_layers}, expected 0 to 3, the layers of "):
        first_layers(folder, num_layers)


def test_a_hub_id_comes_from_the_cache(build_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants
    import transformers.utils.hub as hub

    commit = "0123456789012345678901234567890123456789"
    cached = tmp_path / "models--maker--small"
    build_model().save_pretrained(cached / "snapshots" / commit, max_shard_size="50KB")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    for module, name in ((constants, "HF_HUB_CACHE"), (hub.constants, "HF_HUB_CACHE")):
        monkeypatch.setattr(module, name, str(tmp_path))
    part = UnloadedDecoder("maker/small", device="cpu").load(1)
    assert model_digest(part) == model_digest(build_model())
    assert part.name_or_path == "maker/small"


def test_weights_kept_in_32_bits_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"input_layernorm"})
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        nn.init.normal_(layer.input_layernorm.weight)
    model.save_pretrained(tmp_path)
    part, full = first_layers(tmp_path, 1, torch.bfloat16), whole(tmp_path, torch.bfloat16)
    assert model_digest(part) == model_digest(full)
    own, expected = (m.model.layers[0].input_layernorm.weight for m in (part, full))
    assert own.dtype == expected.dtype == torch.float32
    assert torch.equal(own, expected)
