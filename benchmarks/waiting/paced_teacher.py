"""A teacher server with the embedded pair's teacher that scores no faster than told.

    python -m benchmarks.waiting.paced_teacher TOKENS_PER_SECOND READY_FILE     (0: as fast as it goes)

Each sequence is computed as ever; its answer then waits for its turn, so that sequences leave one after the other at
that rate, whatever else the machine does. The score cache is off: every run pays for what it asks.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from protos.scores import Scores, ScoreSpec, Sequence
from teacher_server.backends.transformers_backend import TransformersBackend
from teacher_server.config import ServerConfig
from teacher_server.config_sections import CacheConfig
from teacher_server.run import run

ROOT = Path(__file__).resolve().parents[2]


class Pace:
    """When what takes `tokens` may leave, at a rate in tokens/s; one after the other."""

    def __init__(self, tokens_per_second: float) -> None:
        self.rate, self._free_at = tokens_per_second, 0.0

    def leave(self, now: float, tokens: int) -> float:
        """The time, from `now` on, at which this leaves; it came now, behind what came before."""
        if not self.rate:
            return now
        self._free_at = max(self._free_at, now) + tokens / self.rate
        return self._free_at


class PacedBackend(TransformersBackend):
    """See the module."""

    def __init__(self, config: ServerConfig, tokens_per_second: float) -> None:
        super().__init__(config.backend_options())
        self._pace = Pace(tokens_per_second)

    async def score(self, sequence: Sequence, spec: ScoreSpec) -> Scores:
        """As the engine does, no earlier than its turn."""
        clock = asyncio.get_running_loop().time
        due = self._pace.leave(clock(), len(sequence.token_ids))
        scores = await super().score(sequence, spec)
        await asyncio.sleep(due - clock())
        return scores


def main() -> int:
    """Serves until it is told to stop."""
    rate, ready = float(sys.argv[1]), sys.argv[2]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    model = str(ROOT / "tiny_pair" / "teacher")
    cache = CacheConfig(enabled=False)
    config = ServerConfig(model=model, dtype="float32", grpc_port=0, http_port=0, cache=cache, ready_file=ready)
    return run(config, lambda: PacedBackend(config, rate))


if __name__ == "__main__":
    sys.exit(main())
