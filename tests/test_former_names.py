"""Names that moved still work, and say where they have gone."""

import importlib
import sys

import pytest

from condense_core import decoder
from condense_core.decoder import architecture, model, prompt
from condense_core.pruning import text


def test_the_module_prompt_is_that_of_the_decoder():
    sys.modules.pop("condense_core.prompt", None)
    with pytest.warns(DeprecationWarning, match=r"condense_core\.prompt is now condense_core\.decoder\.prompt"):
        former = importlib.import_module("condense_core.prompt")
    assert former.render is prompt.render
    assert former.split_prompt is prompt.split_prompt


def test_reading_a_text_is_its_prefill():
    with pytest.warns(DeprecationWarning, match="is now prefill"):
        assert text.read is text.prefill


def test_the_decoders_names_are_found_where_the_module_was():
    assert decoder.open_decoder is model.open_decoder
    assert decoder.decoder_parts is architecture.decoder_parts
    with pytest.raises(AttributeError, match="no_such_name"):
        decoder.no_such_name  # noqa: B018
