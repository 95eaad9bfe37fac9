"""What counts as a right answer: functions of a model's text and the example that it answers.

It knows no model and no metric. A verifier of your own is `module:function`, imported from the current directory or an
installed package, and gets the whole text, think tags included.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from student_trainer.data import Example
from student_trainer.errors import UserError

Verifier = Callable[[str, Example], bool]
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def after_thinking(text: str) -> str | None:
    """What follows the last think block, without spaces around it; None where a think block never ends."""
    _, closed, answer = text.rpartition(THINK_CLOSE)
    if THINK_OPEN in answer:
        return None
    return answer.strip() if closed else text.strip()


def final_answer(text: str, example: Example) -> bool:
    """Whether what follows the last think block is the expected output, runs of white space counted as one space."""
    answer = after_thinking(text)
    expected = None if example.expected is None else after_thinking(example.expected)
    return answer is not None and expected is not None and answer.split() == expected.split()


def load_verifier(name: str | None) -> Verifier | None:
    """The verifier that `evaluation.verifier` names, None for none; UserError where it cannot be found."""
    if name is None:
        return None
    if name == "final_answer":
        return final_answer
    where = f"evaluation.verifier={name}"
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError("not a verifier", where, "use final_answer or module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        step = "name a module that Python finds from the current directory"
        raise UserError(f"cannot import {module_name}: {error}", where, step) from error
    if not callable(function):
        raise UserError(f"{module_name} has no function {function_name}", where, "name one of its functions")
    verifier: Verifier = function
    return verifier
