"""A teacher server whose theoretical engine scores so many tokens a second.

    python -m benchmarks.under_load.server TOKENS_PER_SECOND [arguments of python -m teacher_server]

All but the engine is the real server. The engine waits instead of computing, as one does whose work is on a GPU.
Knows no client.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from protos.scores import Scores, ScoreSpec, Sequence
from teacher_server.backends.theoretical_backend import Behaviour, TheoreticalBackend
from teacher_server.backends.theory import Ring
from teacher_server.run import run
from teacher_server.settings import load


class Table(Ring):
    """The ring with its rows looked up: what follows a token depends on that token alone."""

    def __init__(self, ring: Ring) -> None:
        super().__init__(ring.vocab_size, ring.kappa)
        self._every = np.arange(self.vocab_size, dtype=np.int32)
        self._l_VV = self.logprobs(self._every).astype(np.float32)
        self._rows: dict[ScoreSpec, dict[str, npt.NDArray[Any]]] = {}

    def score(self, sequence: Sequence, spec: ScoreSpec) -> Scores:
        """The same numbers as the ring's, for sequences without candidates."""
        if spec not in self._rows:
            self._rows[spec] = dict(super().score(Sequence(np.append(self._every, np.int32(0))), spec).arrays())
        ids = sequence.token_ids[sequence.score_start - 1 :]
        found = {name: rows[ids[:-1]] for name, rows in self._rows[spec].items()}
        if "token_logprobs" in found:
            found["token_logprobs"] = self._l_VV[ids[:-1], ids[1:]]
        return Scores(**found)


def main(rate: float, arguments: list[str]) -> int:
    """The server's exit code."""
    config, *_ = load(arguments, {})
    options = config.backend_options()

    def make() -> TheoreticalBackend:
        backend = TheoreticalBackend(options, Behaviour(tokens_per_second=rate))
        backend.ring = Table(backend.ring)
        return backend

    return run(config, make)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
