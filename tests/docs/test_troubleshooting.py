"""docs/troubleshooting.md quotes messages that the programs really have, and cites threads that can be opened."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.docs.examples import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GAP = "\0"
"""Stands where a message has a value."""


def messages() -> Iterator[str]:
    """Every text of the programs, f-strings and %-formats with a gap for each value."""
    for folder in ("protos", "student_trainer", "teacher_server"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else GAP for p in node.values]
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%[-.\d]*[sdfgex]", GAP, node.value)


def quotes() -> list[str]:
    """The quoted lines of the page."""
    return re.findall(r"^> (.+)$", PAGE, re.M)


def test_every_quoted_message_is_one_of_the_programs() -> None:
    known = "\n".join(" ".join(text.split(" ")) for text in messages())
    pieces = [(quote, piece) for quote in quotes() for piece in re.split(r"…|; ", quote)]
    missing = [
        f"{piece!r} of {quote!r}" for quote, piece in pieces if len(piece.strip()) > 3 and piece.strip() not in known
    ]
    assert len(quotes()) >= 25
    assert not missing


def test_every_part_of_a_run_has_its_symptoms() -> None:
    groups = re.split(r"^## ", PAGE, flags=re.M)[1:]
    symptoms = {group.splitlines()[0]: group.count("\n### ") for group in groups}
    assert sum(symptoms.values()) >= 25
    assert not [name for name, count in symptoms.items() if count < 2]


def test_threads_are_cited_by_links_whose_number_is_theirs() -> None:
    links = re.findall(r"\[([^\]]*#(\d+))\]\((https://github\.com/[\w.-]+/[\w.-]+/(?:issues|pull)/(\d+))\)", PAGE)
    assert len(links) >= 40
    assert not [name for name, number, _, target in links if number != target]
