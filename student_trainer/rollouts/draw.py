"""Draws one token for each row from softmax(logits / temperature), by one uniform number a row.

It knows logits and numbers, no model. The draw inverts the distribution function in float64, so that a row's token
depends on its own logits and number alone and rare tokens keep their probability. Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BYTES = 2**28


def draw(logits_BV: Tensor, uniform_B: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids int64[B] and their log-probabilities float32[B] in nats at the temperature.

    `uniform_B` float64[B] in [0, 1) is None at temperature 0, which takes the most likely token; log-probabilities are
    then those at temperature 1. A row of `logits_BV` with a NaN gives a log-probability of NaN.
    """
    step = max(1, _BYTES // (8 * logits_BV.shape[1]))
    parts = [
        _draw(logits_BV[i : i + step], None if uniform_B is None else uniform_B[i : i + step], temperature)
        for i in range(0, len(logits_BV), step)
    ]
    ids, logprobs = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(logprobs)


def _draw(logits_BV: Tensor, uniform_B: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    logits_BV = logits_BV.float()
    if uniform_B is None:
        ids_B1 = logits_BV.argmax(-1, keepdim=True)
    else:
        logits_BV = logits_BV / temperature
        cdf_BV = torch.softmax(logits_BV, -1).cumsum(-1, dtype=torch.float64)
        total_B1 = cdf_BV[:, -1:]
        target_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1 * (1 - 1e-15))
        ids_B1 = torch.searchsorted(cdf_BV, target_B1, right=True).clamp(max=logits_BV.shape[1] - 1)
    return ids_B1[:, 0], (logits_BV.gather(1, ids_B1) - logits_BV.logsumexp(-1, keepdim=True))[:, 0]
