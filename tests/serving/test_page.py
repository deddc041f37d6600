"""The page for people: it runs nothing but what stands in it, and shows in a browser what the server says."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from condense_core import cli
from condense_core.serving.engine import CompressionEngine
from condense_core.serving.errors import ERRORS, InvalidRequest, QueueFull, RateLimited, TooLarge, Unauthorized
from condense_core.serving.http import logs
from condense_core.serving.http.app import create_app
from condense_core.serving.http.page import content_policy
from condense_core.serving.http.server import Server
from condense_core.serving.keys import new_key
from condense_core.serving.service import LocalService
from condense_core.tasks.demo import DEMO_FACTS, demo_text
from condense_testing.browser import Browser, find_browser
from condense_testing.pages import Parsed
from condense_testing.serving import FakeBackend

HTML = files("condense_core.serving.http").joinpath("page.html").read_text(encoding="utf-8")
PAGE = Parsed(HTML)
SCRIPT = next(content for tag, content in PAGE.inline if tag == "script")
IDS = [attributes["id"] for _, attributes in PAGE.tags if "id" in attributes]


def get(app: Any, path: str) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path)

    return asyncio.run(main())


def app_of_nothing(**options: Any) -> Any:
    return create_app(LocalService(CompressionEngine(FakeBackend())), **options)


# -- what is served ----------------------------------------------------------------------------------------------------


def test_the_policy_allows_the_page_s_own_script_and_style_and_nothing_else() -> None:
    reply = get(app_of_nothing(), "/")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert reply.text == HTML
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    served = Parsed(reply.text)
    assert sorted(tag for tag, _ in served.inline) == ["script", "style"]
    for tag, content in served.inline:
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in reply.headers["content-security-policy"]


def test_a_changed_script_has_another_digest_and_no_script_is_allowed_where_there_is_none() -> None:
    assert content_policy("<script>a</script>") != content_policy("<script>b</script>")
    assert "script-src 'none'; style-src 'none'" in content_policy("<p>text</p>")


def test_the_example_is_the_demonstration_s_text_with_its_answers() -> None:
    example = get(app_of_nothing(), "/example").json()
    assert example["text"] == demo_text()
    assert [q["question"] for q in example["questions"]] == [fact.question for fact in DEMO_FACTS]
    assert all(q["answer"] in example["text"] for q in example["questions"])


def test_without_the_page_there_is_no_such_route() -> None:
    app = app_of_nothing(page=False)
    for path in ("/", "/example"):
        reply = get(app, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(("options", "status"), [([], 200), (["--no-answers"], 404)])
def test_serve_shows_the_page_where_it_answers(
    options: list[str], status: int, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []

    def run(started: Server, sockets: list[socket.socket]) -> None:
        served.append(started.config.app)
        sockets[0].close()

    monkeypatch.setattr(Server, "run", run)
    monkeypatch.setattr(logs, "configure", lambda **_: None)
    assert cli.main(["serve", "--port", "0", "--model", str(tiny_model_path), *options]) == 0
    assert get(served[0], "/").status_code == status


# -- what stands in it -------------------------------------------------------------------------------------------------


def test_nothing_comes_from_elsewhere() -> None:
    assert not re.search(r"https?:|url\(|@import|\bimport\b|\bsrc=", HTML)
    links = [value for _, attributes in PAGE.tags for name, value in attributes.items() if name in ("href", "action")]
    assert [str(link).partition(",")[0] for link in links] == ["data:image/png;base64"]


def test_no_text_of_the_server_can_become_markup() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|DOMParser", SCRIPT)
    for tag, attributes in PAGE.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag


def test_nothing_is_kept_by_the_browser() -> None:
    assert not re.search(r"localStorage|sessionStorage|indexedDB|cookie", SCRIPT)


def test_the_script_finds_the_elements_and_parts_that_it_names() -> None:
    assert len(set(IDS)) == len(IDS)
    used = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT))
    for listed in re.findall(r"for \(const \w+ of \[([^\]]+)\]\) \$\(", SCRIPT):
        used |= set(re.findall(r'"([\w-]+)"', listed))
    assert len(used) > 20
    assert used <= set(IDS)
    parts = {str(attributes["data-part"]) for _, attributes in PAGE.tags if "data-part" in attributes}
    assert set(re.findall(r'part\("(\w+)"\)', SCRIPT)) <= parts
    written = " ".join(re.findall(r"this\.put\(\{(.*?)\}\)", SCRIPT, re.DOTALL))
    assert {name for name in re.findall(r"(\w+): ", written) if name in parts} >= parts - {
        "name",
        "about",
        "answer",
    } - {*("error", "fill", "request")}


def test_errors_are_told_in_plain_words_by_codes_that_there_are() -> None:
    table = re.search(r"const PLAIN = \{(.*?)\};", SCRIPT, re.DOTALL)
    assert table is not None
    codes = set(re.findall(r"^  (\w+): ", table[1], re.MULTILINE))
    assert codes - set(ERRORS) == {"unreachable"}
    assert {error.code for error in (InvalidRequest, TooLarge, QueueFull, Unauthorized, RateLimited)} <= codes


def test_everything_to_fill_in_has_a_label() -> None:
    labels = {attributes.get("for") for tag, attributes in PAGE.tags if tag == "label"}
    fields = {attributes["id"] for tag, attributes in PAGE.tags if tag in ("input", "textarea", "select")}
    assert fields == labels
    for _, attributes in PAGE.tags:
        for name in ("aria-describedby", "aria-labelledby"):
            assert set((attributes.get(name) or "").split()) <= set(IDS)


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """``condense serve`` over the embedded model: its address, and the key that it wants."""
    key, lines = new_key("reader")
    (tmp_path / "keys.toml").write_text(lines)
    code = "import sys; from condense_core.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--threads", "1", "--methods", "pool,select"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [*command, "--keys", str(tmp_path / "keys.toml")], stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        try:
            for _ in range(240):
                if found := re.search(r"http://[\d.:]+", (tmp_path / "log").read_text()):
                    break
                with pytest.raises(subprocess.TimeoutExpired):  # it must not have ended
                    process.wait(0.5)
            assert found is not None
            yield found[0], key
        finally:
            process.terminate()
            process.wait(60)


def text_of(element: str) -> str:
    return f"document.getElementById('{element}').textContent"


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="needs Chromium, on the path or named by CONDENSE_BROWSER")
def test_a_browser_asks_in_four_ways_and_shows_answers_errors_and_load(running: tuple[str, str]) -> None:
    url, key = running
    with Browser(str(find_browser())) as browser:
        browser.open(f"{url}/")

        # The server wants a key: the page asks for it, and then knows what is offered.
        browser.wait("!document.getElementById('key-field').hidden")
        browser.run("document.getElementById('example').click()")
        browser.wait("document.getElementById('text').value.length > 1000")
        browser.run("document.getElementById('text').focus()")
        browser.press("Enter", 13, control=True)
        browser.wait(f"{text_of('status')} === 'The server asks for a key.' && document.activeElement.id === 'key'")
        browser.type(key)
        browser.press("Enter", 13, control=True)
        browser.wait(f"{text_of('status')}.startsWith('Answered in') && document.getElementById('stop').hidden", 90)
        assert browser.run(text_of("headline")) == "condense-tiny, float32 on cpu"

        # Every card has what the server says to the same request.
        client = httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60)
        asked = {"text": demo_text(), "question": DEMO_FACTS[0].question, "ratio": 4}
        shown = browser.run(
            "cards.map((card) => Object.fromEntries(['answer', 'positions', 'cache', 'method', 'saving']"
            ".map((name) => [name, card.part(name).textContent])))"
        )
        for way, card in zip(("full", "soft", "pruned", "nothing"), shown, strict=True):
            told = client.post("/v1/answer", json={**asked, "way": way}).json()
            assert card["answer"] == told["answer"]
            assert card["positions"] == f"{told['positions']:,}"
            assert card["method"] == (told["method"] or "\u2013")
        assert shown[0]["answer"] == DEMO_FACTS[0].answer
        assert browser.run(text_of("expected")) == f"The text says: {DEMO_FACTS[0].answer}"
        assert shown[1]["saving"] == "25% of the text, 4x smaller"
        widths = browser.run("cards.map((card) => parseFloat(card.part('fill').style.width))")
        assert widths[0] == 100 > widths[2] > widths[1] > 24 > widths[3] == 0
        browser.wait(f"{text_of('p99')} !== '\\u2013'")
        assert browser.run("document.getElementById('spark-line').getAttribute('points')")

        # One way fails, and says why and in which request; the others answer.
        browser.run("document.getElementById('ratio').value = '3'")
        browser.press("Enter", 13)
        browser.wait(f"{text_of('status')} === 'Answered in 3 of 4 ways.'", 90)
        failed = browser.run("cards[1].part('error').innerText")
        assert failed.startswith("The server cannot do this.\n\nRatio: got 3, expected one of 2, 4, 8, 16, 32")
        assert re.search(r"Request [0-9a-f]{32}$", failed)
        assert browser.run("cards.map((card) => card.part('error').hidden)") == [True, False, True, True]

        # Escape ends what is asked, for the server too.
        browser.press("Enter", 13)
        browser.wait("cards[0].root.getAttribute('aria-busy') === 'true'")
        browser.press("Escape", 27)
        assert browser.run(text_of("status")) == "Stopped."
        assert browser.run("cards[3].part('answer').textContent") == "Stopped."  # the first may have had its answer
        assert browser.run("document.getElementById('stop').hidden")
        browser.wait(f"{text_of('waiting')} === '0' && {text_of('running')} === '0'")

        # What the server says stays text, even for a script that would have it otherwise.
        browser.run(
            "cards[0].show({answer: '<b>bold</b>', way: 'full', method: null, context_tokens: 1, positions: 1,"
            " kv_bytes: 1, read_ms: 0, answer_ms: 1})"
        )
        assert browser.run("cards[0].part('answer').childElementCount") == 0
        with pytest.raises(AssertionError, match="TrustedHTML"):
            browser.run("document.body.innerHTML = '<b>bold</b>'")
        assert [each for each in browser.problems if "TrustedHTML" not in each] == []

        # Nothing is cut off or scrolls sideways on a telephone.
        browser.resize(360, 740)
        assert browser.run("document.documentElement.scrollWidth") == 360
