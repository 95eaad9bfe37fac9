"""Verifiers that compare texts and JSON: final_answer, contains, json. Each is False where nothing is expected."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

from student_trainer.data import Example

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_FENCE = re.compile(r"```[\w-]*\n(.*?)```", re.DOTALL)


def after_thinking(text: str) -> str | None:
    """What follows the last think block, without spaces around it; None where a think block never ends."""
    _, closed, answer = text.rpartition(THINK_CLOSE)
    if THINK_OPEN in answer:
        return None
    return answer.strip() if closed else text.strip()


def both(text: str, example: Example) -> tuple[str, str] | None:
    """The answer and what is expected, each without thinking; None where there is not both."""
    answer = after_thinking(text)
    expected = None if example.expected is None else after_thinking(example.expected)
    return None if answer is None or expected is None else (answer, expected)


def final_answer(text: str, example: Example) -> bool:
    """Whether what follows the last think block is the expected output, runs of white space counted as one space."""
    found = both(text, example)
    return found is not None and found[0].split() == found[1].split()


def contains(text: str, example: Example) -> bool:
    """Whether the expected output stands in the answer as whole words, in upper or lower case, with any white space."""
    found = both(text, example)
    if found is None or not found[1]:
        return False
    words = r"\s+".join(map(re.escape, found[1].split()))
    return re.search(rf"(?<!\w){words}(?!\w)", found[0], re.IGNORECASE) is not None


def json_value(text: str, example: Example) -> bool:
    """Whether the answer, or its last fenced block, is JSON of the same value as the expected output."""
    found = both(text, example)
    if found is None:
        return False
    fenced = _FENCE.findall(found[0])
    answer, expected = _canonical(fenced[-1] if fenced else found[0]), _canonical(found[1])
    return answer is not None and answer == expected


def _canonical(text: str) -> str | None:
    """JSON in one way of writing it (1 and 1.0 are one number), None for what is no JSON."""
    try:
        value = json.loads(text, parse_int=Decimal, parse_float=Decimal, parse_constant=_no_number)
    except (ValueError, RecursionError, ArithmeticError):
        return None
    return json.dumps(value, sort_keys=True, default=lambda number: {"a number": str(number.normalize())})


def _no_number(name: str) -> Any:
    raise ValueError(name)
