"""Settings for the tests of the chain."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_files_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The SDK keeps symbols of tokens in the home directory when it connects; a test leaves nothing there."""
    symbols = tmp_path / "symbols.json"
    monkeypatch.setenv("BTCLI_TOKEN_SYMBOLS_CACHE", str(symbols))
    return symbols
