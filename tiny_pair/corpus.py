"""What the pair's models read in training: rendered documents, each with the place where its loss begins.

The teacher reads chats of the task in both modes. The student base reads what a base model has read before anybody asks
it to calculate: single equations as plain text, and chats of other words in both modes. It never reads a `Calculate`
chat, a chain of two steps, or a step in a think block. Knows the task and the template; knows no model and no tensor.
"""

import random
from collections.abc import Iterator

from tiny_pair.task import INSTRUCTION, Problem, draw_operand, problems, user_content
from tiny_pair.tokenizer import END_OF_TEXT, render_completion, render_prompt

Document = tuple[str, str]
"""What is read without loss, and what is read with loss."""
NON_THINKING_SHARE = 0.4
"""The share of the teacher's chats that answer at once."""
CHAT_SHARE, ONE_STEP_SHARE = 0.4, 0.25
"""The share of the student base's documents that are chats, and of those the share that ask for one single step."""
EQUATIONS_A_DOCUMENT = 5


def teacher_documents(seed: int) -> Iterator[Document]:
    """Chats of the task: the loss is on the assistant's turn alone."""
    rng = random.Random(seed)
    for problem in problems(seed, held_out=False):
        thinking = rng.random() >= NON_THINKING_SHARE
        prompt = render_prompt(user_content(INSTRUCTION, problem.expression), thinking=thinking)
        yield prompt, render_completion(problem.thinking, problem.answer, thinking=thinking)


def student_base_documents(seed: int) -> Iterator[Document]:
    """Plain-text equations and chats of other words: the loss is on every token, as in pretraining."""
    rng = random.Random(seed)
    for problem in problems(seed, held_out=False):
        if rng.random() < CHAT_SHARE:
            yield "", one_step_chat(rng) if rng.random() < ONE_STEP_SHARE else list_chat(rng, problem)
        else:
            yield "", "".join(f"{one_step(rng).thinking}\n" for _ in range(EQUATIONS_A_DOCUMENT)) + END_OF_TEXT


def one_step(rng: random.Random) -> Problem:
    """One step as it occurs in the task: a running total of up to three operands, and one operand more.

    Steps that are held-out problems by themselves are left out.
    """
    while True:
        total = sum(draw_operand(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))
        operand = draw_operand(rng)
        if operand <= total and rng.random() < 0.5:
            operand = -operand
        step = Problem(total, (operand,))
        if not step.held_out:
            return step


def one_step_chat(rng: random.Random) -> str:
    """A chat that asks to add or subtract two numbers; its thinking merely lists them."""
    step = one_step(rng)
    return _chat(rng, "Add" if step.rest[0] > 0 else "Subtract", step, step.answer)


def list_chat(rng: random.Random, problem: Problem) -> str:
    """A chat about the numbers of an expression: the largest, the smallest, or all of them backwards."""
    numbers = _numbers(problem)
    task = rng.choice(("Largest", "Smallest", "Reverse"))
    backwards = "\n".join(map(str, reversed(numbers)))
    return _chat(rng, task, problem, {"Largest": str(max(numbers)), "Smallest": str(min(numbers))}.get(task, backwards))


def _chat(rng: random.Random, task: str, problem: Problem, answer: str) -> str:
    thinking = rng.random() < 0.5
    reasoning = "\n".join(map(str, _numbers(problem)))
    prompt = render_prompt(user_content(task, problem.expression), thinking=thinking)
    return prompt + render_completion(reasoning, answer, thinking=thinking) + "\n"


def _numbers(problem: Problem) -> list[int]:
    return [abs(term) for term in (problem.first, *problem.rest)]
