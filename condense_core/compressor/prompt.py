"""Where a compressed context sits in a prompt: the chat template is rendered around it, as if it were text."""

from __future__ import annotations

import uuid

from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"


def split_prompt(tokenizer: PreTrainedTokenizerBase, num_contexts: int, prompt: str) -> list[list[int]]:
    """Token ids around ``num_contexts`` contexts: ``num_contexts + 1`` lists, special tokens included.

    The user's message is the contexts, each followed by an empty line, then ``prompt``; a tokenizer without chat
    template gets its BOS and that message. A space just before a context is dropped: the context's first token brings
    its own.
    """
    marks = [f"<context-{uuid.uuid4().hex}>" for _ in range(num_contexts)]
    parts: list[str] = []
    rest = render(tokenizer, SEPARATOR.join([*marks, prompt]))
    for mark in marks:
        before, _, rest = rest.partition(mark)
        parts.append(before.rstrip(" "))
    parts.append(rest)
    return [tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in parts]


def render(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """The prompt text that a chat with one user message ``message`` renders to, ready for the model's answer."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": message}]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    return f"{tokenizer.bos_token or ''}{message}\n"
