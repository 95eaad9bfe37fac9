"""The server against its own OpenAPI: calls that fit it and calls that do not, made by schemathesis from the document.

What fits the document may still make no sense to this teacher (an id outside of its vocabulary), so a refusal is
right; what does not fit must be refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks

from tests.servers import Server, serving, theory, wait_for

load_all_checks()
CHECKS = [
    getattr(schemathesis.specs.openapi.checks, name)
    for name in ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
]
REFUSES = [schemathesis.specs.openapi.checks.negative_data_rejection]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A teacher with short sequences, so that whatever is generated is short too."""
    with serving(theory(max_sequence_tokens=64), max_request_mib=1, cache={"enabled": False}) as running:
        yield running


@pytest.mark.parametrize("examples", [8, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["positive", "negative"])
def test_every_route_answers_as_its_document_says(server: Server, mode: GenerationMode, examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{server.http}/openapi.json")
    schema.config.generation.update(modes=[mode])
    checks = CHECKS + (REFUSES if mode is GenerationMode.NEGATIVE else [])
    seen: Counter[tuple[str, int]] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # what a GET has that its document does not say is ignored

        @settings(
            max_examples=examples,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            answer = case.call(base_url=server.http)
            seen[case.operation.label, answer.status_code] += 1
            assert answer.status_code in (200, 405, 406, 412, 413, 415, 422, 501), (case.body, answer.text)
            refused = answer.status_code in (412, 413, 501)  # which schemathesis does not know as refusals
            case.validate_response(answer, checks=CHECKS if refused else checks)

        ask()
    if mode is GenerationMode.POSITIVE:
        assert {label for label, status in seen if status == 200} >= {"GET /v1/teacher", "GET /v1/models"}
    wait_for(lambda: server.metric("teacher_queue_tokens") == 0)
