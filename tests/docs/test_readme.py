"""What the README's calls answer: its server, asked as the README asks it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.docs.desk import Desk
from tests.docs.examples import Example, examples

BLOCKS = examples("README.md")


@pytest.fixture
def readme(desk: Desk) -> Desk:
    """The README's server runs."""
    (server,) = [e for e in BLOCKS if e.how == "serves"]
    desk.serve(server)
    return desk


def block(containing: str) -> Example:
    """The one block with these words."""
    (found,) = [e for e in BLOCKS if containing in e.text]
    return found


def asked(desk: Desk, route: str) -> dict[str, Any]:
    answer = json.loads(desk.run(block(f"curl -s http://127.0.0.1:8000{route}")))
    assert isinstance(answer, dict)
    return answer


def test_curl_teacher(readme: Desk) -> None:
    answer = asked(readme, "/v1/teacher")
    assert answer["vocab_size"]
    assert answer["fingerprint"]


def test_curl_score(readme: Desk) -> None:
    first = asked(readme, "/v1/score")["sequences"][0]
    assert len(first["top_token_ids"][0]) == 3
    assert len(first["tail_logprob"][0]) == 2
    assert len(first["token_logprobs"]) == len(first["top_logprobs"])


def test_curl_generate_answers_in_both_modes(readme: Desk) -> None:
    completions = asked(readme, "/v1/generate")["completions"]
    texts = [c["text"] for c in sorted(completions, key=lambda c: int(c["prompt_index"]))]
    assert "<think>" in texts[0]
    assert texts[0].strip().endswith("71")
    assert "<think>" not in texts[1]


def test_python_example(readme: Desk) -> None:
    assert readme.run(block("from student_trainer.teacher_client import connect")).strip().startswith("[-")
