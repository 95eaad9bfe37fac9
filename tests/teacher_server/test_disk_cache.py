"""Scores on the disk: what comes back is what was put, or nothing, whatever happened to the file."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.scores import Scores
from teacher_server.cache import DiskTier
from teacher_server.cache.database import PAGE_BYTES, Database
from teacher_server.cache.packing import pack, unpack
from tests.servers import ROOT, environment

MIB = 1 << 20


def key(number: int) -> bytes:
    """A key."""
    return number.to_bytes(32, "little")


def scores(seed: int, t: int = 40, k: int = 8, c: int = 3, m: int = 2) -> Scores:
    """Every field that can be kept."""
    rng = np.random.default_rng(seed)
    f = np.float32
    return Scores(
        rng.normal(size=t).astype(f),
        rng.integers(0, 1000, (t, k)).astype(np.int32),
        rng.normal(size=(t, k)).astype(f),
        rng.normal(size=(t, c)).astype(f),
        rng.normal(size=(t, m)).astype(f),
        rng.normal(size=(t, m)).astype(f),
    )


def same(a: Scores | None, b: Scores) -> bool:
    """Whether two scores have the same bits."""
    if a is None or a.arrays().keys() != b.arrays().keys():
        return False
    return all((a.arrays()[n] == b.arrays()[n]).all() for n in a.arrays())


@pytest.mark.parametrize("there", [{"token_logprobs"}, {"top_token_ids", "top_logprobs"}, {"tail_logprob"}, None])
def test_what_is_packed_comes_back(there: set[str] | None) -> None:
    whole = scores(1)
    packed = Scores(**{n: a for n, a in whole.arrays().items() if there is None or n in there})
    assert same(unpack(key(1), pack(key(1), packed)), packed)


def test_no_flipped_bit_is_overlooked_and_no_value_is_anothers() -> None:
    data = pack(key(1), scores(1, t=2))
    assert unpack(key(2), data) is None
    assert unpack(key(1), data[:-1]) is None
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert unpack(key(1), bytes(flipped)) is None


def test_the_least_recently_used_make_room_and_the_file_keeps_its_bound(tmp_path: Path) -> None:
    database = Database(tmp_path, "f", 4 * MIB)
    value = scores(0, t=2000)
    count = 4 * MIB // value.nbytes
    for number in range(count - 4):
        database.write({key(number): pack(key(number), value)})
    for number in range(count, 3 * count):
        database.write({key(number): pack(key(number), value)}, used=[key(0)])
        assert database.used_bytes <= 4 * MIB
    assert database.file.stat().st_size <= 4 * MIB
    assert database.known([key(0), key(1), key(2), key(3 * count - 1)]) == {key(0), key(3 * count - 1)}
    database.write({key(-1 + 10**6): bytes(5 * MIB)})
    assert database.known([key(10**6 - 1), key(0)]) == {key(0)}, "what never fits drives nothing out"
    database.close()


def test_what_another_teacher_left_makes_room_first_unless_it_is_in_use(tmp_path: Path) -> None:
    value = scores(0, t=2000)
    old, present, own = (Database(tmp_path, name, 2 * MIB) for name in ("old", "present", "own"))
    for database in (old, present):
        database.write({key(n): pack(key(n), value) for n in range(8)})
    old.close()
    for number in range(14):
        own.write({key(number): pack(key(number), value)})
    assert not old.file.exists()
    assert len(present.known([key(n) for n in range(8)])) == 8
    assert len(own.known([key(n) for n in range(14)])) >= 10
    present.close()
    own.close()


KILLED = """
import sys
from pathlib import Path
import numpy as np
from protos.scores import Scores
from teacher_server.cache.database import Database
from teacher_server.cache.packing import pack
database = Database(Path(sys.argv[1]), "f", 64 << 20)
for number in range(10**6):
    key = number.to_bytes(32, "little")
    database.write({key: pack(key, Scores(np.full(30_000, number, np.float32)))})
    print(number, flush=True)
