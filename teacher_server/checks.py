"""What a teacher refuses before any work: pure functions of a request and the teacher's description.

Each raises the error tree's class with the numbers and, for one sequence or prompt, its index. Legend: N tokens,
T scored positions, C candidates.
"""

from __future__ import annotations

import numpy as np

from protos.errors import InvalidRequest, InvalidSequence, InvalidSpec, TeacherMismatch, TooLarge, Unsupported
from protos.scores import Field, GenerateRequest, Ids, Mode, Prompt, ScoreRequest, Sequence, TeacherInfo


def check_score(request: ScoreRequest, info: TeacherInfo) -> None:
    """Checks a whole Score call: fingerprint, limits, every id, candidates, wanted fields."""
    check_fingerprint(request.fingerprint, info)
    limits, spec = info.limits, request.spec
    if not request.sequences:
        raise InvalidRequest("the call has no sequences; send at least one")
    check_sequences(len(request.sequences), info)
    if request.tokens > limits.request_tokens:
        raise TooLarge(
            f"the call has {request.tokens} tokens in all, this teacher accepts {limits.request_tokens}; split it"
        )
    if spec.top_k > limits.top_k:
        raise TooLarge(f"top_k is {spec.top_k}, this teacher accepts {limits.top_k}")
    if len(spec.temperatures) > limits.temperatures:
        raise TooLarge(
            f"the call names {len(spec.temperatures)} temperatures, this teacher accepts {limits.temperatures}"
        )
    for index, sequence in enumerate(request.sequences):
        _check_sequence(index, sequence, request, info)


def check_sequences(count: int, info: TeacherInfo) -> None:
    """Checks the number of sequences of a Score call."""
    if count > info.limits.sequences:
        raise TooLarge(f"the call has {count} sequences, this teacher accepts {info.limits.sequences}; split it")


def _check_sequence(index: int, sequence: Sequence, request: ScoreRequest, info: TeacherInfo) -> None:
    n, limits = len(sequence.token_ids), info.limits
    if n > limits.sequence_tokens:
        raise TooLarge(f"sequence {index} has {n} tokens, this teacher accepts {limits.sequence_tokens}", index=index)
    if sequence.candidates > limits.candidates:
        raise TooLarge(
            f"sequence {index} names {sequence.candidates} candidates at each position, this teacher accepts "
            f"{limits.candidates}",
            index=index,
        )
    fields = request.spec.fields(sequence.candidates)
    missing = fields - info.fields
    if missing:
        raise Unsupported(
            f"this teacher cannot give {_names(missing)}; it gives {_names(info.fields)}: name what you want",
            index=index,
        )
    if Field.CANDIDATE_LOGPROBS in fields and sequence.candidate_ids is None:
        raise InvalidSequence(f"candidate_logprobs is wanted but sequence {index} names no candidates", index=index)
    check_ids(sequence.token_ids, info.vocab_size, f"sequence {index}", index)
    if sequence.candidate_ids is not None:
        _check_candidates(index, sequence.candidate_ids, sequence.score_start, info.vocab_size)


def _check_candidates(index: int, candidates: Ids, start: int, vocab_size: int) -> None:
    """int32[T,C]: each in the vocabulary, distinct within its row."""
    wrong = _outside(candidates, vocab_size)
    if wrong is not None:
        row, column = divmod(wrong, candidates.shape[1])
        raise InvalidSequence(
            f"sequence {index}, position {start + row}: candidate {column} is {candidates[row, column]}, ids of this "
            f"teacher are from 0 to {vocab_size - 1}",
            index=index,
        )
    ordered = np.sort(candidates, axis=1)
    doubled = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if doubled.any():
        row = int(doubled.argmax())
        pair = ordered[row, 1:][ordered[row, 1:] == ordered[row, :-1]]
        raise InvalidSequence(
            f"sequence {index}, position {start + row}: candidate {pair[0]} is named more than once; candidates of a "
            "position must be distinct",
            index=index,
        )


def check_completions(prompts: int, n: int, info: TeacherInfo) -> None:
    """Checks the number of completions of a Generate call."""
    if prompts * n > info.limits.sequences:
        raise TooLarge(
            f"the call has {prompts} prompts times {n} samples = {prompts * n} completions, this teacher accepts "
            f"{info.limits.sequences}; split it"
        )


MAX_STOPS = 1024
"""Ids of stop_token_ids."""


