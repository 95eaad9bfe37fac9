"""What the teacher said about N flattened positions, as tensors on the student's device.

Knows no server, no model and no loss. Legend: N positions, K ids of the support (the teacher's top K, or candidates
that the student named), V logits of one position. Log-probabilities are nats; T is the loss's temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

TAIL_FLOOR = -100.0
"""Log-mass in nats at or below which a tail counts as empty; the contract's floor."""

CANDIDATE_TAIL_RESOLUTION = 2.0**-18
"""Smallest tail mass that is believed where it must be derived from candidates, about 3.8e-6 (-12.5 nats)."""

MASS_TOLERANCE = 1e-3
"""How far the mass of support and tail together may be from 1 before the numbers are refused."""


class Buckets(NamedTuple):
    """A next-token distribution as K + 1 outcomes: float[N,K] log-probabilities of the support, float[N] log-mass
    outside it."""

    logprobs_NK: Tensor
    tail_logprob_N: Tensor


@dataclass(frozen=True, eq=False)
class TeacherTargets:
    """The teacher's score of N positions at one temperature.

    `ids_NK` int64[N,K], distinct in each row, in any order; `logprobs_NK` float32[N,K] at temperature 1;
    `log_normalizer_N` float32[N], C_T = log sum_v p(v)^(1/T), so that log q_T(i) = l_i / T - C_T exactly;
    `tail_logprob_N` float32[N], log of the mass outside the support at T, at least TAIL_FLOOR, which means none;
    `temperature` T, the one that the last two were computed at and the only one that a loss can use. `token_ids_N`
    int64[N] are the tokens that stand there and `token_logprobs_N` float32[N] what the teacher gave them at
    temperature 1; cross-entropy needs the first, estimators on the sampled token need both. K = 0 is allowed: no
    support, and a tail of log 1. Shapes, dtypes and devices are checked when it is made (ValueError); `check` looks
    at the numbers.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    log_normalizer_N: Tensor
    tail_logprob_N: Tensor
    temperature: float = 1.0
    token_ids_N: Tensor | None = None
    token_logprobs_N: Tensor | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")
        if self.ids_NK.ndim != 2:
            raise ValueError(f"ids_NK must have 2 dimensions, got shape {list(self.ids_NK.shape)}")
        for name, tensor in self._tensors().items():
            want = list(self.ids_NK.shape if name.endswith("_NK") else self.ids_NK.shape[:1])
            if list(tensor.shape) != want:
                raise ValueError(f"{name} must have shape {want} like ids_NK, got {list(tensor.shape)}")
            whole = name in ("ids_NK", "token_ids_N")
            if (tensor.dtype != torch.int64) if whole else (tensor.dtype not in (torch.float32, torch.float64)):
                raise ValueError(f"{name} must be {'int64' if whole else 'float32'}, got {tensor.dtype}")
            if tensor.device != self.ids_NK.device:
                raise ValueError(f"{name} is on {tensor.device}, ids_NK on {self.ids_NK.device}")

    def _tensors(self) -> dict[str, Tensor]:
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in pairs if isinstance(value, Tensor)}

    def _with(self, tensors: dict[str, Any]) -> TeacherTargets:
        return replace(self, **tensors)

    @staticmethod
    def from_candidates(
        ids_NK: Tensor,
        logprobs_NK: Tensor,
        log_normalizer_N: Tensor,
        *,
        vocab_size: int,
        temperature: float = 1.0,
        token_ids_N: Tensor | None = None,
        token_logprobs_N: Tensor | None = None,
    ) -> TeacherTargets:
        """Targets on a support that the teacher gave no tail for; shapes and dtypes as in the class.

        The tail is log(1 - M), M = sum_S exp(l / T - C_T), in float64 through expm1. The inputs are float32, and l
        comes from logits of magnitude 10 to 100, so M is known to about 1e-6 and a smaller tail is not known at all:
        it is raised to CANDIDATE_TAIL_RESOLUTION, which keeps a rounding error from becoming a penalty of 100 nats.
        With all `vocab_size` ids in the support the tail is empty by definition. ValueError where M is above 1 +
        MASS_TOLERANCE.
        """
        log_mass_N = (logprobs_NK.double() / temperature - log_normalizer_N.double()[:, None]).logsumexp(-1)
        if log_mass_N.numel() and float(log_mass_N.max()) > math.log1p(MASS_TOLERANCE):
            row, mass = int(log_mass_N.argmax()), math.exp(float(log_mass_N.max()))
            raise ValueError(
                f"row {row}: candidates have a mass of {mass:.6g} at temperature {temperature}, more than 1; "
                "ids are repeated, or log_normalizer is of another temperature"
            )
        if ids_NK.shape[1] >= vocab_size:
            tail_N = torch.full_like(log_mass_N, TAIL_FLOOR)
        else:
            tail_N = (-torch.expm1(log_mass_N)).clamp(min=CANDIDATE_TAIL_RESOLUTION).log()
        return TeacherTargets(
            ids_NK,
            logprobs_NK,
            log_normalizer_N,
            tail_N.to(logprobs_NK.dtype),
            temperature,
            token_ids_N,
            token_logprobs_N,
        )

    def __len__(self) -> int:
        return int(self.ids_NK.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.ids_NK.device

    def rows(self, first: int, last: int) -> TeacherTargets:
        """Positions first..last-1, without copying."""
        return self._with({name: tensor[first:last] for name, tensor in self._tensors().items()})

    def to(self, device: torch.device | str) -> TeacherTargets:
        """The same on another device."""
        return self._with({name: t.to(device, non_blocking=True) for name, t in self._tensors().items()})

    def buckets(self) -> Buckets:
        """The teacher's K + 1 outcomes at the temperature: l / T - C_T and the tail, at least TAIL_FLOOR."""
        logprobs_NK = self.logprobs_NK / self.temperature - self.log_normalizer_N[:, None]
        return Buckets(logprobs_NK, self.tail_logprob_N.clamp(min=TAIL_FLOOR))

    def token_logprobs_at_temperature(self) -> Tensor:
        """float[N]: l / T - C_T of the tokens that stand there; ValueError where `token_logprobs_N` is None."""
        if self.token_logprobs_N is None:
            raise ValueError("token_logprobs_N is needed by a loss on sampled tokens, and these targets have none")
        return self.token_logprobs_N / self.temperature - self.log_normalizer_N

    def check(self, vocab_size: int) -> None:
        """ValueError, with row and numbers, for what would train silently on the wrong thing.

        Ids outside 0..vocab_size-1, an id twice in a row, non-finite numbers, and a mass of support and tail that is
        not 1 within MASS_TOLERANCE (a C_T or a tail of another temperature). Waits once for the device; on the CPU it
        is cheapest, before `to`.
        """
        if not len(self):
            return
        ids_NK = self.ids_NK if self.token_ids_N is None else torch.cat([self.ids_NK, self.token_ids_N[:, None]], 1)
        sorted_NK = self.ids_NK.sort(-1).values
        buckets = self.buckets()
        mass_N = buckets.logprobs_NK.exp().sum(-1) + buckets.tail_logprob_N.exp()
        floats = [t for t in self._tensors().values() if t.is_floating_point()]
        finite_N = torch.stack([t.reshape(len(self), -1).isfinite().all(-1) for t in floats]).all(0)
        refused = {
            "a number that is not finite": ~finite_N,
            f"an id outside the vocabulary of {vocab_size}": ((ids_NK < 0) | (ids_NK >= vocab_size)).any(-1),
            "an id twice in its support": (sorted_NK[:, 1:] == sorted_NK[:, :-1]).any(-1),
            f"a mass of support and tail at temperature {self.temperature} that is not 1 (are log_normalizer and "
            "tail_logprob of that temperature and this support?)": (mass_N - 1).abs() > MASS_TOLERANCE,
        }
        if not bool(torch.stack(list(refused.values())).any()):
            return
        what, rows_N = next((what, rows_N) for what, rows_N in refused.items() if bool(rows_N.any()))
        row = int(rows_N.nonzero()[0, 0])
        raise ValueError(
            f"{int(rows_N.sum())} of {len(self)} rows have {what}; row {row}: ids {ids_NK[row].tolist()[:8]}, "
            f"log-probabilities {self.logprobs_NK[row].tolist()[:8]}, mass {float(mass_N[row]):.6g}"
        )
