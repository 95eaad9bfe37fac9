"""Verifiers of mathematics: number, boxed, and math with the library math-verify.

What is expected may be a bare answer, a solution that ends with `#### 72` (GSM8K), or one with \\boxed{72}.
"""

from __future__ import annotations

import math as arithmetic
import re
import threading

from student_trainer.data import Example
from student_trainer.verifiers.texts import both

SECONDS = 5
"""What math-verify may take for one expression."""
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?<![\w.,])([-−+]?)\s?\$?({_DIGITS})(?:\s*/\s*(\d+(?:\.\d+)?))?")
_LOOSE = re.compile(rf"()({_DIGITS})(?:\s*/\s*(\d+(?:\.\d+)?))?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SPACING = re.compile(r"\\left|\\right|\\[!,;: ]|\\quad|~|\s|\$")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")


def number(text: str, example: Example, *, tolerance: float = 1e-6) -> bool:
    """Whether the last number of the answer is the last one that is expected, up to `tolerance`, relative or absolute.

    Commas between thousands, a currency sign and fractions (3/4) are understood.
    """
    found = both(text, example)
    return found is not None and _equal(last_number(_solution(found[0])), last_number(_solution(found[1])), tolerance)


def boxed(text: str, example: Example) -> bool:
    r"""Whether the last \boxed{...} of the answer holds what is expected: the same number, or the same text but for
    spaces, dollar signs and other ways of writing them in LaTeX.
    """
    found = both(text, example)
    answer = None if found is None else last_box(found[0])
    if found is None or answer is None:
        return False
    return _same(answer, _solution(found[1]))


def math(text: str, example: Example) -> bool:
    r"""Whether the answer is mathematically the expected one, as math-verify finds and compares them: 0.5, 1/2 and
    \frac12 are one. `pip install 'strong2weak[math]'`.
    """
    from math_verify import parse, verify

    found = both(text, example)
    if found is None:
        return False
    if boxed(text, example):
        return True
    # Its limit of time is a signal, which the main thread alone can have.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    expected = _solution(found[1])
    gold = parse(f"\\boxed{{{expected}}}", parsing_timeout=seconds) or parse(expected, parsing_timeout=seconds)
    answer = parse(found[0], parsing_timeout=seconds)
    return bool(gold) and bool(answer) and bool(verify(gold, answer, timeout_seconds=seconds))


def last_number(text: str) -> float | None:
    """The last number of a text, None where there is none."""
    found = list(_NUMBER.finditer(text)) or list(_LOOSE.finditer(text))
    if not found:
        return None
    sign, digits, divisor = found[-1].groups()
    value = float(digits.replace(",", ""))
    if divisor is not None:
        if float(divisor) == 0:
            return None
        value /= float(divisor)
    return -value if sign in ("-", "−") else value


def last_box(text: str) -> str | None:
    r"""What the last whole \boxed{...} of a text holds, None where there is none."""
    for start in reversed([found.end() for found in _BOX.finditer(text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
            if depth == 0:
                return text[start:place].strip()
    return None


def _solution(text: str) -> str:
    """The answer that a worked solution ends with, else the text itself."""
    box = last_box(text)
    if box is not None:
        return box
    _, marked, answer = text.rpartition("####")
    return answer.strip() if marked else text


def _equal(one: float | None, other: float | None, tolerance: float) -> bool:
    if one is None or other is None:
        return False
    return arithmetic.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)


def _same(one: str, other: str) -> bool:
    one, other = _plain(one), _plain(other)
    return one == other or _equal(_value(one), _value(other), 1e-9)


def _plain(text: str) -> str:
    text = _WORDS.sub(r"\1", re.sub(r"\\[dt]frac", r"\\frac", text))
    text = _SPACING.sub("", text).replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r"\^(\\circ|\{\\circ\})", "", text)
    return text.rstrip(".").removesuffix("%")


def _value(text: str) -> float | None:
    """The number that a text is as a whole."""
    fraction = re.fullmatch(r"(-?)\\frac\{?(\d+)\}?\{?(\d+)\}?", text)
    if fraction and int(fraction[3]):
        return (-1 if fraction[1] else 1) * int(fraction[2]) / int(fraction[3])
    whole = _NUMBER.fullmatch(text)
    return last_number(text) if whole else None
