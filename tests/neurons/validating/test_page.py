"""The leaderboard's page: it loads nothing, keeps text text, and shows in a browser what the validator says."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
import httpx

from condense_core.neurons.tiers import read_tiers
from condense_core.neurons.validating.board import board
from condense_core.neurons.validating.ledger import Ledger
from condense_core.neurons.validating.page import page, with_boards
from condense_core.neurons.validating.status import Figures, create_status_app
from condense_testing.browser import Browser, find_browser
from condense_testing.pages import Parsed
from condense_testing.running_server import running_server
from condense_testing.subnets import played_round

PAGE = Parsed(page())
SCRIPT = max((content for tag, content in PAGE.inline if tag == "script"), key=len)
NASTY = "5</script><script>document.title='taken'</script><b>bold</b>"


def made_board(folder: Path, rounds: int = 12, *, miners: int = 3, **facts: Any) -> dict[str, Any]:
    """A leaderboard of rounds in which higher uids are worse, and the last one is late; one hotkey is no hotkey."""
    ledger = Ledger(folder)
    hotkeys = [NASTY, *(f"5{'abcdefghij'[uid % 10] * 46}{uid}" for uid in range(1, miners))]
    for number in range(rounds):
        values = {hotkey: max(0.0, 0.9 - 0.8 * uid / max(1, miners - 1)) for uid, hotkey in enumerate(hotkeys)}
        values[hotkeys[-1]] = 0.0 if miners > 1 else 0.5 + 0.01 * number
        ledger.record(played_round(values))
    shown = {"hotkey": "5Validator", "netuid": 7, "uid": 0, "block": 41, "waiting": "", "weights_waiting": ""}
    made = board(ledger, read_tiers(), **{**shown, **facts})
    ledger.close()
    return made


def status_app(shown: Callable[[], dict[str, Any]]) -> Any:
    return create_status_app(shown, Figures(lambda: None), is_ready=lambda: True)


# -- what is served ----------------------------------------------------------------------------------------------------


def test_the_policy_allows_the_page_s_own_script_and_style_and_nothing_else() -> None:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app=status_app(dict))
        async with httpx.AsyncClient(transport=transport, base_url="http://validator") as client:
            return await client.get("/")

    reply = asyncio.run(get())
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert reply.text == page()
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    style = next(content for tag, content in PAGE.inline if tag == "style")
    for name, content in (("script", SCRIPT), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in reply.headers["content-security-policy"]


def test_nothing_comes_from_elsewhere_and_nothing_is_kept() -> None:
    html = page().replace("http://www.w3.org/2000/svg", "")  # a name, which nobody asks for
    assert not re.search(r"https?:|url\(|@import|\bimport\b|\bsrc=", html)
    assert not re.search(r"localStorage|sessionStorage|indexedDB|cookie", SCRIPT)
    assert re.findall(r"fetch\(([^,)]*)", SCRIPT) == ['"leaderboard.json"']


def test_no_text_can_become_markup() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|DOMParser", SCRIPT)
    for tag, attributes in PAGE.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag


def test_the_script_finds_the_elements_and_parts_that_it_names() -> None:
    ids = [attributes["id"] for _, attributes in PAGE.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    made = {"rule"}  # by the script itself
    used = set(re.findall(r'(?:\$|put)\("([\w-]+)"', SCRIPT))
    assert len(used) > 20
    assert used - made <= set(ids)
    parts = {str(attributes["data-part"]) for _, attributes in PAGE.tags if "data-part" in attributes}
    named = set(re.findall(r'part\("(\w+)"\)', SCRIPT))
    written = re.search(r"row\.put\(\{(.*?)\}\)", SCRIPT, re.DOTALL)
    assert written is not None
    assert named | set(re.findall(r"^    (\w+): ", written[1], re.MULTILINE)) == parts


def test_what_it_is_written_with_is_data_and_ends_no_element(tmp_path: Path) -> None:
    shown = made_board(tmp_path)
    written = Parsed(with_boards([{"by": "v", **shown}], {NASTY: "</script><b>"}))
    assert [tag for tag, _ in written.tags] == [tag for tag, _ in PAGE.tags]
    data, script = (content for tag, content in written.inline if tag == "script")
    assert script == SCRIPT
    assert json.loads(data) == {"boards": [{"by": "v", **shown}], "names": {NASTY: "</script><b>"}}


# -- in a browser ------------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    find_browser() is None, reason="needs Chromium, on the path or named by CONDENSE_BROWSER"
)


def text_of(element: str) -> str:
    return f"document.getElementById('{element}').textContent"


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_what_a_validator_says_and_that_it_says_nothing_any_more(tmp_path: Path) -> None:
    shown = made_board(tmp_path)
    said = [shown]
    with Browser(str(find_browser())) as browser:
        with running_server(status_app(lambda: said[-1])) as url:
            browser.open(f"{url}/")
            browser.wait("document.querySelectorAll('#miners tr').length === 3")
            assert browser.run(text_of("headline")).startswith("Subnet 7, validator 0")
            research = next(tier for tier in shown["tiers"] if tier["name"] == "research")
            cells = browser.run(
                "[...document.querySelectorAll('#miners tr')].map((row) =>"
                " ['standing', 'weight', 'why'].map((name) => row.querySelector(`[data-part=${name}]`).textContent))"
            )
            expected = [[f"{m['standing']:.3f}", f"{100 * m['weight']:.1f}%"] for m in research["miners"]]
            assert [row[:2] for row in cells] == expected
            assert cells[-1][2] == "late: 9 s"
            assert browser.run(text_of("scored")) == "2 of 3"

            # Why a score is not more is said in words.
            why = "reason({rounds: 9}, {why: '', share: %s, quality: %s}, 12)"
            assert browser.run(why % (0.25, 0.5)) == "like another's answer: 25% of what it is worth"
            assert browser.run(why % (0.0, 0.0)) == "no better than a compression that needs no work"
            assert browser.run(why % (1.0, 0.5)) == ""

            # A hotkey is text, whatever stands in it, and can be had whole.
            assert browser.run("document.title") == "condense_core: leaderboard"
            assert NASTY in browser.run("[...document.querySelectorAll('.key')].map((key) => key.title)")
            assert browser.run("document.querySelectorAll('#miners b').length") == 0

            # The chart has a line for each miner; keys go through its rounds, and say what is there.
            assert browser.run("document.querySelectorAll('#svg .average').length") == 3
            browser.run("document.getElementById('chart').focus()")
            browser.press("End", 35)
            assert browser.run(text_of("told")).startswith("Round 12, ")
            browser.press("ArrowLeft", 37)
            assert browser.run(text_of("told")).startswith("Round 11, ")

            # A miner that is picked stands out, and stays so when its validator says something new.
            browser.run("document.querySelectorAll('#miners .pick')[1].click()")
            browser.run("document.querySelectorAll('#miners .pick')[1].focus()")
            said.append({**shown, "waiting": "chain: it is away", "block": 42})
            browser.wait(f"{text_of('headline')}.endsWith('block 42')")
            assert browser.run(text_of("notice")) == "No rounds: chain: it is away."
            assert browser.run("document.querySelectorAll('#svg .series.picked').length") == 1
            assert browser.run("document.activeElement.className") == "pick"

            # A tier that nobody has been asked in says so.
            browser.run("document.getElementById('tab-inference_0').click()")
            assert browser.run("!document.getElementById('nobody').hidden && document.getElementById('chart').hidden")
            browser.run("document.getElementById('tab-research').click()")
        browser.wait(f"{text_of('notice')}.startsWith('The validator does not answer; this is what it said')")
        assert browser.problems == []


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("miners", "rounds"), [(1, 1), (64, 40)])
def test_few_and_many_miners_fit_every_window(miners: int, rounds: int, tmp_path: Path) -> None:
    shown = made_board(tmp_path / "state", rounds, miners=miners)
    (tmp_path / "leaderboard.html").write_text(with_boards([{"by": "one", **shown}, {"by": "two", **shown}], {}))
    with Browser(str(find_browser())) as browser:
        browser.open(f"file://{tmp_path}/leaderboard.html")
        for width in (360, 800, 1280):
            browser.resize(width, 740)
            browser.wait(f"document.getElementById('svg').viewBox.baseVal.width <= {width}")
            assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.querySelectorAll('#svg .average').length") == miners
        assert browser.run("document.querySelectorAll('#svg .label').length") == min(8, miners)
        assert browser.run("document.querySelectorAll('#by option').length") == 2
        assert browser.problems == []
