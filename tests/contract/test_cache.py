"""Scores that are known cost the engine nothing: counted in the tokens that it computed, over both transports."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.scores import ScoreRequest, Scores, ScoreSpec, Sequence
from teacher_server.backends.theoretical_backend import Behaviour
from tests.contract.wires import WIRES, Wire
from tests.servers import Server, serving, theory, wait_for

TOKENS = 30 * 40


def data(sequences: int = 30, length: int = 40) -> ScoreRequest:
    """An off-policy data set: the same sequences for everybody."""
    ids = np.random.default_rng(7).integers(0, 200, (sequences, length))
    return ScoreRequest(tuple(Sequence(row, 1, row[1:, None]) for row in ids), ScoreSpec(4, (1.0, 2.0)))


def same(one: list[Scores], other: list[Scores]) -> bool:
    """Whether all arrays have the same bits."""
    return all(
        (a.arrays()[name] == b.arrays()[name]).all() for a, b in zip(one, other, strict=True) for name in a.arrays()
    )


@contextmanager
def client(server: Server, kind: str = "grpc", **options: Any) -> Iterator[Wire]:
    """A client of a server."""
    wire = WIRES[kind](server.grpc, server.http, **options)
    try:
        yield wire
    finally:
        wire.close()


@contextmanager
def keeping(folder: Path, memory_mib: int = 1024, **behaviour: Any) -> Iterator[Server]:
    """A server with scores on the disk."""
    with serving(theory(Behaviour(**behaviour)), cache={"folder": str(folder), "memory_mib": memory_mib}) as server:
        yield server


def test_a_second_student_and_every_later_epoch_cost_the_engine_nothing() -> None:
    with (
        serving(theory()) as server,
        client(server, client="first") as first,
        client(server, "http", client="second") as second,
    ):
        answers = [first.score(data())]
        assert server.metric("teacher_scored_tokens_total") == server.backend.counters.score_tokens == TOKENS
        answers += [second.score(data()), first.score(data()), second.score(data())]
        assert server.metric("teacher_scored_tokens_total") == server.backend.counters.score_tokens == TOKENS
        assert server.metric("teacher_cached_tokens_total") == 3 * TOKENS
        assert all(same(answers[0], answer) for answer in answers)
        usage = server.app.service.usage.all()
        assert (usage["first"].scored_tokens, usage["first"].cached_tokens) == (TOKENS, TOKENS)
        assert (usage["second"].scored_tokens, usage["second"].cached_tokens) == (0, 2 * TOKENS)


@pytest.mark.parametrize("kind", list(WIRES))
def test_a_server_that_starts_again_knows_what_it_knew(tmp_path: Path, kind: str) -> None:
    with keeping(tmp_path) as server, client(server, kind) as wire:
        computed = wire.score(data())
    with keeping(tmp_path, memory_mib=0) as server, client(server, kind) as wire:
        for epoch in (1, 2):
            assert same(wire.score(data()), computed)
            assert server.metric("teacher_cached_tokens_total", tier="disk") == epoch * TOKENS
        assert server.metric("teacher_disk_bytes") > 0
        assert server.backend.counters.score_tokens == 0


def test_another_teacher_knows_nothing_of_it(tmp_path: Path) -> None:
    with keeping(tmp_path) as server, client(server) as wire:
        wire.score(data())
    with keeping(tmp_path, kappa=2.0) as server, client(server) as wire:
        wire.score(data())
        assert server.backend.counters.score_tokens == TOKENS


def test_more_than_the_memory_holds_is_known_all_the_same(tmp_path: Path) -> None:
    with serving(theory(), cache={"folder": str(tmp_path), "memory_mib": 1}) as server, client(server) as wire:
        long = ScoreRequest(data(60, 500).sequences, ScoreSpec(20))
        computed = wire.score(long)
        assert sum(scores.nbytes for scores in computed) > 4 << 20
        assert same(wire.score(long), computed)
        assert server.backend.counters.score_tokens == 60 * 500


def test_damaged_scores_on_the_disk_are_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    with keeping(tmp_path) as server, client(server) as wire:
        computed = wire.score(data())
    (file,) = tmp_path.glob("*/scores.sqlite")
    kept = bytearray(file.read_bytes())
    place = kept.index(computed[3].top_logprobs.tobytes()) + 20
    kept[place] ^= 1
    file.write_bytes(kept)
    with keeping(tmp_path) as server, client(server) as wire:
        assert same(wire.score(data()), computed)
        assert server.backend.counters.score_tokens == 40
    with keeping(tmp_path) as server, client(server) as wire:
        assert same(wire.score(data()), computed)
        assert server.backend.counters.score_tokens == 0


def test_a_score_that_is_lost_while_its_call_goes_on_is_computed_even_where_the_queue_is_full(tmp_path: Path) -> None:
    with keeping(tmp_path) as server, client(server) as wire:
        wire.score(data(3))
    (file,) = tmp_path.glob("*/scores.sqlite")
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE scores SET value = zeroblob(length(value)) WHERE id = 2")
    settings: dict[str, Any] = {"queue_tokens": 100, "cache": {"folder": str(tmp_path), "memory_mib": 0}}
    with (
        serving(theory(Behaviour(hanging_id=250)), **settings) as server,
        ThreadPoolExecutor(1) as pool,
        client(server) as wire,
        client(server, client="other", timeout=5) as other,
    ):
        held = pool.submit(other.score, ScoreRequest((Sequence([1, 250] * 50),)))
        wait_for(lambda: server.metric("teacher_queue_tokens") == 100)
        assert len(wire.score(data(3))) == 3
        assert server.backend.counters.score_tokens == 40
        assert held.exception() is not None


def test_one_that_is_off_keeps_nothing(tmp_path: Path) -> None:
    cache = {"enabled": False, "folder": str(tmp_path)}
    with serving(theory(), cache=cache) as server, client(server) as wire:
        for _ in range(2):
            wire.score(data())
        assert server.backend.counters.score_tokens == 2 * TOKENS
    assert list(tmp_path.iterdir()) == []
