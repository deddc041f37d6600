"""docs/models.md is what the code does, for every family; the supported ones work, others are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from condense_core.compressor.encoder import Encoder
from condense_core.decoder.architecture import SUPPORTED, decoder_parts
from condense_core.decoder.logits import decoder_logits
from condense_core.pruning import SnapKV, prune
from condense_core.tasks.architectures import FAMILIES, USES, Family, document, failure

BY_NAME = {family.name: family for family in FAMILIES}
WORKING = [*SUPPORTED, "Cohere2", "GPT-OSS", "OLMo3", "GLM4 (partial RoPE)", "Granite MoE", "DeepSeek-V3"]
REFUSED = {
    "Doge": "DogeForCausalLM cannot be an encoder (attention: DogeAttention computes a mask of its own)",
    "DiffLlama": "DiffLlamaForCausalLM cannot be an encoder (",
    "Llama4": "masks with a window of 8192 tokens and gives its attention one of None",
    "Nemotron": "NemotronAttention does not pass on what its model is called with",
    "nanochat": "NanoChatForCausalLM cannot be an encoder (in a pack its hidden states are off by",
    "Phi": "PhiForCausalLM has no norm where expected",
    "GPT-NeoX": "GPTNeoXForCausalLM has no embed_tokens, layers, norm, rotary_emb where expected",
    "MiniMax": "1 of its first 2 layers attend through transformers' attention interface",
}


def test_the_document_is_what_the_code_does() -> None:
    written = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
    assert written == document(), "run python -m condense_core.tasks.architectures > docs/models.md"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_families_work(name: str, use: str) -> None:
    assert failure(BY_NAME[name], use) is None


@torch.no_grad()
@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_encoder_is_the_model_s_own_first_layers(name: str, num_layers: int) -> None:
    """On 90 tokens, beyond the windows of 8, and in a pack behind another sequence; before the final norm."""
    model = BY_NAME[name].build()
    ids = torch.arange(5, 95) * 7 % 128
    inner, own = decoder_parts(model), []
    target = inner.layers[num_layers] if num_layers < 3 else inner.norm
    hook = target.register_forward_pre_hook(
        lambda _, args, kwargs: own.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model(ids[None])
    hook.remove()
    packed = inner.embed_tokens(torch.cat([ids[:33], ids]))
    found = Encoder(model, num_layers)(packed, [0, 33, 123])[0][33:]
    torch.testing.assert_close(found, own[0][0], atol=2e-4 * float(own[0].abs().max()), rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", WORKING)
def test_logits_of_some_rows_are_the_model_s_own(name: str) -> None:
    """Among them Cohere's and Granite's scale, and Gemma2's softcap."""
    model = BY_NAME[name].build()
    ids = torch.arange(5, 35)[None]
    own, hidden = model(ids).logits, decoder_parts(model)(input_ids=ids).last_hidden_state
    rows = torch.tensor([3, 17, 20])
    torch.testing.assert_close(decoder_logits(model, hidden[0, rows]), own[0, rows], atol=1e-5, rtol=1e-5)
    assert decoder_logits(model, hidden[:, :0]).shape == (1, 0, 128)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_an_encoder_is_refused_in_one_line(name: str) -> None:
    error = failure(BY_NAME[name], "compress")
    assert isinstance(error, TypeError)
    message = str(error)
    assert REFUSED[name] in message
    assert message.startswith("model: ")
    assert message.endswith("supported are " + ", ".join(SUPPORTED[:-1]) + " and Cohere")
    assert "\n" not in message


def test_a_model_that_trains_is_checked_without_dropout_and_goes_on_training() -> None:
    model = BY_NAME["Llama"].build(attention_dropout=0.5).train()
    Encoder(model, 2)
    assert all(module.training for module in model.modules())


def test_a_check_in_a_pruning_session_prunes_nothing() -> None:
    model = BY_NAME["Llama"].build()
    with prune(model, SnapKV(keep=0.5, window=8)):
        encoder = Encoder(model, 2)
    embeds = decoder_parts(model).embed_tokens(torch.arange(5, 95))
    torch.testing.assert_close(encoder(embeds, [0, 90])[0], Encoder(model, 2)(embeds, [0, 90])[0])


def test_a_model_is_checked_once_and_again_with_another_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Family("Llama", "Llama", BY_NAME["Llama"].settings).build()
    runs = []
    own = type(decoder_parts(model)).forward
    monkeypatch.setattr(
        type(decoder_parts(model)), "forward", lambda self, **given: runs.append(1) or own(self, **given)
    )
    Encoder(model, 2)
    first = len(runs)
    Encoder(model, 2)
    assert first == len(runs) == 2  # the model, and the encoder
    model.set_attn_implementation("eager")
    Encoder(model, 2)
    assert len(runs) == 4
