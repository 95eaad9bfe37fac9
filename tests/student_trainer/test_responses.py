"""The teacher's responses as a dataset: written in parts, continued, reused, refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from protos.scores import FinishReason, Message, Mode, Sampling
from student_trainer import responses
from student_trainer.errors import UserError
from student_trainer.modes import render
from student_trainer.responses import Request, collect, fitting, read, reuse
from student_trainer.teacher_client import TeacherClient, connect
from student_trainer.teachers import Teacher, Teachers
from tests.student_trainer.conftest import TEACHER

SAMPLING = Sampling(max_tokens=48, temperature=0.6, top_p=0.95, seed=1)


@pytest.fixture(scope="module")
def client(pair_teacher: dict[str, Any]) -> Iterator[TeacherClient]:
    with connect(pair_teacher["grpc"]) as connected:
        yield connected


def only(client: TeacherClient, **changes: Any) -> Teachers:
    """The client's teacher as the only one."""
    return Teachers([Teacher(client, replace(client.teacher(), **changes))])


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    found = []
    for i in range(6):
        messages = (Message("user", f"Calculate\n{i + 3}+{2 * i}"),)
        for mode in Mode:
            found.append(Request(f"e{i}", messages, mode, render(tokenizer, messages, mode), str(3 * i + 3)))
    return found


def test_a_dataset_holds_what_a_person_wants_to_read(
    client: TeacherClient, requests: list[Request], tmp_path: Path
) -> None:
    found = collect(only(client), requests, SAMPLING, tmp_path / "r.parquet", samples=2)
    assert [(r.example_id, r.mode, r.sample) for r in found] == [
        (r.example_id, r.mode, s) for r in requests for s in range(2)
    ]
    table = pq.read_table(tmp_path / "r.parquet")
    assert table.schema.names == responses.SCHEMA.names
    row = table.slice(0, 1).to_pylist()[0]
    assert row["teacher_fingerprint"] == client.teacher().fingerprint
    assert '"role": "user"' in row["prompt"]
    again, origins = read(tmp_path / "r.parquet")
    (origin,) = origins.values()
    assert origin.tokenizer_hash == client.teacher().tokenizer_hash
    by_key = {(r.example_id, r.mode, r.sample): r for r in again}
    for one in found:
        other = by_key[one.example_id, one.mode, one.sample]
        assert (one.text, one.finish_reason, one.messages) == (other.text, other.finish_reason, other.messages)
        np.testing.assert_array_equal(one.ids, other.ids)


def test_a_stopped_response_ends_with_an_end_and_a_cut_one_does_not(
    client: TeacherClient, requests: list[Request], tmp_path: Path
) -> None:
    found = collect(only(client), requests, replace(SAMPLING, max_tokens=6), tmp_path / "r.parquet")
    ends = client.teacher().eos_token_ids
    assert {r.finish_reason for r in found} == set(FinishReason)
    for one in found:
        assert (one.completion_ids[-1] in ends) == (one.finish_reason is FinishReason.STOP)


def test_an_interrupted_collection_asks_only_for_what_is_missing(
    client: TeacherClient, requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "r.parquet", 0

    def stop_after_five(done: int, total: int, tokens: int) -> None:
        nonlocal seen
        seen = done
        if done == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(responses, "PART_ROWS", 2)
    with pytest.raises(KeyboardInterrupt):
        collect(only(client), requests, SAMPLING, folder, progress=stop_after_five)
    kept, _ = read(folder)
    assert len(kept) == seen == 5
    counts: list[int] = []
    found = collect(only(client), requests, SAMPLING, folder, progress=lambda done, total, _: counts.append(done))
    assert counts == list(range(6, 13))
    assert len(found) == 12
    old = {(r.example_id, r.mode): r.completion_ids.tolist() for r in kept}
    assert all(old.get((r.example_id, r.mode), r.completion_ids.tolist()) == r.completion_ids.tolist() for r in found)
    counts.clear()
    collect(only(client), requests, SAMPLING, folder, progress=lambda *a: counts.append(a[0]))
    assert not counts


def test_a_collection_of_another_sampling_is_not_continued(
    client: TeacherClient, requests: list[Request], tmp_path: Path
) -> None:
    collect(only(client), requests[:1], SAMPLING, tmp_path / "r")
    with pytest.raises(UserError, match=r"0\.6.*0\.9"):
        collect(only(client), requests, replace(SAMPLING, temperature=0.9), tmp_path / "r")


def test_a_dataset_of_another_teacher_is_refused_unless_that_is_said(
    client: TeacherClient, requests: list[Request], tmp_path: Path
) -> None:
    info = client.teacher()
    collect(only(client), requests[:2], SAMPLING, tmp_path / "r")
    assert len(reuse(tmp_path / "r", only(client))) == 2
    other = only(client, fingerprint="f" * 64, name="other")
    with pytest.raises(UserError, match=f"{info.fingerprint}.*{'f' * 64}.*allow_other_teacher"):
        reuse(tmp_path / "r", other)
    assert len(reuse(tmp_path / "r", other, other_teacher=True)) == 2
    with pytest.raises(UserError, match=f"{info.tokenizer_hash}.*strange"):
        reuse(tmp_path / "r", only(client, tokenizer_hash="strange"), other_teacher=True)


def test_what_is_no_dataset_ends_in_one_line(client: TeacherClient, tmp_path: Path) -> None:
    teachers = only(client)
    with pytest.raises(UserError, match="no dataset"):
        reuse(tmp_path / "missing", teachers)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UserError, match="no Parquet file"):
        reuse(tmp_path / "text.parquet", teachers)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="lacks"):
        reuse(tmp_path / "other.parquet", teachers)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        reuse(tmp_path / "empty", teachers)


def test_long_and_empty_responses_are_left_out(client: TeacherClient, requests: list[Request], tmp_path: Path) -> None:
    found = collect(only(client), requests, SAMPLING, tmp_path / "r")
    limit = sorted(r.tokens for r in found)[5]
    kept, left_out = fitting(found, limit)
    assert left_out == len(found) - len(kept) > 0
    assert max(r.tokens for r in kept) == limit
