"""Text is text: a control token spelled out in a context or a question never acts, however it is registered."""

from __future__ import annotations

import copy

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from condense_core.decoder.prompt import encode_before_question, encode_context, render, split_prompt
from condense_core.decoder.tokens import Span, encode_spans, encode_text

HEADER = "<|start_header_id|>"
THINK = "<think>"
RUN = "xyzzy"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}" + HEADER + "{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}" + THINK
)


@pytest.fixture
def registered(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with control tokens of every kind and an added word that controls nothing.

    Llama 3 has tokens that are special, but none of bos, eos and pad; Qwen3 some that are not, but of the template.
    """
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens([AddedToken(HEADER, special=True, normalized=False)])
    backend.add_tokens([AddedToken(THINK, normalized=False), AddedToken(RUN, normalized=False)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("token", ["</s>", "[INST]", HEADER, THINK])
def test_a_control_token_in_a_text_is_text_and_in_the_template_it_acts(
    registered: PreTrainedTokenizerBase, token: str
) -> None:
    index = registered.convert_tokens_to_ids(token)
    text = f"He wrote {token} twice: {token}{token}."
    assert plain(registered, text).count(index) == 3
    in_template = plain(registered, render(registered, "a")).count(index)
    assert index not in encode_context(registered, text)
    assert encode_before_question(registered, text).count(index) == int(token == HEADER)
    before, behind = split_prompt(registered, 1, text)
    assert (before + behind).count(index) == in_template
    assert registered.decode(encode_context(registered, text)) == text


def test_an_added_word_that_controls_nothing_stays_one_token(registered: PreTrainedTokenizerBase) -> None:
    assert encode_context(registered, f"a {RUN} b").count(registered.convert_tokens_to_ids(RUN)) == 1


def test_a_harmless_prompt_has_the_tokens_of_plain_encoding(registered: PreTrainedTokenizerBase) -> None:
    text = f"  The hills,\n\nthe  {RUN} harvest. "
    before = encode_before_question(registered, text)
    behind = split_prompt(registered, 1, "Who was it?")[1]
    assert before + behind == plain(registered, render(registered, f"{text}\n\nWho was it?"))


def test_a_token_across_the_border_of_template_and_text_does_not_act(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ '<' + messages[0]['content'] + '>' }}"
    ids = encode_before_question(tokenizer, "/s")
    assert tokenizer.eos_token_id not in ids + split_prompt(tokenizer, 1, "/s")[1]


def test_tokens_added_later_count(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "a <|late|> b"
    assert tokenizer.decode(encode_context(tokenizer, text)) == text
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|late|>", special=True, normalized=False)])
    late = tokenizer.convert_tokens_to_ids("<|late|>")
    assert late not in encode_context(tokenizer, text)
    assert late in encode_spans(tokenizer, [Span(text, True)])
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<word>", normalized=False)])
    word = tokenizer.convert_tokens_to_ids("<word>")
    assert word in encode_context(tokenizer, "a <word>")
    tokenizer.chat_template = "<word>{{ messages[0]['content'] }}"
    assert word not in encode_context(tokenizer, "a <word>")


def test_a_control_token_that_the_vocabulary_has_as_a_word_is_cut() -> None:
    """As in vocabularies of whole words: without its registration it would still be found."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "<", "s>", "a", "?"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="?")
    assert encode_text(tokenizer, "a <s> a") == [3, 1, 2, 3]
    assert encode_spans(tokenizer, [Span("<s>", True), Span(" a <s>", False)]) == [0, 3, 1, 2]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_sentencepiece_s_space_stands_where_plain_encoding_has_it(scheme: str) -> None:
    core = Tokenizer(models.BPE({c: i for i, c in enumerate("▁<>[]/SINTabchilrst\n")}, []))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    core.normalizer = normalizers.NFC()
    core.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "[INST]", "[/INST]")])
    template = "<s>[INST] {{ messages[0]['content'] }} [/INST]"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, bos_token="<s>")
    whole = render(tokenizer, "a hill\n\nis it a hill")
    context, behind = encode_before_question(tokenizer, "a hill"), split_prompt(tokenizer, 1, "is it a hill")[1]
    assert context + behind == plain(tokenizer, whole)


def test_the_tokenizer_is_left_as_it_was(registered: PreTrainedTokenizerBase) -> None:
    before = copy.deepcopy(registered).backend_tokenizer.to_str()
    encode_context(registered, f"a {HEADER}")
    split_prompt(registered, 1, f"a {HEADER}")
    assert registered.backend_tokenizer.to_str() == before
    assert not registered.backend_tokenizer.encode_special_tokens
