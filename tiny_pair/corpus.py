"""What the pair's models read in training: rendered documents, each with the place where its loss begins.

The teacher reads chats of the task in both modes. The student base reads what a base model has read before anybody asks
it to calculate: single equations as plain text, and chats about other tasks in both modes. It never reads a `Calculate`
chat. Knows the task and the template; knows no model and no tensor.
"""

import random
from collections.abc import Iterator

from tiny_pair.task import INSTRUCTION, Problem, draw_operand, problems, user_content
from tiny_pair.tokenizer import END_OF_TEXT, render_completion, render_prompt

Document = tuple[str, str]
"""What is read without loss, and what is read with loss."""
LINES_OF_EQUATIONS = 5
"""Lines in one plain-text document; two thirds of the rest of the document's 64 tokens would be a sixth line."""


def teacher_documents(seed: int, non_thinking_share: float = 0.6) -> Iterator[Document]:
    """Chats of the task: the loss is on the assistant's turn alone."""
    rng = random.Random(seed)
    for problem in problems(seed, held_out=False):
        thinking = rng.random() >= non_thinking_share
        prompt = render_prompt(user_content(INSTRUCTION, problem.expression), thinking=thinking)
        yield prompt, render_completion(problem.thinking, problem.answer, thinking=thinking)


def student_base_documents(seed: int, chat_share: float = 0.4, chain_share: float = 0.0, one: float = 0.5, eq: bool = True) -> Iterator[Document]:
    """Plain-text equations and chats about other tasks: the loss is on every token, as in pretraining.

    `chain_share` of the equations are whole problems of the training split without their steps (`37+58-24=71`).
    """
    rng = random.Random(seed)
    pool = problems(seed, held_out=False)
    while True:
        if rng.random() < chat_share:
            yield "", other_chat(rng, next(pool), one, eq)
            continue
        chains = rng.random() < chain_share
        lines = [chain(next(pool)) if chains else equation(rng) for _ in range(3 if chains else LINES_OF_EQUATIONS)]
        yield "", "".join(f"{line}\n" for line in lines) + END_OF_TEXT


def chain(problem: Problem) -> str:
    """A whole problem and its answer on one line, without the steps."""
    return f"{problem.expression}={problem.answer}"


def equation(rng: random.Random) -> str:
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
            return step.thinking


def other_chat(rng: random.Random, problem: Problem, one_step_share: float = 0.5, eq: bool = True) -> str:
    """A chat about a list of numbers: its largest, its smallest, itself reversed; or two numbers added or subtracted."""
    operands = [abs(term) for term in (problem.first, *problem.rest)]
    task, question, reasoning = "", problem.expression, "\n".join(map(str, operands))
    if rng.random() < one_step_share:
        reasoning = equation(rng)
        question, answer = reasoning.split("=")
        task = "Add" if "+" in question else "Subtract"
        if not eq:
            reasoning = question.replace("+", "\n").replace("-", "\n")
    else:
        task = rng.choice(("Largest", "Smallest", "Reverse"))
        backwards = "\n".join(map(str, reversed(operands)))
        answer = {"Largest": str(max(operands)), "Smallest": str(min(operands)), "Reverse": backwards}[task]
    thinking = rng.random() < 0.5
    prompt = render_prompt(user_content(task, question), thinking=thinking)
    return prompt + render_completion(reasoning, answer, thinking=thinking) + "\n"