"""


def test_a_killed_process_leaves_whole_scores(tmp_path: Path) -> None:
    for _ in range(3):
        env = environment(PYTHONPATH=str(ROOT))
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env=env
        ) as process:
            assert process.stdout is not None
            for _, said in zip(range(40), process.stdout, strict=False):
                last = int(said)
            os.kill(process.pid, signal.SIGKILL)
        database = Database(tmp_path, "f", 64 * MIB)
        keys = [key(number) for number in range(last + 2)]
        assert len(database.known(keys)) >= last + 1
        for found, value in database.read(keys).items():
            number = int.from_bytes(found, "little")
            assert same(unpack(found, value), Scores(np.full(30_000, number, np.float32)))
        database.close()


def on_a_loop(main: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine."""
    asyncio.run(main)


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_cost_scores_and_nothing_else(tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Bits anywhere in the file: a score is right or not there, later ones are kept, and the next start works."""
    caplog.set_level(logging.CRITICAL)
    value = {n: scores(n, t=200) for n in range(60)}

    async def fill() -> None:
        tier = DiskTier(tmp_path, 64 * MIB)
        await tier.open("f")
        for n in range(50):
            tier.put(key(n), value[n])
        await tier.close()

    def damage() -> None:
        (file,) = tmp_path.glob("f/*.sqlite")
        data, rng = bytearray(file.read_bytes()), np.random.default_rng(seed)
        first = 0 if seed % 2 else PAGE_BYTES
        for bit in rng.integers(8 * first, 8 * len(data), 12):
            data[bit // 8] ^= 1 << int(bit % 8)
        file.write_bytes(data)

    async def use() -> None:
        tier = DiskTier(tmp_path, 64 * MIB)
        await tier.open("f")
        for _ in range(2):  # after the first the file is mended, where it must be
            known = await tier.known([key(n) for n in range(50)])
            read = await tier.read(known)
            for found, kept in read.items():
                assert same(kept, value[int.from_bytes(found, "little")])
            for n in range(50, 60):
                tier.put(key(n), value[n])
            await tier.flush()
        await tier.close()

    async def later() -> None:
        tier = DiskTier(tmp_path, 64 * MIB)
        await tier.open("f")
        read = await tier.read([key(n) for n in range(60)])
        assert all(same(kept, value[int.from_bytes(found, "little")]) for found, kept in read.items())
        assert {key(n) for n in range(50, 60)} <= set(read)
        assert len(read) >= 25
        await tier.close()

    on_a_loop(fill())
    damage()
    on_a_loop(use())
    on_a_loop(later())


def test_a_value_that_does_not_hold_is_dropped_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        tier = DiskTier(tmp_path, 64 * MIB)
        await tier.open("f")
        for n in range(10):
            tier.put(key(n), scores(n))
        await tier.flush()
        tier._open()._writer.execute("UPDATE scores SET value = zeroblob(length(value)) WHERE id = 4")
        read = await tier.read([key(n) for n in range(10)])
        assert len(read) == 9
        assert (tier.counts.damaged, tier.counts.read, tier.counts.written) == (1, 9, 10)
        assert len(await tier.known([key(n) for n in range(10)])) == 9
        await tier.close()

    on_a_loop(main())
    assert "1 scores on the disk were damaged" in caplog.text


def test_what_is_no_database_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "scores.sqlite").write_bytes(os.urandom(100_000))

    async def main() -> None:
        tier = DiskTier(tmp_path, 64 * MIB)
        await tier.open("f")
        tier.put(key(1), scores(1))
        await tier.flush()
        assert same((await tier.read([key(1)]))[key(1)], scores(1))
        await tier.close()

    on_a_loop(main())


def test_a_folder_that_cannot_be_used_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        asyncio.run(DiskTier(tmp_path / "file", MIB).open("f"))


def test_a_disk_that_fails_costs_scores_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        tier = DiskTier(tmp_path, 64 * MIB)
        await tier.open("f")
        tier._open()._writer.execute("PRAGMA max_page_count = 40")
        for n in range(200):
            tier.put(key(n), scores(n, t=2000))
            await tier.flush()
        assert tier.counts.written > 0
        assert tier.counts.not_kept > 0
        assert tier.counts.written + tier.counts.not_kept == 200
        assert await tier.read([key(0)])
        await tier.close()

    on_a_loop(main())
    assert caplog.text.count("the score cache's disk fails") == 1
    assert "full" in caplog.text


def test_two_processes_may_share_a_folder(tmp_path: Path) -> None:
    one, two = Database(tmp_path, "f", 64 * MIB), Database(tmp_path, "f", 64 * MIB)
    one.write({key(1): pack(key(1), scores(1))})
    two.write({key(1): pack(key(1), scores(1)), key(2): pack(key(2), scores(2))})
    assert one.known([key(1), key(2)]) == two.known([key(1), key(2)]) == {key(1), key(2)}
    one.close()
    two.close()
