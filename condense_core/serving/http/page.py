"""The page for people at ``/``: one file, and a policy that lets it run what stands in it and load nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

from condense_core.tasks.demo import DEMO_FACTS, demo_text

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def content_policy(html: str) -> str:
    """A Content-Security-Policy for ``html``: its own inline scripts and styles, by digest, and requests to its server.

    Text cannot become markup or code either: where browsers know trusted types, none is allowed.
    """
    allowed: dict[str, list[str]] = {"script": [], "style": []}
    for name, content in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        allowed[name].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            *(f"{name}-src {' '.join(digests) or repr('none')}" for name, digests in allowed.items()),
            "img-src data:",  # the icon
            "connect-src 'self'",
            *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
            *("require-trusted-types-for 'script'", "trusted-types 'none'"),
        )
    )


def add_page(app: FastAPI) -> None:
    """Add ``/``, and ``/example``: the text and the questions that the page offers to begin with."""
    html = files("condense_core.serving.http").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "content-security-policy": content_policy(html),
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",  # another version of the server has another page
    }
    questions = [{"question": fact.question, "answer": fact.answer} for fact in DEMO_FACTS]
    example = {"text": demo_text(), "questions": questions}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    @app.get("/example", include_in_schema=False)
    async def show_example() -> JSONResponse:
        return JSONResponse(example)
