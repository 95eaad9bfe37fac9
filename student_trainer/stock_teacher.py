"""A stock vLLM or SGLang server as teacher: what the student's files say of its model, and what a run may ask of it.

Such a server scores the top k at temperature 1. Whatever needs more is refused here, before anything is computed, with
the settings that would do. Knows the configuration and the student's description, and calls nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jinja2.exceptions import TemplateError

from protos.scores import Message, Mode, TeacherInfo
from protos.tokenizer_hash import hash_of_template, hash_of_tokenizer

from .config import Config
from .errors import UserError
from .models import Description
from .modes import render
from .teacher_client import StockModel

OURS = "or use a strong2weak teacher (python -m teacher_server), with teacher.kind left out"


def stock_model(student: Description, served: str | None, normalized_size: int | None) -> StockModel:
    """The teacher's model as the student's files have it; `served` is its name at the server, None the only one's."""
    tokenizer = student.tokenizer

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(ids: Sequence[int], plain: bool) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=plain))

    return StockModel(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        logits_width=student.logits_width,
        eos_token_ids=student.eos_ids,
        tokenizer_hash=hash_of_tokenizer(tokenizer),
        template_hash=hash_of_template(tokenizer),
        modes=_modes(tokenizer),
        encode=encode,
        decode=decode,
        served=served or "",
        normalized_size=normalized_size,
    )


def _modes(tokenizer: object) -> tuple[Mode, ...]:
    """Both modes where the template reacts to `enable_thinking`, else none, as a teacher of ours says it."""
    try:
        thinking, other = (render(tokenizer, [Message("user", "1+1")], mode) for mode in Mode)
    except (TemplateError, ValueError, TypeError, KeyError):
        return ()
    return () if thinking.tolist() == other.tolist() else tuple(Mode)


def check_config(config: Config, stage: str, key: str) -> None:
    """Refuses settings that no stock server can serve; UserError with one line for each, named by `key`'s teacher."""
    lines = list(_refusals(config, stage))
    if lines:
        where = f"{key} is a stock server (teacher.kind openai)"
        raise UserError("\n".join(f"{where}: {line}, {OURS}" for line in lines))


def _refusals(config: Config, stage: str) -> Iterator[str]:
    off, on = config.non_policy_distillation, config.policy_distillation
    for section, temperature in (("non_policy", off.temperature), ("policy", on.temperature)):
        if temperature != 1:
            yield (
                f"{section}_distillation.temperature is {temperature:g}, and of a top k at temperature 1 neither the "
                f"normaliser nor the tail at {temperature:g} can be made (every evaluation needs both stages'); set "
                f"{section}_distillation.temperature=1.0"
            )
    if stage != "policy" and off.distribution == "full":
        yield "non_policy_distillation.distribution is full, and it gives no hidden states; set it to top_k"
    if stage != "non_policy" and on.distribution == "full":
        yield "policy_distillation.distribution is full, and it gives no hidden states; set it to top_k"
    if stage != "non_policy" and on.support == "student" and on.loss != "policy_gradient":
        yield (
            "policy_distillation.support is student, and it cannot be asked about the student's own "
            f"{on.top_k} tokens at each position; set policy_distillation.support=teacher"
        )


def check_limits(info: TeacherInfo, config: Config, key: str) -> None:
    """Refuses what this server's own limits do not allow; UserError with the option of the engine that raises them."""
    limits, length = info.limits, config.data.max_length
    where = f"{key} ({info.name})"
    if length > limits.sequence_tokens:
        raise UserError(
            f"it scores sequences of at most {limits.sequence_tokens} tokens (one less than its context), "
            f"data.max_length is {length}",
            where,
            f"set data.max_length={limits.sequence_tokens}, or start it with vLLM's --max-model-len or SGLang's "
            f"--context-length {length + 1}",
        )
    first, second = config.non_policy_distillation, config.policy_distillation
    for name, top_k in (("non_policy_distillation", first.top_k), ("policy_distillation", second.top_k)):
        if min(top_k, info.normalized_size) > limits.top_k:
            raise UserError(
                f"it gives {limits.top_k} alternatives at a position, {name}.top_k is {top_k}",
                where,
                f"set {name}.top_k={limits.top_k} or less, or start vLLM with --max-logprobs {top_k}",
            )
