"""Text in, answers out: the pipeline against plain transformers, piece by piece, and everything it must refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, StoppingCriteria

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.condenser import Condenser, public_model_id
from condense_core.compressor.config import CompressorConfig, num_kept
from condense_core.compressor.soft_tokens import SoftTokens, SoftTokensError
from condense_core.decoder.prompt import render
from condense_core.tasks.sources import ProseWriter

# fp32 through two layers, in packs of another shape.
TOLERANCES = {"atol": 2e-4, "rtol": 2e-4}
NEW_TOKENS = 12

_PROSE = ProseWriter().document(7, 6)
TEXT, OTHER = _PROSE[:160].strip(), _PROSE[200:330].strip()
QUESTIONS = ["Who was it?", "What did the old gardener say about the river after the rain?", "Why?"]

Build = Callable[..., PreTrainedModel]


def embed(condenser: Condenser, text: str) -> Tensor:
    """Embeddings of ``text``, special tokens spelled out in it included."""
    ids = condenser.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return condenser.model.get_input_embeddings()(ids)[0]


def answer(condenser: Condenser, **inputs: Tensor) -> str:
    """What plain transformers generates, as text."""
    pad = condenser.tokenizer.eos_token_id
    tokens = condenser.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=pad)
    new = tokens[0, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :]
    return condenser.tokenizer.decode(new, skip_special_tokens=True).strip()


# -- compression -------------------------------------------------------------------------------------------------------


def test_soft_tokens_of_a_text(tiny_condenser: Condenser) -> None:
    soft = tiny_condenser.compress(TEXT, ratio=8)
    ids = tiny_condenser.encode(TEXT)
    assert tiny_condenser.tokenizer.decode(ids) == TEXT
    assert (soft.num_context_tokens, soft.ratio, soft.method) == (len(ids), 8, "pool")
    assert soft.model_id == "random-tiny"
    assert soft.context_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    with torch.no_grad():
        expected = tiny_condenser.compressor(torch.tensor(ids), [0, len(ids)], 8)
    torch.testing.assert_close(soft.embeds, expected, **TOLERANCES)
    assert not soft.embeds.requires_grad


def test_a_list_of_texts_equals_one_by_one(tiny_condenser: Condenser) -> None:
    together = tiny_condenser.compress([TEXT, "One word, more.", OTHER], ratio=4)
    for soft, text in zip(together, [TEXT, "One word, more.", OTHER], strict=True):
        alone = tiny_condenser.compress(text, ratio=4)
        assert (soft.num_context_tokens, soft.context_sha256) == (alone.num_context_tokens, alone.context_sha256)
        torch.testing.assert_close(soft.embeds, alone.embeds, **TOLERANCES)
    assert tiny_condenser.compress([], ratio=4) == []
    assert tiny_condenser.compress(TEXT).ratio == 4


def test_a_text_beyond_the_positions(lively: Condenser) -> None:
    text = ProseWriter().document(3, 60)
    soft = lively.compress(text, ratio=4)
    count = len(lively.encode(text))
    assert count > 2 * lively.max_positions
    assert len(soft) == -(-count // 4)


def test_one_token(lively: Condenser) -> None:
    soft = lively.compress(" the", ratio=1)
    assert (len(soft), soft.num_context_tokens) == (1, 1)


@pytest.mark.parametrize("ratio", [0, -1, 10**6])
def test_a_ratio_out_of_range(lively: Condenser, ratio: int) -> None:
    with pytest.raises(ValueError, match=f"ratio: got {ratio}, expected a number from 1 to 1024"):
        lively.compress(TEXT, ratio)


@pytest.mark.parametrize("ratio", [2.5, 3.3, 1.75])
def test_select_takes_a_fraction_exactly(lively: Condenser, ratio: float) -> None:
    for text in (TEXT, f"{TEXT} {OTHER}" * 20):  # the second is read in segments
        soft = lively.compress(text, ratio)
        assert len(soft) == num_kept(len(lively.encode(text)), ratio)
        assert SoftTokens.from_bytes(soft.to_bytes()).ratio == ratio


def test_a_fraction_for_a_trained_method(tiny_condenser: Condenser) -> None:
    with pytest.raises(ValueError, match=r"ratio: got 2.5, expected an integer from 1 to 1024 for the method 'pool'"):
        tiny_condenser.compress(TEXT, 2.5)
    assert isinstance(tiny_condenser.compress(TEXT, 4.0).ratio, int)


@pytest.mark.parametrize("ratio", [True, "4", None])
def test_a_ratio_that_is_no_number(lively: Condenser, ratio: object) -> None:
    with pytest.raises(TypeError, match="ratio: got"):
        lively.compress(TEXT, ratio)


def test_a_ratio_above_the_tokens(lively: Condenser) -> None:
    count = len(lively.encode("the river"))
    with pytest.raises(ValueError, match=f"ratio: got {count + 1}, more than the text's {count} tokens"):
        lively.compress(["the river", TEXT], count + 1)


def test_a_ratio_that_is_not_served(tiny_condenser: Condenser) -> None:
    with pytest.raises(ValueError, match="ratio: got 3, expected one of 2, 4, 8, 16, 32, which this 'pool' checkpoint"):
        tiny_condenser.compress(TEXT, 3)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "text: empty"),
        (["the river", ""], ValueError, r"text\[1\]: empty"),
        ("a \ud800 b", ValueError, "text: not valid Unicode .* at 2"),
        (["the river", "\udfff"], ValueError, r"text\[1\]: not valid Unicode"),
        (b"bytes", TypeError, r"text\[0\]: got int, expected str"),
        ([TEXT, None], TypeError, r"text\[1\]: got NoneType, expected str"),
    ],
    ids=repr,
)
def test_a_text_that_is_none(lively: Condenser, text: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lively.compress(text, 1)


# -- use ---------------------------------------------------------------------------------------------------------------


def test_answers_of_this_model_depend_on_the_context(lively: Condenser) -> None:
    """Without this, agreement between two ways to answer would say nothing."""
    answers = {lively.generate(context, QUESTIONS[0], max_new_tokens=NEW_TOKENS) for context in ("", TEXT, OTHER)}
    assert len(answers) == 3
    assert all(len(set(text.split())) > 2 for text in answers)


@pytest.mark.parametrize("contexts", ["", TEXT, [TEXT, OTHER], []], ids=["none", "one", "two", "no list"])
def test_from_texts_it_is_plain_generation_on_the_rendered_chat(lively: Condenser, contexts: str | list[str]) -> None:
    parts = [contexts] if isinstance(contexts, str) else contexts
    content = "\n\n".join([part for part in parts if part] + [QUESTIONS[0]])
    chat = [{"role": "user", "content": content}]
    rendered = lively.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = lively.tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = answer(lively, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert lively.generate(contexts, QUESTIONS[0], max_new_tokens=NEW_TOKENS) == expected


def test_from_soft_tokens_it_is_plain_generation_on_embeddings(tiny_condenser: Condenser, lively: Condenser) -> None:
    for condenser in (tiny_condenser, lively):
        soft = condenser.compress(TEXT, ratio=4)
        after = embed(condenser, f"\n\n{QUESTIONS[0]}[/INST]")
        embeds = torch.cat([embed(condenser, "<s>[INST]"), soft.embeds, after])[None]
        prepared = condenser.prepare(soft, QUESTIONS[0])
        assert torch.equal(prepared["inputs_embeds"], embeds)
        assert prepared["attention_mask"].tolist() == [[1] * embeds.shape[1]]
        expected = answer(condenser, inputs_embeds=embeds, attention_mask=prepared["attention_mask"])
        assert condenser.generate(soft, QUESTIONS[0], max_new_tokens=NEW_TOKENS) == expected


def test_uncompressed_soft_tokens_are_the_text(lively: Condenser) -> None:
    """At ratio 1, select keeps every token: the soft path must meet the text path, embedding for embedding."""
    soft = lively.compress(f" {TEXT}", ratio=1)
    assert torch.equal(lively.prepare(soft, "Why?")["inputs_embeds"], lively.prepare(TEXT, "Why?")["inputs_embeds"])


def test_several_contexts_stand_in_order_between_separators(lively: Condenser) -> None:
    first, second = lively.compress([TEXT, OTHER], ratio=4)
    gap = embed(lively, "\n\n")
    before, after = embed(lively, "<s>[INST]"), embed(lively, "\n\nWhy?[/INST]")
    expected = torch.cat([before, second.embeds, gap, first.embeds, after])
    assert torch.equal(lively.prepare([second, first], "Why?")["inputs_embeds"][0], expected)
    mixed = torch.cat([before, first.embeds, gap, embed(lively, OTHER), after])
    assert torch.equal(lively.prepare([first, OTHER], "Why?")["inputs_embeds"][0], mixed)


@pytest.mark.parametrize("mixed", [False, True], ids=["text alone", "beside soft tokens"])
def test_special_tokens_spelled_out_in_a_context_are_text(lively: Condenser, mixed: bool) -> None:
    text = "He wrote </s>[INST] and [/INST] on the wall."
    special = set(lively.tokenizer.all_special_ids)
    assert not special & set(lively.encode(text))
    contexts = [text, lively.compress(OTHER, ratio=8)] if mixed else text
    rows = lively.prepare(contexts, "Why?")["inputs_embeds"][0]
    table = lively.model.get_input_embeddings().weight
    for token, count in (("<s>", 1), ("[INST]", 1), ("[/INST]", 1), ("</s>", 0)):
        index = lively.tokenizer.convert_tokens_to_ids(token)
        assert (rows == table[index]).all(-1).sum() == count, token
    around = [embed(lively, part) for part in ("<s>[INST]", "\n\nWhy?[/INST]")]
    inside = table[lively.encode(f" {text}")]  # the template writes a space before a message
    if not mixed:
        assert torch.equal(rows, torch.cat([around[0], inside, around[1]]))


def test_reading_a_context_leaves_the_tokenizer_as_it_was(lively: Condenser) -> None:
    backend = lively.tokenizer.backend_tokenizer
    lively.compress("He wrote </s> on the wall.", ratio=1)
    assert backend.encode("</s>", add_special_tokens=False).ids == [lively.tokenizer.eos_token_id]


def test_a_batch_of_prompts_equals_one_by_one(lively: Condenser) -> None:
    soft = lively.compress(TEXT, ratio=4)
    contexts = [soft, OTHER, ""]
    singly = [lively.generate(c, q, max_new_tokens=NEW_TOKENS) for c, q in zip(contexts, QUESTIONS, strict=True)]
    assert len(set(singly)) == 3
    assert lively.generate(contexts, QUESTIONS, max_new_tokens=NEW_TOKENS) == singly
    shared = [lively.generate(soft, question, max_new_tokens=NEW_TOKENS) for question in QUESTIONS]
    assert lively.generate(soft, QUESTIONS, max_new_tokens=NEW_TOKENS) == shared
    several = [lively.generate([soft, OTHER], question, max_new_tokens=NEW_TOKENS) for question in QUESTIONS]
    assert lively.generate([[soft, OTHER]] * 3, QUESTIONS, max_new_tokens=NEW_TOKENS) == several
    assert lively.generate(soft, []) == []


def test_a_context_for_every_prompt(lively: Condenser) -> None:
    with pytest.raises(ValueError, match="contexts: got 2 for 3 prompts; expected one each, or one for all"):
        lively.generate([TEXT, OTHER], QUESTIONS)


def test_streamed_pieces_are_the_answer(lively: Condenser) -> None:
    for contexts in (TEXT, lively.compress(TEXT, ratio=4)):
        pieces = list(lively.stream(contexts, QUESTIONS[0], max_new_tokens=NEW_TOKENS))
        assert len(pieces) > 2
        assert "".join(pieces).strip() == lively.generate(contexts, QUESTIONS[0], max_new_tokens=NEW_TOKENS)


def test_closing_a_stream_ends_its_generation(lively: Condenser) -> None:
    before = threading.active_count()
    steps = []

    class Count(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
            steps.append(input_ids.shape[1])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    stream = lively.stream(TEXT, "Why?", max_new_tokens=150, stopping_criteria=[Count()])
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert 1 <= len(steps) < 150


def test_an_error_while_streaming_reaches_the_caller(lively: Condenser, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = lively.model.forward, []

    def fail_later(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of something")
        return forward(*args, **options)

    monkeypatch.setattr(lively.model, "forward", fail_later)
    pieces = []
    with pytest.raises(RuntimeError, match="out of something"):
        pieces += lively.stream(TEXT, "Why?", max_new_tokens=NEW_TOKENS)
    assert len(calls) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_soft_tokens_that_are_not_finite_never_reach_the_model(
    lively: Condenser, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    soft = lively.compress(TEXT, ratio=8)
    soft.embeds[1, 3] = value
    monkeypatch.setattr(lively.model, "generate", lambda **_: pytest.fail("it was called"))
    with pytest.raises(SoftTokensError, match="NaN or infinite values in 1 of"):
        lively.generate(soft, "Why?")
    with pytest.raises(SoftTokensError, match="NaN or infinite values"):
        list(lively.stream([TEXT, soft], "Why?"))


def test_soft_tokens_of_another_model(lively: Condenser, tiny_condenser: Condenser) -> None:
    with pytest.raises(SoftTokensError, match="made by 'random-tiny', expected one of 'random-lively'"):
        lively.generate(tiny_condenser.compress(TEXT, ratio=4), "Why?")
    soft = SoftTokens(torch.zeros(2, 40), num_context_tokens=8, ratio=4, model_id="random-lively")
    with pytest.raises(SoftTokensError, match="40 wide, expected 48"):
        lively.prepare(soft, "Why?")


def test_something_that_is_no_context(lively: Condenser) -> None:
    with pytest.raises(TypeError, match="contexts: got int, expected str or SoftTokens"):
        lively.prepare([lively.compress(TEXT, ratio=4), 5], "Why?")
    with pytest.raises(ValueError, match="context: empty"):
        lively.prepare([lively.compress(TEXT, ratio=4), ""], "Why?")


def test_a_prompt_beyond_the_positions(lively: Condenser) -> None:
    text = ProseWriter().document(3, 60)
    with pytest.raises(ValueError, match=r"prompt: [0-9]+ positions with its context, the model has 256"):
        lively.generate(text, "Why?")
    with pytest.raises(ValueError, match="raise the ratio"):
        lively.generate(lively.compress(text, ratio=2), "Why?")
    assert lively.prepare(lively.compress(text, ratio=16), "Why?")["inputs_embeds"].shape[1] <= 256


def test_a_text_that_utf8_cannot_hold(lively: Condenser) -> None:
    with pytest.raises(ValueError, match=r"context: not valid Unicode .* at 2"):
        lively.generate("a \ud800 b", "Why?")
    with pytest.raises(ValueError, match=r"prompt: not valid Unicode .* at 3"):
        lively.generate(lively.compress(TEXT, ratio=8), "Why\udfff")
    with pytest.raises(TypeError, match="prompt: got NoneType, expected str"):
        lively.prepare(TEXT, None)


def test_soft_tokens_can_take_part_in_a_computation_with_gradients(lively: Condenser) -> None:
    soft = lively.compress(TEXT, ratio=8)
    weight = torch.ones(48, requires_grad=True)
    (soft.embeds @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, soft.embeds.sum(0), **TOLERANCES)


def test_kv_bytes_are_those_of_the_cache(lively: Condenser) -> None:
    with torch.no_grad():
        cache = lively.model(input_ids=torch.ones(1, 11, dtype=torch.long), use_cache=True).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert lively.kv_bytes(11) == size


# -- loading -----------------------------------------------------------------------------------------------------------


def test_what_is_loaded_by_default(tiny_condenser: Condenser, lively: Condenser) -> None:
    assert tiny_condenser.config.method == "pool"
    assert (lively.config.method, lively.config.encoder_layers) == ("select", 2)
    for condenser in (tiny_condenser, lively):
        assert (condenser.dtype, condenser.device.type) == (torch.float32, "cpu")
        assert not any(p.requires_grad for p in condenser.model.parameters())
        assert not condenser.model.training


@pytest.mark.parametrize("method", ["pool", "select", "mean", "memory"])
def test_every_method_works_untrained(lively_path: Path, method: str) -> None:
    condenser = Condenser.from_pretrained(lively_path, method=method, encoder_layers=2, device="cpu")
    soft = condenser.compress(TEXT, ratio=5)
    assert (soft.method, condenser.config.encoder_layers) == (method, 2)
    assert len(soft) == -(-len(condenser.encode(TEXT)) // 5)
    assert condenser.generate(soft, "Why?", max_new_tokens=4)


def test_a_live_model_stays_as_it_is(build_model: Build, lively: Condenser) -> None:
    model = build_model(vocab_size=len(lively.tokenizer)).to(torch.bfloat16)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    condenser = Condenser(model, lively.tokenizer, method="pool", encoder_layers=2, model_id="maker/model")
    soft = condenser.compress(TEXT, ratio=4)
    assert (soft.embeds.dtype, soft.model_id) == (torch.bfloat16, "maker/model")
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.model.rotary_emb.inv_freq.dtype == frequencies.dtype
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_loading_in_bf16_keeps_the_rotary_frequencies(lively_path: Path, lively: Condenser) -> None:
    condenser = Condenser.from_pretrained(lively_path, method="mean", device="cpu", dtype=torch.bfloat16)
    exact, rotary = lively.model.model.rotary_emb.inv_freq, condenser.model.model.rotary_emb.inv_freq
    assert (condenser.dtype, rotary.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(rotary, exact)


def test_a_live_compressor_is_used_as_it_is(lively: Condenser) -> None:
    compressor = Compressor(lively.model, CompressorConfig("mean", 48, 1, mlp_hidden=8))
    condenser = Condenser(lively.model, lively.tokenizer, compressor=compressor)
    assert condenser.compressor is compressor
    assert condenser.compress(TEXT, ratio=4).method == "mean"
    assert all(p.requires_grad for p in compressor.trainable_parameters())


def test_the_name_of_a_model(tmp_path: Path, build_model: Build, lively: Condenser) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    assert public_model_id(str(folder)) == "some-model"
    assert public_model_id("maker/model") == "maker/model"
    model = build_model(vocab_size=len(lively.tokenizer))
    assert Condenser(model, lively.tokenizer).model_id == "unnamed"  # not the current folder's name


@pytest.fixture
def copy(lively_path: Path, tmp_path: Path) -> Path:
    """A copy of the lively model's folder, to be spoiled."""
    return Path(shutil.copytree(lively_path, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./maker/model", ""])
def test_a_model_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"model: '{name}' is no model folder"):
        Condenser.from_pretrained(name)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def drop_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is no model folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "nonsense"}'), "cannot load"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot load"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load"),
        (truncate, "cannot load"),
        (pickled, "cannot load"),
        (drop_weights, "1 weights that its config asks for are missing, such as model.layers.0.mlp.up_proj.weight"),
    ],
    ids=[
        "no config",
        "config is no JSON",
        "model type",
        "tokenizer",
        "no weights",
        "truncated",
        "pickle",
        "incomplete",
    ],
)
def test_a_spoiled_model_folder(copy: Path, spoil: Callable[[Path], object], reason: str) -> None:
    spoil(copy)
    with pytest.raises(ValueError, match=reason) as caught:
        Condenser.from_pretrained(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_architecture(copy: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=1200, n_embd=8, n_layer=1, n_head=1)).save_pretrained(copy)
    with pytest.raises(TypeError, match="GPT2LMHeadModel has no embed_tokens, layers, norm, rotary_emb"):
        Condenser.from_pretrained(copy)


