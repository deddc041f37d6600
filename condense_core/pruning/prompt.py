"""What a method may know of the prompt that it prunes, where a text is read rather than token ids."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from condense_core.decoder.prompt import TemplateArgs, encode_before_question, split_prompt
from condense_core.decoder.sentences import sentence_numbers


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text as the model is given it, up to its end.

    Attributes:
        tokenizer: of the model.
        input_ids: what the chat template writes before the text, and the text.
        text: the text alone.
        template_args: variables of the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    input_ids: tuple[int, ...]
    text: str
    template_args: TemplateArgs | None = None

    def behind(self, message: str) -> tuple[int, ...]:
        """Token ids that continue the text with ``message`` and let the model answer."""
        return tuple(split_prompt(self.tokenizer, 1, message, self.template_args)[1])

    @property
    def text_start(self) -> int:
        """How many tokens stand before the text."""
        empty = encode_before_question(self.tokenizer, "a", self.template_args)
        return next((i for i, (a, b) in enumerate(zip(empty, self.input_ids, strict=False)) if a != b), len(empty) - 1)

    def sentence_starts(self) -> tuple[int, ...]:
        """The places in ``input_ids`` at which a sentence of the text begins.

        Empty where the text's tokens are not those of plain encoding, or the tokenizer does not say where they stand.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            return ()
        plain = self.tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, before = tuple(plain["input_ids"]), len(self.input_ids) - len(plain["input_ids"])
        if before < 0 or self.input_ids[before + 1 :] != ids[1:]:  # the first token may have a space of its own
            return ()
        numbers = sentence_numbers(self.text, plain["offset_mapping"])
        return tuple(before + i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1])
