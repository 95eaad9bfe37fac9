"""The task of the embedded pair: chains of sums and differences, solved step by step or at once.

Knows how problems are drawn, how their thinking reads, which of them are held out, and when an answer is right.
Knows no tokenizer, no chat template and no model; pure Python, and the same seed gives the same problems everywhere.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

INSTRUCTION = "Calculate"
OPERANDS_SHARES = {2: 0.4, 3: 0.3, 4: 0.3}
"""How large a share of the problems has how many operands."""
LARGEST_OPERAND = 99
ONE_DIGIT_SHARE = 0.3
"""The share of operands that have one digit."""
HELD_OUT_ONE_IN = 16
"""One problem in so many belongs to the held-out split."""


@dataclass(frozen=True)
class Problem:
    """A first operand and the signed operands that follow it: `(37, (58, -24))` is 37+58-24."""

    first: int
    rest: tuple[int, ...]

    @property
    def expression(self) -> str:
        return str(self.first) + "".join(f"{operand:+d}" for operand in self.rest)

    @property
    def operands(self) -> int:
        return 1 + len(self.rest)

    @property
    def answer(self) -> str:
        return str(self.first + sum(self.rest))

    @property
    def thinking(self) -> str:
        """The steps, one a line: `37+58=95`, then `95-24=71`."""
        lines, total = [], self.first
        for operand in self.rest:
            lines.append(f"{total}{operand:+d}={total + operand}")
            total += operand
        return "\n".join(lines)

    @property
    def held_out(self) -> bool:
        """Whether the problem belongs to the held-out split: a property of its terms, whatever their order.

        So no training problem is a held-out one, and none is a held-out one with its terms exchanged. Single steps are
        not problems: `37+58=95` may stand in the thinking of a training problem though `37+58` is held out.
        """
        terms = ",".join(str(term) for term in sorted((self.first, *self.rest)))
        digest = hashlib.blake2b(terms.encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def draw_operand(rng: random.Random) -> int:
    """A number from 1 to 99, one-digit numbers more often than a uniform draw would give."""
    return rng.randint(1, 9) if rng.random() < ONE_DIGIT_SHARE else rng.randint(10, LARGEST_OPERAND)


def draw_problem(rng: random.Random) -> Problem:
    """A problem of two to four operands whose running total never falls below zero, from either split."""
    first = total = draw_operand(rng)
    rest = []
    operands = rng.choices(list(OPERANDS_SHARES), list(OPERANDS_SHARES.values()))[0]
    for _ in range(operands - 1):
        operand = draw_operand(rng)
        if operand <= total and rng.random() < 0.5:
            operand = -operand
        rest.append(operand)
        total += operand
    return Problem(first, tuple(rest))


def problems(seed: int, *, held_out: bool) -> Iterator[Problem]:
    """An endless stream of problems of one split; may repeat a problem."""
    rng = random.Random(f"{seed}:{held_out}")
    while True:
        problem = draw_problem(rng)
        if problem.held_out == held_out:
            yield problem


def distinct_problems(count: int, seed: int, *, held_out: bool) -> list[Problem]:
    """`count` different problems of one split."""
    found: dict[Problem, None] = {}
    for problem in problems(seed, held_out=held_out):
        found.setdefault(problem)
        if len(found) == count:
            break
    return list(found)


def user_content(instruction: str, text: str) -> str:
    """The user's turn of one record of instruction data: the instruction, and its input (if any) on the next line."""
    return instruction + ("\n" + text if text else "")


def final_answer(completion: str) -> str:
    """What a completion answers: the text after its think block, without the space around it.

    A think block that never closes leaves no answer: the empty string.
    """
    if "<think>" in completion and "</think>" not in completion:
        return ""
    return completion.rsplit("</think>", 1)[-1].strip()


def is_right(completion: str, answer: str) -> bool:
    """Whether a completion, in either mode and without its end-of-turn token, gives exactly the right answer."""
    return final_answer(completion) == answer
