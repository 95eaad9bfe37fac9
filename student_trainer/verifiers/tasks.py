"""The verifier of reasoning-gym's problems: the package's own scorer of each task.

Some of its scorers give an answer to Python's eval or to sympy's parser, which evaluates too. A model's text is not to
be trusted so far: such a task gets an answer only where it is made of what its answers are made of, see `EVALUATED`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from functools import cache

from student_trainer.data import Example
from student_trainer.errors import UserError
from student_trainer.verifiers.texts import after_thinking

log = logging.getLogger(__name__)

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FUNCTIONS = re.compile(r"sin|cos|tan|cot|sec|csc|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs|pi|[A-Za-z]")
LONGEST = 500
"""Characters of an answer that is evaluated."""


def harmless_list(answer: str) -> bool:
    """Whether a text is at most a list of numbers and words: nothing is called or raised to a power."""
    return len(answer) <= LONGEST and re.fullmatch(r"[\w\s,.\[\]'\"+-]*", answer) is not None


def harmless_formula(answer: str) -> bool:
    """Whether a text is at most a formula of numbers, single letters and known functions, without large powers."""
    if len(answer) > LONGEST or not re.fullmatch(r"[A-Za-z0-9\s+\-*/^(),.]*", answer):
        return False
    names = re.findall(r"[A-Za-z]\w*", answer)
    known = all(_FUNCTIONS.fullmatch(name) for name in names)
    attribute = re.search(r"\.\s*[A-Za-z]", answer)
    power = re.search(r"(?:\*\*|\^)[-(\s]*(?:\d{3,}|[\w.()]+\s*(?:\*\*|\^))", answer)
    return known and not attribute and not power


EVALUATED: dict[str, Callable[[str], bool]] = {
    "binary_matrix": harmless_list,
    "n_queens": harmless_list,
    "spiral_matrix": harmless_list,
    "string_insertion": harmless_list,
    "countdown": harmless_formula,
    "intermediate_integration": harmless_formula,
    "polynomial_multiplication": harmless_formula,
    "puzzle24": harmless_formula,
    "simple_integration": harmless_formula,
}
"""Tasks whose scorer evaluates an answer, and what it must be."""


def reasoning_gym(text: str, example: Example, *, threshold: float = 1.0) -> bool:
    """Whether the task's scorer gives the answer `threshold` or more, of 0 to 1: what stands in the last
    <answer></answer> after the think block, else all of it.

    The example comes from a `reasoning-gym:` source; UserError where it does not. What a scorer cannot read is wrong.
    """
    kept = example.metadata or {}
    if not {"task", "options", "metadata"} <= kept.keys():
        step = "use it with data_path=reasoning-gym:task, and evaluation on problems of the same source"
        raise UserError("the example has no task of reasoning-gym", f"verifier reasoning_gym, {example.id}", step)
    answer = after_thinking(text)
    if answer is None:
        return False
    marked = _ANSWER.findall(answer)
    answer = marked[-1].strip() if marked else answer
    task = kept["task"]
    if task in EVALUATED and not EVALUATED[task](answer):
        return False
    entry = {"question": example.messages[-1].content, "answer": example.expected, "metadata": kept["metadata"]}
    try:
        score = _scorer(task, json.dumps(kept["options"], sort_keys=True))(answer=answer, entry=entry)
    except Exception as error:  # noqa: BLE001 - its parsers raise anything at what a model writes
        log.debug("the scorer of %s cannot read %r: %r", task, answer[:200], error)
        return False
    return bool(score >= threshold)


@cache
def _scorer(task: str, options: str) -> Callable[..., float]:
    import reasoning_gym as package

    scorer: Callable[..., float] = package.create_dataset(task, **json.loads(options)).score_answer
    return scorer
