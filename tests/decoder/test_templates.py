"""Chat templates of all kinds: what stands around a context is found, or one line says why not."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from condense_core.decoder.prompt import render, split_prompt

LIST = (
    "{% for m in messages %}User: {% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{{ '\n' }}Assistant:{% endfor %}"
)
EITHER = (
    "{% for m in messages %}User: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{{ m['content'][0]['text'] }}{% endif %}{{ '\n' }}Assistant:{% endfor %}"
)
SYSTEM = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{{ mood | default('calm') }}:"
SPLITTABLE = {
    "list content": LIST,
    "either": EITHER,
    "escaping": "{% for m in messages %}User: {{ m['content'] | e }}\nAssistant:{% endfor %}",
    "trimming": "{% for m in messages %}User: {{ m['content'] | trim }}\nAssistant:{% endfor %}",
    "named": [{"name": "default", "template": EITHER}, {"name": "tool_use", "template": "{{ nothing }}"}],
}
REFUSED = {
    "twice": (
        "{% for m in messages %}User: {{ m['content'] }}\nAgain: {{ m['content'] }}\n{% endfor %}",
        "chat_template: it writes the message 2 times; expected one that writes the user's message once and as it is",
    ),
    "in capitals": ("{{ messages[0]['content'] | upper }}", "it changes the message or leaves out a part"),
    "cut": ("{{ messages[0]['content'][:40] }}", "it changes the message or leaves out a part"),
    "reversed": ("{{ messages[0]['content'].split('\n\n') | reverse | join }}", "it changes the order"),
    "none of it": ("Hello!", "it changes the message or leaves out a part"),
    "refusing": (
        "{{ raise_exception('Conversation must start\nwith a system message') }}",
        "it refuses a user's message: Conversation must start with a system message",
    ),
    "broken": ("{{ messages[0]['content'] | no_such_filter }}", "it refuses a user's message: No filter"),
}


def named(template: Any) -> Any:
    return {entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else template


@pytest.mark.parametrize("name", SPLITTABLE)
def test_neither_context_nor_question_is_lost_or_changed(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    tokenizer.chat_template = named(SPLITTABLE[name])
    before, behind = split_prompt(tokenizer, 1, " What <price> & why?")
    assert tokenizer.decode(before) == "User:"
    assert tokenizer.decode(behind) == "\n\n What <price> & why?\nAssistant:"
    assert render(tokenizer, "It costs <42>.\n\nWhat?") == "User: It costs <42>.\n\nWhat?\nAssistant:"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_one_line(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    tokenizer.chat_template, message = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        split_prompt(tokenizer, 1, "What price?")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_template_args_reach_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = SYSTEM
    assert render(tokenizer, "Why?", {"mood": "gay"}) == "user: Why?\ngay:"
    with_system = {"system_prompt": "Answer in <s> one word."}
    assert render(tokenizer, "Why?", with_system) == "system: Answer in <s> one word.\nuser: Why?\ncalm:"
    before = split_prompt(tokenizer, 1, "Why?", with_system)[0]
    assert tokenizer.decode(before) == "system: Answer in <s> one word.\nuser:"
    assert tokenizer.bos_token_id not in before


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"tokenize": True}, ValueError, "template_args: 'tokenize' is set here"),
        ({1: 2}, TypeError, "template_args: got {1: 2}, expected names and values"),
        (["a"], TypeError, "template_args: got"),
        ({"system_prompt": 3}, TypeError, "system_prompt: got int, expected str"),
    ],
)
def test_bad_template_args(tokenizer: PreTrainedTokenizerBase, args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        render(tokenizer, "Why?", args)


def test_a_template_without_room_for_a_system_prompt_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="Only the roles user and assistant are known"):
        render(tokenizer, "Why?", {"system_prompt": "Be brief."})
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="got 'system_prompt', but the tokenizer has no chat template"):
        render(tokenizer, "Why?", {"system_prompt": "Be brief."})
