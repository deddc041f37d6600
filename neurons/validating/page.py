"""The leaderboard as a page: one file that loads nothing, and asks the validator it came from for what it shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from condense_core.serving.http.page import content_policy

_NOTHING = '<script type="application/json" id="inlined">null</script>'


def page() -> str:
    """The page, which asks for ``leaderboard.json`` every few seconds."""
    return files("condense_core.neurons.validating").joinpath("page.html").read_text(encoding="utf-8")


def page_headers(html: str) -> dict[str, str]:
    """What it is sent with: it may run what stands in it, and load nothing but from its own server."""
    return {
        "content-security-policy": content_policy(html),
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def with_boards(boards: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """The page with what it shows inside, so that it needs no validator.

    Args:
        boards: of one or several validators, as ``board`` makes them, each with its name as ``by``.
        names: of miners, by hotkey, beside their uids.
    """
    data = json.dumps({"boards": list(boards), "names": dict(names)}, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # nothing in it ends the element
    return page().replace(_NOTHING, _NOTHING.replace("null", data), 1)
