"""Whether this teacher can teach this student as configured: compared before anything is computed.

Two models with different tokenizers train silently on the wrong tokens, so every difference is refused, naming both
values and what to do. It knows the teacher's description and the student's tokenizer, and calls nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from protos.scores import Field, Mode, TeacherInfo
from protos.tokenizer_hash import hash_of_template, hash_of_tokenizer
from student_trainer.config import Config
from student_trainer.errors import UserError


@dataclass(frozen=True)
class Use:
    """What a run uses a teacher for: the route that names it ("" where it is the only one), the fingerprint that it
    must have with the setting that says so, and the modes of the examples that it teaches.
    """

    route: str = ""
    key: str = "teacher.fingerprint"
    fingerprint: str | None = None
    modes: frozenset[Mode] = frozenset(Mode)


def check(
    info: TeacherInfo,
    tokenizer: Any,
    logits_width: int,
    config: Config,
    *,
    eos_ids: Sequence[int] | None = None,
    stage: str = "all",
    use: Use = Use(),
) -> None:
    """Raises UserError for the first thing that does not fit; returns where all does.

    `tokenizer` is the student's (transformers), `logits_width` the number of logits that the student gives at a
    position, `eos_ids` the ids that end its completions (None takes the tokenizer's). `stage` is all, non_policy,
    policy or test; the first and last check what either stage needs. Modes, and what a stage needs, are checked as far
    as `use` has the teacher for them.
    """
    where = f"teacher {info.name} at {use.route}" if use.route else f"teacher {info.name}"
    _check_fingerprint(info, use, where)
    _check_tokenizer(info, tokenizer, logits_width, bool(use.route), where)
    _check_end(info, tokenizer, eos_ids, where)
    stage = _narrowed(config, stage, use.modes)
    _check_limits(info, config, stage, where)
    _check_abilities(info, config, stage, use.modes, where)


def _narrowed(config: Config, stage: str, modes: frozenset[Mode]) -> str:
    """The stage whose needs a teacher of `modes` has to meet: one alone where it has no example of the other."""
    if stage in ("non_policy", "policy"):
        return stage
    given = config.non_policy_distillation.dataset_path is not None  # its responses may be of any mode
    off, on = given or bool(needed_modes(config, "non_policy") & modes), bool(needed_modes(config, "policy") & modes)
    return stage if off == on else "non_policy" if off else "policy"


def _check_fingerprint(info: TeacherInfo, use: Use, where: str) -> None:
    if use.fingerprint is not None and use.fingerprint != info.fingerprint:
        raise UserError(
            f"its fingerprint is {info.fingerprint}, the configuration expects {use.fingerprint}",
            where,
            f"start that teacher, or change {use.key}",
        )


def _check_tokenizer(info: TeacherInfo, tokenizer: Any, logits_width: int, several: bool, where: str) -> None:
    size = max(tokenizer.get_vocab().values()) + 1
    same = "use a student of the teacher's family, with the same tokenizer files"
    if info.vocab_size != size:
        what = f"its vocabulary has {info.vocab_size} tokens, the student's {size}"
        raise UserError(what, where, same)
    own = hash_of_tokenizer(tokenizer)
    if info.tokenizer_hash != own:
        what = f"its tokenizer has the hash {info.tokenizer_hash}, the student's {own}: ids mean different tokens"
        raise UserError(what, where, same)
    template = hash_of_template(tokenizer)
    if info.template_hash != template:
        names = [text or "none" for text in (info.template_hash, template)]
        raise UserError(
            f"its chat template has the hash {names[0]}, the student's {names[1]}: prompts would differ",
            where,
            "copy the student's chat_template.jinja into this teacher's folder, and start it anew"
            if several
            else "copy the teacher's chat_template.jinja into the student's folder",
        )
    if info.normalized_size > logits_width:
        raise UserError(
            f"it normalises over {info.normalized_size} logits, the student has {logits_width}",
            where,
            "use a teacher backend that masks its padded vocabulary, or pad the student's embeddings",
        )
    if info.normalized_size < size:
        raise UserError(
            f"it normalises over {info.normalized_size} logits, fewer than the student's {size} tokens", where, same
        )


def _check_end(info: TeacherInfo, tokenizer: Any, eos_ids: Sequence[int] | None, where: str) -> None:
    own = sorted(set([tokenizer.eos_token_id] if eos_ids is None else eos_ids) - {None})
    if not own:
        raise UserError("no id ends the student's completions", "student", "set eos_token_id in generation_config.json")
    other = [i for i in own if i not in info.eos_token_ids]
    if other:
        raise UserError(
            f"its completions end with the ids {sorted(info.eos_token_ids)}, the student's with {own}",
            where,
            "give both models the same eos_token_id in generation_config.json",
        )


def _check_limits(info: TeacherInfo, config: Config, stage: str, where: str) -> None:
    limits, length = info.limits, config.data.max_length
    if length > limits.sequence_tokens:
        raise UserError(
            f"it takes {limits.sequence_tokens} tokens in a sequence, data.max_length is {length}",
            where,
            f"set data.max_length={limits.sequence_tokens} or less, or start it with --max-sequence-tokens {length}",
        )
    for key, top_k, most in _wanted_top_k(config, stage, limits.top_k, limits.candidates):
        if top_k > most:
            raise UserError(f"it accepts {most}, {key} is {top_k}", where, f"set {key}={most} or less")


def _wanted_top_k(config: Config, stage: str, top_k: int, candidates: int) -> Iterable[tuple[str, int, int]]:
    """(setting, its value, the teacher's limit) of every number of alternatives that the stages ask for."""
    off, on = config.non_policy_distillation, config.policy_distillation
    if stage != "policy" and off.alpha > 0 and off.distribution == "top_k":
        yield "non_policy_distillation.top_k", off.top_k, top_k
    if stage != "non_policy" and on.loss != "policy_gradient" and on.distribution == "top_k":
        yield "policy_distillation.top_k", on.top_k, candidates if on.support == "student" else top_k


def needed_fields(config: Config, stage: str) -> frozenset[Field]:
    """The fields of scores that the stages ask for."""
    off, on = config.non_policy_distillation, config.policy_distillation
    bucketed = {Field.TOP, Field.TAIL_LOGPROB, Field.LOG_NORMALIZER}
    needed: set[Field] = set()
    if config.wants_full(stage):
        needed |= {Field.HIDDEN_STATES}
    if stage != "policy" and off.alpha > 0 and off.distribution == "top_k":
        needed |= bucketed
    if stage != "non_policy" and on.distribution == "top_k":
        if on.loss == "policy_gradient":
            needed |= {Field.TOKEN_LOGPROBS, Field.LOG_NORMALIZER}
        elif on.support == "student":
            needed |= {Field.TOKEN_LOGPROBS, Field.CANDIDATE_LOGPROBS, Field.LOG_NORMALIZER}
        else:
            needed |= bucketed
    return frozenset(needed)


def needed_modes(config: Config, stage: str) -> frozenset[Mode]:
    """The modes in which the stages answer prompts."""
    off, on = config.non_policy_distillation, config.policy_distillation
    needed: set[Mode] = set()
    if stage != "policy" and off.dataset_path is None:
        if off.modes == "mixed":
            needed |= _drawn(off.thinking_prob)
        else:
            needed |= set(Mode) if off.modes == "both" else {Mode(off.modes)}
    if stage != "non_policy":
        needed |= _drawn(on.thinking_prob)
    return frozenset(needed)


def _drawn(thinking_prob: float) -> set[Mode]:
    return {m for m in Mode if (thinking_prob if m.thinking else 1 - thinking_prob) > 0}


def _check_abilities(info: TeacherInfo, config: Config, stage: str, used: frozenset[Mode], where: str) -> None:
    missing = needed_fields(config, stage) - info.fields
    if missing:
        raise UserError(
            f"it cannot give {_names(missing)}, only {_names(info.fields)}",
            where,
            "choose another loss, distribution top_k for hidden_states, or a teacher backend that gives these",
        )
    modes = needed_modes(config, stage) & used - set(info.modes)
    if modes:
        raise UserError(
            f"the run needs the mode {_names(modes)}, its chat template knows {_names(info.modes)}",
            where,
            "set non_policy_distillation.modes and policy_distillation.thinking_prob to what it knows",
        )
    if stage != "policy" and config.non_policy_distillation.dataset_path is None and not info.can_generate:
        raise UserError(
            f"it ({info.engine}) scores and does not generate, stage 1 needs responses",
            where,
            "name existing ones with non_policy_distillation.dataset_path, or use a teacher that generates",
        )


def _names(values: Iterable[Field | Mode]) -> str:
    return ", ".join(sorted(value.value for value in values)) or "none"
