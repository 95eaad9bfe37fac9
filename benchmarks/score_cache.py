"""What keeping scores on the disk costs: `python -m benchmarks.score_cache FOLDER`; 1,000 positions a sequence, top 64.

Each figure is for one sequence: packing and writing, reading and checking, and a look-up that finds nothing. Reads are
of a file that the system's page cache mostly holds; on an engine's machine it is usually the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from protos.scores import Scores
from teacher_server.cache.database import Database
from teacher_server.cache.packing import pack, unpack

SEQUENCES, T, K = 400, 1000, 64


def main(folder: Path) -> None:
    """Prints one line for each part."""
    rng = np.random.default_rng(0)
    top = rng.normal(size=(T, K)).astype(np.float32)
    column = top[:, :1].copy()
    scores = Scores(top[:, 0].copy(), rng.integers(0, 150_000, (T, K)).astype(np.int32), top, None, column, column)
    keys = [rng.bytes(32) for _ in range(SEQUENCES)]
    database = Database(folder, "benchmark", 8 << 30)
    print(f"{scores.nbytes} bytes a sequence")
    values = timed("pack", lambda: {key: pack(key, scores) for key in keys})
    batches = [keys[i : i + 32] for i in range(0, SEQUENCES, 32)]
    timed("write", lambda: [database.write({key: values[key] for key in batch}) for batch in batches])
    timed("look up, not there", lambda: database.known([key[::-1] for key in keys]))
    found = timed("read", lambda: database.read(keys))
    timed("check and unpack", lambda: [unpack(key, value) for key, value in found.items()])
    database.close()


def timed(name: str, work: Callable[[], object]) -> dict[bytes, bytes]:
    """What `work` gives, with its time for one sequence printed."""
    began = time.perf_counter()
    result = work()
    print(f"{name:20s} {(time.perf_counter() - began) / SEQUENCES * 1e3:.3f} ms")
    return result if isinstance(result, dict) else {}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
