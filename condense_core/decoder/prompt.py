"""Where a context sits in a prompt, whatever becomes of it: the chat template is rendered around it, as around text."""

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


def before_context(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Token ids in front of a context, and what is put before its text so that both together are the whole's tokens.

    That is a space where the template writes one there, unless the tokenizer begins every text with a space of its own.
    """
    mark = f"<context-{uuid.uuid4().hex}>"
    before = render(tokenizer, mark).partition(mark)[0]

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    ids = encoded(before.rstrip(" "))
    spaced = before.endswith(" ") and encoded(f"{before}a") == ids + encoded(" a")
    return ids, " " if spaced else ""


def render(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """The prompt text that a chat with one user message ``message`` renders to, ready for the model's answer."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": message}]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    return f"{tokenizer.bos_token or ''}{message}\n"


def encode_context(tokenizer: PreTrainedTokenizerBase, text: str, name: str = "text") -> list[int]:
    """Token ids of a context, in which special tokens spelled out are text; ``ValueError`` where there are none."""
    check_text(text, name)
    try:
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    finally:  # transformers leaves the switch on in the tokenizer's backend, which others call too
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.encode_special_tokens = tokenizer.split_special_tokens
    ids: list[int] = encoded["input_ids"]
    if not ids:
        raise ValueError(f"{name}: empty; expected a text of at least one token")
    return ids


def check_text(text: object, name: str) -> None:
    """``TypeError`` for what is no text, ``ValueError`` for a text that UTF-8 cannot hold (lone surrogates)."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: got {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: not valid Unicode ({error.reason} at {error.start}); expected text that UTF-8 can hold"
        ) from None