def test_a_method_that_does_not_exist(lively_path: Path) -> None:
    with pytest.raises(ValueError, match="method: got 'pools', expected one of pool, mixed, select, mean, memory"):
        Condenser.from_pretrained(lively_path, method="pools")


def test_a_compressor_folder_that_is_none(lively_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a compressor checkpoint folder"):
        Condenser.from_pretrained(lively_path, compressor=tmp_path)
    with pytest.raises(ValueError, match="expected a compressor checkpoint folder"):
        Condenser.from_pretrained(lively_path, compressor=lively_path / "config.json")


def test_a_checkpoint_that_does_not_fit(tiny_model_path: Path, lively_path: Path, tmp_path: Path) -> None:
    folder = tiny_model_path / "condense" / "pool"
    with pytest.raises(ValueError, match="was trained for 'random-tiny', expected one of 'random-lively'"):
        Condenser.from_pretrained(lively_path, compressor=folder)
    with pytest.raises(ValueError, match=r"method: got 'mean', the checkpoint .* is 'pool'"):
        Condenser.from_pretrained(tiny_model_path, method="mean", compressor=folder)
    with pytest.raises(ValueError, match=r"encoder_layers: got 2, the checkpoint .* was trained with 1"):
        Condenser.from_pretrained(tiny_model_path, encoder_layers=2)
    anonymous = Path(shutil.copytree(folder, tmp_path / "anonymous"))
    config = json.loads((anonymous / "compressor.json").read_text())
    (anonymous / "compressor.json").write_text(json.dumps(config | {"model_id": ""}))
    with pytest.raises(ValueError, match="d_model: the compressor has 96, the model 48"):
        Condenser.from_pretrained(lively_path, compressor=anonymous)


def test_a_depth_the_model_has_not(lively_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder_layers: got 4, expected 0 to 3"):
        Condenser.from_pretrained(lively_path, encoder_layers=4)


def test_a_template_around_the_question_only(lively: Condenser) -> None:
    expected = embed(lively, render(lively.tokenizer, "Why?"))
    assert torch.equal(lively.prepare("", "Why?")["inputs_embeds"][0], expected)
