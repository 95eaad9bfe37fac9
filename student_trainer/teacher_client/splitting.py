"""How a call of any size becomes calls that a teacher accepts: pure functions of sizes and limits.

Legend: N tokens of a sequence, P tokens of a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from protos import errors
from protos.head import itemsize
from protos.scores import Field, Limits, Prompt, Sampling, ScoreSpec, TeacherInfo
from protos.scores import Sequence as TokenSequence

PROMPT_BYTES = 1 << 20
"""Bytes of prompts in one Generate call, which is one message: far below gRPC's default of 4 MiB."""
HIDDEN_BYTES = 256 << 20
"""Bytes of hidden states in the answer of one Score call; a longer sequence gets a call of its own."""
COMPLETIONS = 64
"""Completions of one Generate call, so that progress shows and a retry repeats little."""
TEMPLATE_TOKENS = 32
"""Allowance for what a chat template adds to one turn."""


def hidden_tokens(info: TeacherInfo, spec: ScoreSpec) -> int | None:
    """Tokens of one call that asks for hidden states, so that they stay within HIDDEN_BYTES; None where it does not."""
    if Field.HIDDEN_STATES not in spec.want or not info.hidden_size:
        return None
    return max(1, HIDDEN_BYTES // (info.hidden_size * itemsize(info.hidden_dtype)))


def score_pieces(
    sequences: Sequence[TokenSequence], limits: Limits, replicas: int = 1, most: int | None = None
) -> list[range]:
    """Ranges of sequences, one for each call, within `request_tokens`, `sequences` and `most` tokens; in order, none
    empty.

    With several replicas a call that would fit as one is cut into about as many, so that all of them work. A sequence
    over a limit gets a call of its own, for the teacher to refuse.
    """
    sizes = [len(s.token_ids) for s in sequences]
    tokens = limits.request_tokens or sum(sizes)
    share = -(-sum(sizes) // max(1, replicas))
    tokens = min(tokens, share + max(sizes, default=0), tokens if most is None else most)
    return _ranges(sizes, tokens, limits.sequences or len(sizes))


def prompt_pieces(prompts: Sequence[Prompt], n: int, limits: Limits) -> list[range]:
    """Ranges of prompts, one for each call, so that prompts times `n` stay within `sequences` and COMPLETIONS."""
    count = max(1, min(limits.sequences or COMPLETIONS, COMPLETIONS) // n)
    return _ranges(
        [prompt_size(p) for p in prompts], min(limits.request_tokens or PROMPT_BYTES, PROMPT_BYTES // 4), count
    )


def sample_pieces(n: int, limits: Limits) -> list[int]:
    """How many samples of a prompt each call asks for: `n`, or parts of it where one call may not have so many."""
    most = limits.sequences or n
    return [min(most, n - first) for first in range(0, n, most)]


def prompt_size(prompt: Prompt) -> int:
    """An upper bound of P: no token is shorter than one byte, and a template adds a few to each turn."""
    if prompt.token_ids is not None:
        return len(prompt.token_ids)
    return len(prompt.text.encode()) + sum(len(m.content.encode()) + TEMPLATE_TOKENS for m in prompt.messages)


def reseeded(sampling: Sampling, first_sample: int) -> Sampling:
    """`sampling` for the part of a prompt's samples that begins with `first_sample`.

    A teacher draws from seed and sample index, which starts at 0 in each call: another seed keeps the parts different.
    """
    if sampling.seed is None or first_sample == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + first_sample * 0x9E3779B97F4A7C15) % 2**63)


def renumbered(error: errors.TeacherError, indexes: Sequence[int]) -> errors.TeacherError:
    """The error of a piece with the index that its sequence or prompt has in the caller's list."""
    local = error.index
    if local is None or not 0 <= local < len(indexes) or indexes[local] == local:
        return error
    message = re.sub(rf"\b(sequence|prompt) {local}\b", rf"\g<1> {indexes[local]}", error.message)
    return error.reworded(message, index=indexes[local])


def _ranges(sizes: Iterable[int], most: int, count: int) -> list[range]:
    pieces, first, total, end = [], 0, 0, 0
    for end, size in enumerate(sizes):
        if end > first and (total + size > most or end - first >= count):
            pieces.append(range(first, end))
            first, total = end, 0
        total += size
    return [*pieces, range(first, end + 1)] if total or pieces else []
