"""Verifiers by name: `number?tolerance=0.01` of those that come along, or `module:function` of one's own."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from student_trainer.data import Example, query
from student_trainer.errors import UserError
from student_trainer.verifiers.numbers import boxed, math, number
from student_trainer.verifiers.tasks import reasoning_gym
from student_trainer.verifiers.texts import contains, final_answer, json_value

Verifier = Callable[[str, Example], float]
"""Gives True or False, or a number of which 1 and more is right."""

BUILT_IN: dict[str, Callable[..., bool]] = {
    "final_answer": final_answer,
    "contains": contains,
    "json": json_value,
    "number": number,
    "boxed": boxed,
    "math": math,
    "reasoning_gym": reasoning_gym,
}
NEEDS = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}
"""The packages that some of them need."""


def is_right(verifier: Verifier, text: str, example: Example) -> bool:
    """Whether `verifier` takes `text` for a right answer, one of part of the points being none."""
    return bool(verifier(text, example) >= 1)


def load_verifier(name: str | None, key: str = "evaluation.verifier") -> Verifier | None:
    """The verifier that the setting `key` names, None for none; UserError where it cannot be found or lacks an option.

    ModuleNotFoundError where a package is missing that it needs.
    """
    if name is None:
        return None
    where = f"{key}={name}"
    plain, options = query.parse(name, where)
    if plain in NEEDS:
        importlib.import_module(NEEDS[plain])
    function = BUILT_IN.get(plain) or _own(plain, where)
    _check_options(plain, function, options, where)
    return partial(function, **options) if options else function


def _own(name: str, where: str) -> Callable[..., Any]:
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError("not a verifier", where, f"use one of {', '.join(BUILT_IN)}, or module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        step = "name a module that Python finds from the current directory"
        raise UserError(f"cannot import {module_name}: {error}", where, step) from error
    if not callable(function):
        raise UserError(f"{module_name} has no function {function_name}", where, "name one of its functions")
    found: Callable[..., Any] = function
    return found


def _check_options(name: str, function: Callable[..., Any], options: dict[str, Any], where: str) -> None:
    if not options:
        return
    parameters = dict(list(inspect.signature(function).parameters.items())[2:])
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key, value in options.items():
        if key not in parameters:
            has = f"it has {', '.join(parameters)}" if parameters else "it has none"
            raise UserError(f"{name} has no option {key}", where, has)
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(parameters[key].default, float) and not numeric:
            raise UserError(f"{key} is {value!r}, not a number", where, f"write {key}={parameters[key].default:g}")
