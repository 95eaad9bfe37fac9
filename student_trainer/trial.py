"""Stage `test`: tries the student, each teacher, one score and one answer in each mode, and shows what they said.

It says too what would go wrong later: memory that training would lack, sequences longer than a model's positions.
Everything is text that reads the same in a terminal, a pipe and the log. Knows models and teachers, no training.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from protos.scores import Completion, Ids, Mode, Prompt, Sampling, Scores, ScoreSpec
from protos.scores import Sequence as Tokens

from . import distributed
from .config import STAGE_NAMES, Config
from .data import Example
from .errors import UserError
from .evaluation import Student, answer_text
from .memory.shapes import shape_of
from .memory.student import setup_of, student_memory
from .modes import render
from .packing import packs
from .rollouts import Rollout, in_order
from .stage import open_student
from .teachers import Teacher, Teachers
from .verifiers import Verifier, is_right

log = logging.getLogger(__name__)

GIB = 2**30
NEW_TOKENS = 128
SHOWN_TOKENS, SHOWN_ALTERNATIVES, TOP_K = 48, 8, 4
"""Tokens of the scored sequence that are listed; how many of them have their alternatives beside them; how many."""


class Page:
    """Sections and lines, on the console and in the log file."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def section(self, title: str) -> None:
        """Begins a section."""
        log.debug("%s", title)
        self.console.print(f"\n── {title} ", style="bold", markup=False, highlight=False)

    def line(self, text: str, style: str | None = None) -> None:
        """One line."""
        log.debug("%s", text)
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Names and values below each other."""
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            self.line(f"  {name:{width}}  {value}")


def try_both(
    config: Config,
    teachers: Teachers,
    source: str | Path,
    example: Example,
    verifier: Verifier | None,
    console: Console,
) -> None:
    """Tries the student of `source` and the opened teachers on one example, and shows all of it."""
    page = Page(console)
    student = open_student(config, source, teachers.vocab_size)
    try:
        page.section("student")
        page.pairs(about_student(student, source))
        names = {t: "teacher" if len(teachers.all) == 1 else f"teacher {t.info.name} ({t.scope})" for t in teachers.all}
        for teacher, name in names.items():
            page.section(name)
            page.pairs(about_teacher(teacher))
        limit = min(config.evaluation.max_new_tokens, NEW_TOKENS)
        answers = {mode: _student_answer(student, example, mode, limit) for mode in Mode}
        scored = answers[Mode.NON_THINKING]
        for teacher, name in names.items():
            page.section("score" if len(names) == 1 else f"score by {name}")
            _show_score(page, student.tokenizer, teacher, scored)
        cut = 0
        for mode in Mode:
            page.section(mode.value.replace("_", "-"))
            page.line(f"  asked: {_flat(example.messages[-1].content)}")
            if example.expected is not None:
                page.line(f"  expected: {_flat(example.expected)}")
            own = answers[mode]
            text = answer_text(student.tokenizer, own)
            _show_answer(page, "student", text, own.completion_ids, own.finish_reason.value, example, verifier)
            for teacher in _answering(teachers, mode):
                said = _teacher_answer(teacher, own.prompt_ids, mode, limit)
                cut += said.finish_reason.value == "length" and limit == config.evaluation.max_new_tokens
                ids, reason = said.token_ids, said.finish_reason.value
                _show_answer(page, names[teacher], said.text, ids, reason, example, verifier)
        page.section("what training will meet")
        found = [*_lengths(config, student, teachers), *_memory(config, source, page)]
        if cut:
            found.append(f"{cut} answers of a teacher were cut at evaluation.max_new_tokens = {limit}; raise it")
        for problem in found:
            page.line(f"  ! {problem}", "yellow")
        if not found:
            page.line("  nothing stands against it")
        log.info("%s models are loaded and fit together", "both" if len(names) == 1 else "all")
    finally:
        student.engine.close()


def about_student(student: Student, source: str | Path) -> list[tuple[str, str]]:
    """What was loaded, in words."""
    model = student.model
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    first = next(model.parameters())
    text = model.config.get_text_config()
    return [
        ("from", str(source)),
        ("model", f"{type(model).__name__}, {weights:,} weights, {trained:,} of them train"),
        ("held as", f"{str(first.dtype).removeprefix('torch.')} on {first.device}"),
        ("positions", f"{getattr(text, 'max_position_embeddings', None) or 'unknown'}"),
        ("logits", f"{text.vocab_size} for {max(student.tokenizer.get_vocab().values()) + 1} tokens"),
        ("rows", "packed" if packs(model) else "padded"),
        ("samples with", student.engine.name),
    ]


def about_teacher(teacher: Teacher) -> list[tuple[str, str]]:
    """What a teacher says of itself, and what was compared."""
    info, limits = teacher.info, teacher.info.limits
    return [
        ("name", f"{info.name} ({info.engine}, {info.dtype})"),
        ("fingerprint", info.fingerprint),
        ("vocabulary", f"{info.vocab_size} tokens, normalised over {info.normalized_size}"),
        ("limits", f"{limits.sequence_tokens} tokens a sequence, top {limits.top_k}, {limits.candidates} candidates"),
        ("modes", ", ".join(mode.value for mode in info.modes) or "none"),
        ("gives", ", ".join(sorted(f.value for f in info.fields)) + (", text" if info.can_generate else "")),
        ("handshake", "tokenizer, vocabulary, end ids, chat template and limits agree with the student's"),
    ]


def _student_answer(student: Student, example: Example, mode: Mode, limit: int) -> Rollout:
    prompt = render(student.tokenizer, example.messages, mode)
    student.model.eval()
    return in_order(student.engine, [prompt], max_new_tokens=limit, temperature=0.0, seed=0)[0]


def _answering(teachers: Teachers, mode: Mode) -> list[Teacher]:
    able = (t for t in teachers.all if t.info.can_generate)
    return [t for t in able if mode in t.info.modes and t.scope.mode in (None, mode)]


def _teacher_answer(teacher: Teacher, prompt: Ids, mode: Mode, limit: int) -> Completion:
    asked = [Prompt(token_ids=prompt, mode=mode)]
    return teacher.client.generate(asked, Sampling(limit, temperature=0.0))[0][0]


def _show_answer(
    page: Page, who: str, text: str, ids: Ids, reason: str, example: Example, verifier: Verifier | None
) -> None:
    judged = "" if verifier is None else ", right" if is_right(verifier, text, example) else ", wrong"
    page.line(f"  {who} ({len(ids)} tokens, {reason}{judged}):")
    for line in text.splitlines() or [""]:
        page.line(f"    {line}")


def _show_score(page: Page, tokenizer: Any, teacher: Teacher, rollout: Rollout) -> None:
    """The teacher's score of a prompt and the student's own answer to it."""
    most = teacher.info.limits.sequence_tokens
    ids = np.concatenate([rollout.prompt_ids, rollout.completion_ids])[:most]
    scores = teacher.client.score([Tokens(ids, 1)], ScoreSpec(min(TOP_K, teacher.info.limits.top_k)))[0]
    assert scores.token_logprobs is not None
    page.line("  the student's prompt and non-thinking answer, as the teacher reads them:")
    for line in str(tokenizer.decode(ids)).splitlines():
        page.line(f"    {line}")
    own = scores.token_logprobs[len(rollout.prompt_ids) - 1 :]
    parts = f"{scores.token_logprobs.mean():.3f} nats a token"
    if len(own):
        parts += f", {own.mean():.3f} over the answer's {len(own)}"
    page.line(f"  {scores.positions} tokens scored, {parts}; the most surprising with what was likelier:")
    for line in score_lines(tokenizer, ids, scores):
        page.line(line)


def score_lines(tokenizer: Any, ids: Ids, scores: Scores) -> Iterator[str]:
    """Each of the last SHOWN_TOKENS scored tokens with its log-probability; the least likely ones with alternatives."""
    values, first = scores.token_logprobs, max(0, scores.positions - SHOWN_TOKENS)
    assert values is not None
    if first:
        yield f"    ... {first} tokens before"
    worst = {first + int(i) for i in np.argsort(values[first:])[:SHOWN_ALTERNATIVES]}
    for row in range(first, scores.positions):
        token = repr(str(tokenizer.decode([int(ids[row + 1])])))
        beside = ""
        if row in worst and scores.top_token_ids is not None and scores.top_logprobs is not None:
            top = zip(scores.top_token_ids[row], scores.top_logprobs[row], strict=True)
            beside = "   " + "  ".join(f"{str(tokenizer.decode([int(i)]))!r} {float(v):.2f}" for i, v in top)
        yield f"    {row + 1:5}  {token:18} {float(values[row]):8.3f}{beside}".rstrip()


def _flat(text: str) -> str:
    return " ".join(text.split())[:300]


def _lengths(config: Config, student: Student, teachers: Teachers) -> Iterator[str]:
    text = student.model.config.get_text_config()
    warning = too_long(config, getattr(text, "max_position_embeddings", None))
    if warning:
        yield warning
    for name, options in (
        ("non_policy_distillation", config.non_policy_distillation),
        ("policy_distillation", config.policy_distillation),
    ):
        if options.max_new_tokens >= config.data.max_length:
            yield (
                f"{name}.max_new_tokens = {options.max_new_tokens} leaves no room for a prompt in data.max_length = "
                f"{config.data.max_length} tokens; answers will be cut"
            )
    least = min(t.info.limits.sequence_tokens for t in teachers.all)
    if least < config.data.max_length:
        yield f"a teacher takes {least} tokens in a sequence, data.max_length is {config.data.max_length}"


def too_long(config: Config, positions: int | None) -> str | None:
    """What is wrong where sequences may be longer than the student's positions, or None."""
    length = config.data.max_length
    if not positions or length <= positions:
        return None
    return (
        f"data.max_length is {length}, the student has {positions} positions (max_position_embeddings): beyond them "
        f"its text falls apart; set data.max_length={positions} or less, or give the student a rope_scaling"
    )


def _memory(config: Config, source: str | Path, page: Page) -> Iterator[str]:
    """Shows the estimate of each stage's memory; gives what it lacks."""
    try:
        shape = shape_of(str(source))
    except UserError as error:
        page.line(f"  memory was not estimated: {error}")
        return
    cuda = torch.cuda.is_available()
    room = torch.cuda.get_device_properties(0).total_memory if cuda else _machine_bytes()
    where = "a GPU" if cuda else "this machine"
    for stage, title in STAGE_NAMES.items():
        needed = student_memory(shape, setup_of(config, stage, distributed.world())).peak
        name = title.partition(",")[0]
        page.line(f"  {name} takes about {needed / GIB:.2f} GiB of {where}'s {room / GIB:.1f} GiB")
        if needed > 0.92 * room:
            yield (
                f"{name} needs {needed / GIB:.1f} GiB by the estimate, {where} has {room / GIB:.1f}; "
                "`python -m student_trainer memory` shows what takes it and what to change"
            )


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
