"""Where a context sits in a prompt, whatever becomes of it: the chat template is rendered around it, as around text.

The template never sees the texts. It is rendered with a mark in the place of every context and of the question, and
split there, so what it does to a message (escaping, trimming) happens to none of them, and what they hold acts on
nothing: control tokens spelled out in a context or a question are text (``tokens``).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from condense_core.decoder.tokens import Span, encode_behind_text, encode_spans, encode_text

SEPARATOR = "\n\n"

TemplateArgs = Mapping[str, Any]
"""Variables of a chat template, such as ``{"enable_thinking": False}``. The name ``system_prompt`` is none of them: its
text becomes a message of the role ``system`` before the user's."""

_RECORDS = ("{'type': 'text'", '{"type": "text"')
_RESERVED = {
    *("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_tensors", "return_dict"),
    *("padding", "truncation", "max_length", "return_assistant_tokens_mask", "tokenizer_kwargs", "messages"),
}


def prompt_spans(
    tokenizer: PreTrainedTokenizerBase, num_contexts: int, prompt: str, template_args: TemplateArgs | None = None
) -> list[list[Span]]:
    """What stands around ``num_contexts`` contexts: ``num_contexts + 1`` lists of spans.

    The user's message is the contexts, each followed by an empty line, then ``prompt``; a tokenizer without chat
    template gets its BOS and that message.

    Args:
        tokenizer: with a chat template that takes a message's content as a string, or as a list of parts.
        num_contexts: how many contexts.
        prompt: the text behind them.
        template_args: variables of the chat template.

    Raises:
        ValueError: the template refuses such a chat, or does not write every part of the message once and in order; or
            ``template_args`` has a name that is not the template's.
    """
    contexts = [_mark() for _ in range(num_contexts)]
    texts = {_mark(): prompt}
    marks = [*contexts, *texts]
    args = checked_template_args(template_args)
    system = args.pop("system_prompt", None)
    chat: list[dict[str, Any]] = [{"role": "user", "content": SEPARATOR.join(marks)}]
    if system:
        chat.insert(0, {"role": "system", "content": (mark := _mark())})
        texts[mark] = system
    rest = _rendered(tokenizer, chat, marks, [*marks, *texts], args)
    pieces: list[list[Span]] = [[]]
    for _, mark in sorted((rest.index(mark), mark) for mark in {*marks, *texts}):
        before, _, rest = rest.partition(mark)
        pieces[-1].append(Span(before, True))
        if mark in texts:
            pieces[-1].append(Span(texts[mark], False))
        else:
            pieces.append([])
    pieces[-1].append(Span(rest, True))
    return pieces


def split_prompt(
    tokenizer: PreTrainedTokenizerBase, num_contexts: int, prompt: str, template_args: TemplateArgs | None = None
) -> list[list[int]]:
    """Token ids around ``num_contexts`` contexts that are no text: ``num_contexts + 1`` lists.

    A space just before a context is dropped: the context's first token brings its own. Arguments and errors as of
    ``prompt_spans``.
    """
    first, *others = prompt_spans(tokenizer, num_contexts, prompt, template_args)
    pieces = [encode_spans(tokenizer, without_space(first) if others else first)]
    for index, spans in enumerate(others):
        last = index == len(others) - 1
        pieces.append(encode_behind_text(tokenizer, spans if last else without_space(spans)))
    return pieces


def without_space(spans: list[Span]) -> list[Span]:
    """``spans`` without the spaces that a template writes just before a context."""
    *others, last = spans
    return [*others, Span(last.text.rstrip(" "), last.acts)]


def encode_before_question(
    tokenizer: PreTrainedTokenizerBase, text: str, template_args: TemplateArgs | None = None, name: str = "text"
) -> list[int]:
    """Token ids of what the template writes before a context, and of the context ``text``: a prompt up to its question.

    ``ValueError`` for an empty text, and as from ``prompt_spans``; name is what a message calls the text.
    """
    check_text(text, name)
    if not text:
        raise ValueError(f"{name}: empty; expected a text of at least one token")
    before = prompt_spans(tokenizer, 1, "", template_args)[0]
    return encode_spans(tokenizer, [*before, Span(text, False)])


def render(tokenizer: PreTrainedTokenizerBase, message: str, template_args: TemplateArgs | None = None) -> str:
    """The prompt text that a chat with one user message ``message`` renders to, ready for the model's answer."""
    return "".join(span.text for span in prompt_spans(tokenizer, 0, message, template_args)[0])


def encode_context(tokenizer: PreTrainedTokenizerBase, text: str, name: str = "text") -> list[int]:
    """Token ids of a context, in which control tokens spelled out are text; ``ValueError`` where there are none."""
    check_text(text, name)
    ids = encode_text(tokenizer, text)
    if not ids:
        raise ValueError(f"{name}: empty; expected a text of at least one token")
    return ids


def checked_template_args(template_args: TemplateArgs | None) -> dict[str, Any]:
    """A copy of ``template_args``; ``TypeError`` or ``ValueError`` where they are no variables of a template."""
    if template_args is None:
        return {}
    if not isinstance(template_args, Mapping) or not all(isinstance(name, str) for name in template_args):
        raise TypeError(f"template_args: got {template_args!r:.80}, expected names and values of the chat template")
    if taken := sorted(_RESERVED & set(template_args)):
        raise ValueError(f"template_args: {taken[0]!r} is set here; expected variables of the chat template")
    system = template_args.get("system_prompt")
    if system is not None:
        check_text(system, "system_prompt")
    return dict(template_args)


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


def _mark() -> str:
    """A word that nobody can have written, and that no template has a reason to escape, trim or break."""
    return f"Context{uuid.uuid4().hex}"


def _rendered(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], ordered: list[str], marks: list[str], args: Any
) -> str:
    """The chat as the template writes it, with every mark once and ``ordered`` in their order."""
    if not tokenizer.chat_template:
        if args or len(chat) > 1:
            name = next(iter(args), "system_prompt")
            raise ValueError(f"template_args: got {name!r}, but the tokenizer has no chat template")
        return f"{tokenizer.bos_token or ''}{chat[0]['content']}\n"
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]
    reasons = []
    for given in (chat, parts):  # content as a string; as multimodal templates want it
        try:
            text = str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True, **args))
        except ImportError:
            raise
        except Exception as error:  # whatever a template of others raises
            message = " ".join(str(error).split()) or type(error).__name__
            reasons.append(f"it refuses a user's message: {message:.200}")
            continue
        counts = [text.count(mark) for mark in marks]
        places = [text.find(mark) for mark in ordered]
        if any(record in text for record in _RECORDS):  # it printed the parts as Python or JSON has them
            reasons.append("it takes a message neither as text nor as a list of parts")
        elif max(counts) > 1:
            reasons.append(f"it writes the message {max(counts)} times")
        elif min(counts) < 1:
            reasons.append("it changes the message or leaves out a part of it")
        elif places != sorted(places):
            reasons.append("it changes the order of the message's parts")
        else:
            return text
    raise ValueError(f"chat_template: {reasons[0]}; expected one that writes the user's message once and as it is")
