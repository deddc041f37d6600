"""The OpenAPI document, and requests made from it: valid ones, and ones that are wrong in every way it knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from condense_core.serving.engine import CompressionEngine
from condense_core.serving.http.app import create_app
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.service import LocalService
from condense_testing.running_server import running_server
from condense_testing.serving import FakeBackend


def no_mistake_of_the_server(_context: Any, response: Any, _case: Any) -> None:
    """Others of 500 and above are answers: a deadline of a millisecond is exceeded."""
    assert response.status_code != 500, response.text


CHECKS: list[CheckFunction] = [
    *(no_mistake_of_the_server, status_code_conformance, content_type_conformance),
    *(response_headers_conformance, response_schema_conformance),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    observer = PrometheusObserver(torch.device("cpu"))
    engine = CompressionEngine(FakeBackend(), observer=observer)
    with running_server(create_app(LocalService(engine), observer=observer, page=False)) as url:
        yield url


def fuzzed(url: str, operation: str, examples: int) -> None:
    """Send requests to one operation, generated from the document and mutated, and check every answer."""
    method, path = operation.split()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schema.config.generation.update(modes=list(schemathesis.GenerationMode))
    target = schema[path][method.upper()]

    @given(case=target.as_strategy())
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


OPERATIONS = [
    *("POST /v1/compress", "POST /v1/prune", "POST /v1/answer"),
    *("GET /v1/models", "GET /v1/load", "GET /health", "GET /ready", "GET /metrics"),
]


def test_every_route_is_in_the_document_with_examples_and_errors(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    found = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert found == set(OPERATIONS)
    for name in ("CompressBody", "PruneBody", "AnswerBody"):
        assert document["components"]["schemas"][name]["examples"]
    assert {"200", "401", "413", "422", "503", "504"} <= set(document["paths"]["/v1/compress"]["post"]["responses"])
    assert "http://" not in json.dumps(document)


def test_the_examples_of_the_document_work(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    for example in document["components"]["schemas"]["CompressBody"]["examples"]:
        assert httpx.post(f"{url}/v1/compress", json=example).status_code == 200


@pytest.mark.parametrize("operation", OPERATIONS)
def test_requests_made_from_the_document_are_answered_as_it_says(url: str, operation: str) -> None:
    fuzzed(url, operation, 40 if operation.startswith("POST") else 5)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS[:3])
def test_many_requests_made_from_the_document(url: str, operation: str) -> None:
    fuzzed(url, operation, 400)
