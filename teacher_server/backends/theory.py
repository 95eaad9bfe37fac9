"""A Markov chain over tokens whose every probability is known in closed form; numpy alone.

The logit of token v after token a is kappa * cos(2 pi (v - 7 a + 1/4) / V), a von Mises density on a ring of V tokens:
no two logits are equal (the quarter breaks the symmetry), and the sum over v of exp(kappa/T cos(...)) is V I0(kappa/T)
for every a, to rounding, because equally spaced points integrate a periodic analytic function exactly. Legend: T rows,
V vocabulary, M temperatures, K alternatives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from protos.scores import TAIL_FLOOR, Field, Floats, Ids, Scores, ScoreSpec, Sequence

Array = npt.NDArray[np.float64]


class Ring:
    """The chain over `vocab_size` tokens; a larger `kappa` makes it more certain."""

    def __init__(self, vocab_size: int, kappa: float = 3.0) -> None:
        self.vocab_size = vocab_size
        self.kappa = kappa

    def logprobs(self, last: Ids) -> Array:
        """float64[T,V]: log-probabilities of what follows each of int32[T]."""
        steps = np.arange(self.vocab_size)[None] - 7 * last.astype(np.int64)[:, None] + 0.25
        return np.asarray(self.kappa * np.cos(2 * np.pi * steps / self.vocab_size) - self.log_sum(1.0))

    def head(self) -> Floats:
        """float32[V,2]: the columns cos and sin of 2 pi v / V, because cos(a - b) = cos a cos b + sin a sin b."""
        return self._circle(np.arange(self.vocab_size)).astype(np.float32)

    def states(self, last: Ids) -> Floats:
        """float32[T,2] after each of int32[T]: head @ state are the logits, up to float32's rounding."""
        return (self.kappa * self._circle(7 * last.astype(np.int64) - 0.25)).astype(np.float32)

    def _circle(self, steps: npt.NDArray[Any]) -> Array:
        angles = 2 * np.pi * steps / self.vocab_size
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def log_sum(self, temperature: float) -> float:
        """log of the sum over v of exp(logit / temperature) = log(V I0(kappa / temperature))."""
        scaled = self.kappa / temperature
        # i0 overflows past 700; its asymptote is exact to rounding long before.
        log_i0 = float(np.log(np.i0(scaled))) if scaled < 600 else scaled - 0.5 * np.log(2 * np.pi * scaled)
        return float(np.log(self.vocab_size)) + log_i0

    def log_normalizer(self, temperature: float) -> float:
        """C_T = log of the sum over v of p(v)^(1/T)."""
        return self.log_sum(temperature) - self.log_sum(1.0) / temperature

    def score(self, sequence: Sequence, spec: ScoreSpec) -> Scores:
        """Every field that `spec` asks for, computed in float64."""
        ids, start = sequence.token_ids, sequence.score_start
        l_TV = self.logprobs(ids[start - 1 : -1])
        fields = spec.fields(sequence.candidates)
        out: dict[str, Any] = {}
        if Field.TOKEN_LOGPROBS in fields:
            out["token_logprobs"] = np.take_along_axis(l_TV, ids[start:, None], 1)[:, 0]
        if Field.HIDDEN_STATES in fields:
            out["hidden_states"] = self.states(ids[start - 1 : -1])
        if Field.CANDIDATE_LOGPROBS in fields and sequence.candidate_ids is not None:
            out["candidate_logprobs"] = np.take_along_axis(l_TV, sequence.candidate_ids, 1)
        order_TV = np.argsort(-l_TV, axis=1, kind="stable")
        if Field.TOP in fields:
            out["top_logprobs"] = np.take_along_axis(l_TV, order_TV[:, : spec.top_k], 1)
        if Field.LOG_NORMALIZER in fields:
            row = [self.log_normalizer(t) for t in spec.temperatures]
            out["log_normalizer"] = np.tile(row, (len(l_TV), 1))
        if Field.TAIL_LOGPROB in fields:
            rest = np.take_along_axis(l_TV, order_TV[:, spec.top_k :], 1)
            tails = [_log_sum_exp(rest / t) - self.log_normalizer(t) for t in spec.temperatures]
            out["tail_logprob"] = np.maximum(np.stack(tails, axis=1), TAIL_FLOOR)
        arrays: dict[str, Any] = {name: array.astype(np.float32) for name, array in out.items()}
        if Field.TOP in fields:
            arrays["top_token_ids"] = order_TV[:, : spec.top_k].astype(np.int32)
        return Scores(**arrays)


def _log_sum_exp(x: Array) -> Array:
    if x.shape[1] == 0:
        return np.full(len(x), -np.inf)
    top = x.max(axis=1)
    return np.asarray(top + np.log(np.exp(x - top[:, None]).sum(axis=1)))
