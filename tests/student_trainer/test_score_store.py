"""Scores are asked for once, kept on disk, and asked again only where the disk lost them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.scores import Field, Scores, ScoreSpec, Sequence
from student_trainer import score_store
from student_trainer.score_store import ScoreStore, digest
from student_trainer.teacher_client import TeacherClient, connect

SPEC = ScoreSpec(top_k=4, temperatures=(1.0, 2.0))


@pytest.fixture(scope="module")
def client(pair_teacher: dict[str, Any]) -> Iterator[TeacherClient]:
    with connect(pair_teacher["grpc"]) as connected:
        yield connected


def sequences(n: int = 6, seed: int = 0) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    return [Sequence(rng.integers(0, 300, 10 + i).astype(np.int32), 3 + i) for i in range(n)]


def open_store(client: TeacherClient, folder: Path, spec: ScoreSpec = SPEC, **options: Any) -> ScoreStore:
    return ScoreStore(client, client.teacher().fingerprint, spec, folder, **options)


def assert_same(found: list[Scores], expected: list[Scores]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.arrays().keys() == other.arrays().keys()
        for name, array in other.arrays().items():
            np.testing.assert_array_equal(one.arrays()[name], array, name)


def test_what_was_scored_is_never_asked_again(client: TeacherClient, tmp_path: Path) -> None:
    store = open_store(client, tmp_path)
    first = store.request(sequences())()
    assert store.asked == 6
    for _ in range(3):
        assert_same(store.request(sequences())(), first)
    assert store.asked == 6
    store.close()


def test_what_is_under_way_is_not_asked_twice(client: TeacherClient, tmp_path: Path) -> None:
    store = open_store(client, tmp_path)
    waits = [store.request(sequences()), store.request(sequences()[::-1])]
    assert store.asked == 6
    assert_same(waits[1](), waits[0]()[::-1])
    store.close()


def test_the_same_sequence_twice_in_a_request_is_asked_once(client: TeacherClient, tmp_path: Path) -> None:
    store = open_store(client, tmp_path)
    one = sequences(1)
    found = store.request(one + one)()
    assert store.asked == 1
    assert_same(found[:1], found[1:])
    store.close()


@pytest.mark.parametrize("spec", [SPEC, ScoreSpec(top_k=0, temperatures=(3.0,))])
def test_another_run_finds_them_on_the_disk(client: TeacherClient, tmp_path: Path, spec: ScoreSpec) -> None:
    store = open_store(client, tmp_path, spec)
    first = store.request(sequences())()
    store.close()
    again = open_store(client, tmp_path, spec)
    assert len(again) == 6
    assert_same(again.request(sequences())(), first)
    assert again.asked == 0
    again.close()


def test_processes_read_what_the_others_wrote(client: TeacherClient, tmp_path: Path) -> None:
    zero, one = (open_store(client, tmp_path, rank=rank) for rank in range(2))
    first = zero.request(sequences())()
    assert_same(one.request(sequences())(), first)
    assert one.asked == 0
    zero.close()
    one.close()


def test_another_specification_or_teacher_shares_nothing(client: TeacherClient, tmp_path: Path) -> None:
    stores = [
        open_store(client, tmp_path),
        open_store(client, tmp_path, ScoreSpec(top_k=4, temperatures=(1.0,))),
        ScoreStore(client, "another", SPEC, tmp_path),
    ]
    stores[0].request(sequences())()
    assert [len(store) for store in stores] == [6, 0, 0]
    for store in stores:
        store.close()


def test_a_half_written_record_costs_only_itself(client: TeacherClient, tmp_path: Path) -> None:
    store = open_store(client, tmp_path)
    first = store.request(sequences())()
    store.close()
    data, index = next(tmp_path.rglob("scores-0.bin")), next(tmp_path.rglob("scores-0.idx"))
    data.write_bytes(data.read_bytes()[:-5])
    with index.open("ab") as file:
        file.write(b"half of an entry")
    again = open_store(client, tmp_path)
    assert_same(again.request(sequences())(), first)
    assert again.asked == 1
    assert_same(again.request(sequences(8))()[:6], first)
    assert again.asked == 3
    again.close()


def test_what_arrived_and_was_not_waited_for_is_kept(client: TeacherClient, tmp_path: Path) -> None:
    store = open_store(client, tmp_path)
    store.request(sequences(3))
    store.request(sequences(3, seed=1))()
    client.score(sequences(1, seed=2))
    store.close()
    assert len(open_store(client, tmp_path)) >= 3


def test_hidden_states_are_asked_for_each_time_and_kept_nowhere(client: TeacherClient, tmp_path: Path) -> None:
    spec = ScoreSpec(want=frozenset({Field.HIDDEN_STATES}))
    store = score_store.open_store(client, client.teacher().fingerprint, spec, tmp_path / "scores", 0)
    first, second = (store.request(sequences(3))() for _ in range(2))
    assert store.asked == 6
    assert all(s.hidden_states is not None and len(s.arrays()) == 1 for s in first)
    assert_same(first, second)
    store.close()
    assert not (tmp_path / "scores").exists()


def test_a_digest_tells_ids_and_start_apart() -> None:
    ids = np.arange(9, dtype=np.int32)
    names = {digest(Sequence(ids, start)) for start in (1, 2, 3)} | {digest(Sequence(ids[:-1], 1))}
    assert len(names) == 4
