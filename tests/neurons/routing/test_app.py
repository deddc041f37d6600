"""The application of a gateway: the forms of ``condense serve``, its own fields, keys, and what it does not offer."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
import httpx

from condense_core.neurons.routing.app import create_gateway_app
from condense_core.serving.client_answers import FrameParser
from condense_core.serving.keys import Keys, new_key
from condense_core.serving.wire import FRAMES, JSON, LINES, OCTETS
from condense_testing.gateways import MODEL, TEXT, Subnet, is_right, subnet

OTHER = "Rain fell on the harbour, and the boats stayed in. " * 40


@asynccontextmanager
async def client(net: Subnet, keys: Keys | None = None, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    app = create_gateway_app(net.gateway, keys=keys)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as http:
        yield http


def run(folder: Path, use: Callable[[Subnet], Awaitable[Any]], **settings: Any) -> Any:
    async def inside() -> Any:
        async with subnet(folder, **settings) as net:
            return await use(net)

    return asyncio.run(inside())


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_one_text_comes_as_octets_or_json_and_says_who_answered(tmp_path: Path) -> None:
    async def use(net: Subnet) -> None:
        await net.see([0.1, 0.9])
        async with client(net) as http:
            plain = await http.post("/v1/compress", json={"text": TEXT, "ratio": 4})
            assert (plain.status_code, plain.headers["content-type"]) == (200, OCTETS)
            assert is_right(plain.content, TEXT, 4, net.backend(0).described)
            told = {name: plain.headers[f"x-condense-{name}"] for name in ("miner", "uid", "tier", "asked")}
            assert told == {"miner": net.name(1), "uid": "2", "tier": "research", "asked": "1"}
            assert "run;dur=" in plain.headers["server-timing"]
            asked = {"text": TEXT, "routing": "k_of_n", "k": 2}
            item = (await http.post("/v1/compress", json=asked, headers={"accept": JSON})).json()
            assert (item["miner"], item["valid"], item["agree"], item["model"]) == (net.name(1), 2, 1, MODEL)
            assert is_right(base64.b64decode(item["data"]), TEXT, 4, net.backend(0).described)

    run(tmp_path, use, miners=2)


def test_texts_and_messages_come_as_frames_lines_or_json_and_errors_are_each_ones_own(tmp_path: Path) -> None:
    texts = [TEXT, "short", OTHER]

    async def use(net: Subnet) -> None:
        described = net.backend(0).described
        async with client(net) as http:
            framed = await http.post("/v1/compress", json={"texts": texts}, headers={"accept": FRAMES})
            parser = FrameParser(3, 2**24)
            found = dict(parser.feed(framed.content))
            parser.end()
            assert is_right(found[0], TEXT, 4, described)
            assert is_right(found[2], OTHER, 4, described)
            assert getattr(found[1], "code", "") == "invalid_request"
            lines = await http.post("/v1/compress", json={"texts": texts}, headers={"accept": LINES})
            each = {line["index"]: line for line in map(json.loads, lines.text.splitlines())}
            assert "tier: research 1,000 to 2,500 characters" in each[1]["error"]["message"]
            assert each[2]["tier"] == "research"
            chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
            told = (await http.post("/v1/compress", json={"messages": chat}, headers={"accept": JSON})).json()
            assert told["messages"][0] == chat[0]
            assert told["messages"][1]["soft_tokens"]["num_context_tokens"] == described.count(TEXT)

    run(tmp_path, use, miners=2)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"text": TEXT, "tier": "gold"}, (404, "unknown_tier")),
        ({"text": TEXT, "model": "other"}, (404, "unknown_model")),
        ({"text": TEXT, "routing": "one", "miner": 99}, (404, "unknown_miner")),
        ({"text": TEXT, "routing": "worst"}, (422, "invalid_request")),
        ({"text": TEXT, "miner": 1.5}, (422, "invalid_request")),
        ({"text": TEXT, "miner": True}, (422, "invalid_request")),
        ({"text": TEXT, "k": 0}, (422, "invalid_request")),
        ({"text": TEXT, "ratio": 1e300}, (422, "invalid_request")),
        ({"text": TEXT, "max_soft_tokens": 0}, (422, "invalid_request")),
        ({"text": TEXT, "timeout": 10**400}, (422, "invalid_request")),
        ({"text": TEXT, "question": "\ud800"}, (422, "invalid_request")),
        ({"text": TEXT, "colour": "red"}, (422, "invalid_request")),
        ({"text": TEXT, "method": "pool"}, (422, "invalid_request")),
        ({"text": TEXT, "priority": 1}, (422, "invalid_request")),
        ({"text": TEXT * 99}, (413, "too_large")),
        ({"text": TEXT, "timeout": 0.001}, (504, "deadline_exceeded")),
        ({}, (422, "invalid_request")),
    ],
)
def test_what_is_no_request_is_refused(tmp_path: Path, body: dict[str, Any], expected: tuple[int, str]) -> None:
    async def use(net: Subnet) -> None:
        async with client(net) as http:
            content = json.dumps(body).encode()
            assert code(await http.post("/v1/compress", content=content, headers={"content-type": JSON})) == expected

    run(tmp_path, use, miners=1)


def test_what_only_a_server_with_a_model_can_do_is_refused_with_where_to_go(tmp_path: Path) -> None:
    async def use(net: Subnet) -> None:
        async with client(net) as http:
            for route in ("/v1/prune", "/v1/answer"):
                refused = await http.post(route, json={"text": TEXT})
                assert code(refused) == (404, "not_found")
                assert "condense serve" in refused.text
            assert code(await http.get("/")) == (404, "not_found")

    run(tmp_path, use, miners=1)


def test_it_tells_of_models_tiers_load_and_health(tmp_path: Path) -> None:
    async def use(net: Subnet) -> None:
        async with client(net) as http:
            [model] = (await http.get("/v1/models")).json()["data"]
            assert (model["id"], model["limits"]["max_chars"]) == (MODEL, 7000)
            assert model["tiers"]["research"] | {"timeout": 0} == {
                "min_chars": 1000,
                "max_chars": 2500,
                "max_question_chars": 500,
                "min_ratio": 2.0,
                "max_ratio": 16.0,
                "timeout": 0,
                "share": 1.0,
                "miners": 2,
            }
            assert (await http.get("/v1/load")).json()["miners"] == dict.fromkeys(model["tiers"], 2)
            assert (await http.get("/ready")).json() == {"status": "ready"}
            assert (await http.get("/health")).json() == {"status": "ok"}
            await http.post("/v1/compress", json={"text": TEXT})
            figures = (await http.get("/metrics")).text
            assert 'condense_gateway_attempts_total{outcome="valid",tier="research"} 1.0' in figures
            assert 'condense_gateway_miners{tier="research"} 2.0' in figures
            assert 'condense_requests_total{code="ok",kind="research"} 1.0' in figures
            schema = (await http.get("/openapi.json")).json()
            assert set(schema["paths"]) >= {"/v1/compress", "/v1/models", "/v1/load"}
            assert "/v1/prune" not in schema["paths"]
            assert {"502", "503", "504"} <= set(schema["paths"]["/v1/compress"]["post"]["responses"])

    run(tmp_path, use, miners=2)


def test_a_key_pays_for_what_was_answered_and_its_day_ends(tmp_path: Path) -> None:
    secret, lines = new_key("app")
    file = tmp_path / "keys.toml"
    file.write_text(lines + f"chars_per_day = {3 * len(TEXT)}\n")

    async def use(net: Subnet) -> None:
        keys = Keys.load(file, net.gateway.usage)
        async with client(net, keys) as http:
            assert code(await http.post("/v1/compress", json={"text": TEXT})) == (401, "unauthorized")
        async with client(net, keys, authorization=f"Bearer {secret}") as http:
            asked = {"texts": [TEXT, "short"]}
            assert (await http.post("/v1/compress", json=asked)).status_code == 200
            assert net.gateway.usage.spent("app") == (len(TEXT), len(TEXT))  # the short one was refused
            assert (await http.post("/v1/compress", json={"text": TEXT})).status_code == 200
            refused = await http.post("/v1/compress", json=asked)
            assert code(refused) == (429, "rate_limited")
            assert int(refused.headers["retry-after"]) <= 86400
            assert secret not in refused.text
            assert (await http.post("/v1/compress", json={"text": TEXT})).status_code == 200

    run(tmp_path, use, miners=1)
