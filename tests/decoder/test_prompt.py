"""Where a context sits: the pieces around it are those of the chat template rendered around the text itself."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from condense_core.decoder.prompt import SEPARATOR, encode_before_question, render, split_prompt

# Mistral-7B-Instruct-v0.2 writes spaces on both sides of a message, and around its markers.
MISTRAL_LIKE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# A template of another family: the message stands on a line of its own, and a turn of the model is opened.
LINES = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
TEMPLATES = {"tiny": ..., "mistral": MISTRAL_LIKE, "lines": LINES, "none": None}


@pytest.fixture(params=TEMPLATES)
def templated(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    template = TEMPLATES[request.param]
    if template is not ...:
        tokenizer.chat_template = template
    return tokenizer


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "contexts", [["The hills."], ["The hills.", "The harvest."], ["One.", "Two.", "Three."]], ids=len
)
def test_pieces_and_contexts_together_are_the_rendered_text(
    templated: PreTrainedTokenizerBase, contexts: list[str]
) -> None:
    """A context's first token carries the space that the template writes before it, if it writes one."""
    whole = render(templated, SEPARATOR.join([*contexts, "Who was it?"]))
    pieces = split_prompt(templated, len(contexts), "Who was it?")
    assert len(pieces) == len(contexts) + 1
    joined = pieces[0]
    for context, piece in zip(contexts, pieces[1:], strict=True):
        space = " " if f" {context}" in whole else ""
        joined = joined + ids(templated, space + context) + piece
    assert joined == ids(templated, whole)


def test_before_and_context_together_begin_the_rendered_text(templated: PreTrainedTokenizerBase) -> None:
    context = encode_before_question(templated, "The hills. The harvest.")
    whole = ids(templated, render(templated, f"The hills. The harvest.{SEPARATOR}Who was it?"))
    assert context + split_prompt(templated, 1, "Who was it?")[1] == whole


def test_a_tokenizer_that_begins_every_text_with_a_space_gets_no_second_one() -> None:
    """As SentencePiece's: here every character is a token."""
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate("▁user:ahils")}, unk_token="s"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = "{{ 'user: ' + messages[0]['content'] }}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, unk_token="s")
    assert encode_before_question(tokenizer, "a hill") == ids(tokenizer, "user: a hill")
    behind = split_prompt(tokenizer, 1, "a")[1]
    assert tokenizer.convert_ids_to_tokens(behind)[-1] == "a"
    assert "\u2581" not in tokenizer.convert_ids_to_tokens(behind)  # it continues a text, and begins none


def test_what_stands_around_a_context(tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = split_prompt(tokenizer, 1, "Who was it?")
    assert tokenizer.convert_ids_to_tokens(before) == ["<s>", "[INST]"]
    assert tokenizer.decode(after) == "\n\nWho was it?[/INST]"
    assert after[-1] == tokenizer.convert_tokens_to_ids("[/INST]")


def test_without_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    before, after = split_prompt(tokenizer, 1, "Who was it?")
    assert before == [tokenizer.bos_token_id]
    assert tokenizer.decode(after) == "\n\nWho was it?\n"
    tokenizer.bos_token = None
    assert split_prompt(tokenizer, 1, "Who was it?") == [[], after]


def test_without_a_context(templated: PreTrainedTokenizerBase) -> None:
    assert split_prompt(templated, 0, "Who was it?") == [ids(templated, render(templated, "Who was it?"))]


def test_a_prompt_that_looks_like_a_mark_stays_a_prompt(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marks are drawn anew for every call, so that one seen in an earlier prompt means nothing in a later one."""
    seen = []
    encode = type(tokenizer).apply_chat_template

    def spy(self: PreTrainedTokenizerBase, chat: list[dict[str, str]], **options: object) -> object:
        seen.append(chat[0]["content"])
        return encode(self, chat, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", spy)
    split_prompt(tokenizer, 2, "first")
    marks = seen[0].split(SEPARATOR)[:2]
    assert marks[0] != marks[1]
    prompt = f"{marks[1]} and {marks[0]}"
    pieces = split_prompt(tokenizer, 2, prompt)
    assert tokenizer.decode(pieces[1]) == SEPARATOR
    assert tokenizer.decode(pieces[2]) == f"{SEPARATOR}{prompt}[/INST]"