def check_generate(request: GenerateRequest, info: TeacherInfo) -> None:
    """Checks what a Generate call says before its prompts are rendered; `check_prompt` does the rest."""
    check_fingerprint(request.fingerprint, info)
    if not info.can_generate:
        raise Unsupported(f"this teacher ({info.engine}) does not generate; it scores")
    if not request.prompts:
        raise InvalidRequest("the call has no prompts; send at least one")
    check_completions(len(request.prompts), request.n, info)
    if request.alternatives > info.limits.top_k:
        raise TooLarge(f"the call asks for {request.alternatives} alternatives, this teacher gives {info.limits.top_k}")
    if len(request.sampling.stop_token_ids) > MAX_STOPS:
        raise TooLarge(f"stop_token_ids has {len(request.sampling.stop_token_ids)} ids, this teacher takes {MAX_STOPS}")
    for stop in request.sampling.stop_token_ids:
        if not 0 <= stop < info.vocab_size:
            raise InvalidSpec(f"stop_token_ids names {stop}, ids of this teacher are from 0 to {info.vocab_size - 1}")
    for index, prompt in enumerate(request.prompts):
        resolve_mode(prompt, info, index)


def resolve_mode(prompt: Prompt, info: TeacherInfo, index: int) -> Mode | None:
    """The prompt's mode: as given, else thinking where the teacher knows modes; Unsupported for one it lacks."""
    if prompt.mode is None:
        return Mode.THINKING if Mode.THINKING in info.modes else None
    if prompt.mode not in info.modes:
        known = ", ".join(mode.value for mode in info.modes) or "none: leave the mode out"
        raise Unsupported(
            f"prompt {index} asks for the mode {prompt.mode.value}, this teacher's modes are {known}", index=index
        )
    return prompt.mode


TEXT_FACTOR = 32
"""Characters of text for each token of the longest sequence; tokenizers give a token for 3 or 4."""
TURN = 16
"""Characters that a template puts around a turn, or more."""


def check_text(index: int, prompt: Prompt, info: TeacherInfo) -> int:
    """The characters of a prompt's or sequence's text, a turn of a conversation counting TURN of them at least.

    TooLarge for more than could ever be few enough tokens: tokenizing text that is refused afterwards is time lost.
    """
    characters = len(prompt.text) + sum(len(message.content) + TURN for message in prompt.messages)
    most = TEXT_FACTOR * info.limits.sequence_tokens
    if characters > most:
        raise TooLarge(
            f"prompt {index} has {characters} characters of text, this teacher reads {most} and accepts "
            f"{info.limits.sequence_tokens} tokens",
            index=index,
        )
    return characters


def check_prompt(index: int, prompt_ids: Ids, max_tokens: int, info: TeacherInfo) -> None:
    """Checks the int32[P] of one prompt: its ids, and its length together with the completion's."""
    if len(prompt_ids) == 0:
        raise InvalidSequence(f"prompt {index} has no tokens", index=index)
    check_ids(prompt_ids, info.vocab_size, f"prompt {index}", index)
    total = len(prompt_ids) + max_tokens
    if total > info.limits.sequence_tokens:
        raise TooLarge(
            f"prompt {index} has {len(prompt_ids)} tokens and max_tokens is {max_tokens}, together {total}; this "
            f"teacher accepts {info.limits.sequence_tokens}",
            index=index,
        )


def check_request_tokens(tokens: int, info: TeacherInfo) -> None:
    """Checks the number of tokens in all prompts of a call."""
    if tokens > info.limits.request_tokens:
        raise TooLarge(
            f"the call's prompts have {tokens} tokens in all, this teacher accepts {info.limits.request_tokens}; "
            "split it"
        )


def check_head(fingerprint: str, info: TeacherInfo) -> None:
    """Checks a GetHead call: fingerprint, and whether the head is worth anything to a client."""
    check_fingerprint(fingerprint, info)
    if Field.HIDDEN_STATES not in info.fields:
        raise Unsupported(
            f"this teacher ({info.engine}) does not give hidden states, so its LM head is not given either; it gives "
            f"{_names(info.fields)}"
        )


def check_fingerprint(expected: str, info: TeacherInfo) -> None:
    """TeacherMismatch where the client expects another teacher; an empty fingerprint expects any."""
    if expected and expected != info.fingerprint:
        raise TeacherMismatch(
            f"the call expects the teacher with fingerprint {expected}, this one is {info.name} with fingerprint "
            f"{info.fingerprint}; ask GetTeacher again and check that it is the one that you mean"
        )


def check_ids(ids: Ids, vocab_size: int, what: str, index: int) -> None:
    """InvalidSequence for the first id of int32[N] outside [0, vocab_size)."""
    wrong = _outside(ids, vocab_size)
    if wrong is not None:
        raise InvalidSequence(
            f"{what}, position {wrong}: token id {ids[wrong]}, ids of this teacher are from 0 to {vocab_size - 1}",
            index=index,
        )


def _outside(ids: Ids, vocab_size: int) -> int | None:
    """Flat position of the first id outside [0, vocab_size); None where all lie inside."""
    if ids.size == 0 or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        return None
    return int(((ids < 0) | (ids >= vocab_size)).argmax())


def _names(fields: frozenset[Field]) -> str:
    return ", ".join(sorted(field.value for field in fields)) or "nothing"
