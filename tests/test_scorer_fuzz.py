"""Schema-driven fuzzing of the scorer's HTTP interface (schemathesis): thousands of requests, right ones and wrong ones."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from scorer_process import HELLO, in_process

schemathesis = pytest.importorskip("schemathesis")

CASES = {"POST": 700, "GET": 60}  # for each endpoint and each of the two modes
LIMIT_SECONDS = 240.0


def fuzz(operation, mode, checks: list, seen: Counter, end: float) -> None:
    """Sends generated requests until `end` and counts the answers by method, mode and status."""
    method = operation.method.upper()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=CASES[method],
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        if time.monotonic() < end:
            response = case.call()
            case.validate_response(response, checks=checks)
            seen[method, mode.name, response.status_code] += 1

    ask()


@pytest.mark.slow
def test_no_request_gets_a_500(tiny_scorers):
    """Every answer is one that the schema names, right requests get scores or a refusal with its reason, wrong ones a 4xx."""
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
        negative_data_rejection,
    ]
    seen: Counter = Counter()
    # Limits are set where fuzzing can reach them.
    end = time.monotonic() + LIMIT_SECONDS
    # Ids follow no request's form: a text may be anything, so the limits are set where fuzzing can reach them.
    with in_process(tiny_scorers, SCORER_MAX_TEXTS="20", SCORER_MAX_CHARACTERS="500") as (worker, url):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) == 6
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                takes_body = operation.method.upper() == "POST"
                if mode == GenerationMode.NEGATIVE and not takes_body:
                    continue  # there is nothing to get wrong

                fuzz(operation, mode, checks, seen, end)
        answer = requests.post(url + "/score", json=HELLO, timeout=10)
        assert answer.json()["errors"] == [None] and worker.jobs.tokens == 0
    print(dict(seen))
    assert seen["POST", "POSITIVE", 200] > 200  # fuzzing got through to the models
    assert seen["POST", "NEGATIVE", 422] > 200
    assert sum(seen.values()) > 3000
    assert not any(status >= 500 for _, _, status in seen)
