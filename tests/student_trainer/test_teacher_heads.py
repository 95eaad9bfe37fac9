"""The client's LM head over both transports: fetched once, kept on disk whole or not at all, and checked when read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from protos import errors
from protos.head import Head, logits
from protos.scores import Field, ScoreSpec, Sequence
from student_trainer.teacher_client import connect, heads, splitting
from tests.protos.strategies import same
from tests.student_trainer.live import OVER, ScriptedTeacher, teacher_info, theoretical_teacher

HEAD = Head(np.arange(40, dtype=np.uint16).reshape(10, 4), "bfloat16", np.arange(10, dtype=np.float32))


def scripted(**changes: object) -> ScriptedTeacher:
    info = teacher_info(vocab_size=10, normalized_size=10, hidden_size=4, hidden_dtype="bfloat16")
    return ScriptedTeacher(info=info, head=HEAD, **changes)


@pytest.fixture(scope="module")
def theory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with theoretical_teacher(tmp_path_factory.mktemp("theory")) as addresses:
        yield addresses


@pytest.fixture(params=list(OVER))
def over(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_head_and_hidden_states_of_a_real_server_give_its_distribution(
    over: str, theory: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "HIDDEN_BYTES", 8 * 50)
    spec = ScoreSpec(5, want=frozenset({Field.HIDDEN_STATES, Field.TOP}))
    with connect(theory[over]) as client:
        head, dtype = client.head(), client.teacher().hidden_dtype
        for scores in client.score([Sequence(np.arange(n), 1) for n in (30, 12, 60, 9)], spec):
            assert scores.hidden_states is not None
            assert scores.top_token_ids is not None
            z_TV = logits(scores.hidden_states, dtype, head).astype(np.float64)
            l_TV = z_TV - np.log(np.exp(z_TV).sum(axis=1, keepdims=True))
            assert np.allclose(np.take_along_axis(l_TV, scores.top_token_ids, 1), scores.top_logprobs, atol=1e-5)


def test_calls_for_hidden_states_are_cut_by_their_bytes() -> None:
    info = teacher_info(hidden_size=4096, hidden_dtype="bfloat16")
    want = ScoreSpec(want=frozenset({Field.HIDDEN_STATES}))
    most = splitting.hidden_tokens(info, want)
    assert most == 32_768
    assert splitting.hidden_tokens(info, ScoreSpec(8)) is None
    sequences = [Sequence(np.zeros(20_000, np.int32), 1)] * 3
    limits = replace(info.limits, request_tokens=262_144, sequences=99)
    assert splitting.score_pieces(sequences, limits, 1, most) == [range(1), range(1, 2), range(2, 3)]
    assert splitting.score_pieces(sequences, limits) == [range(3)]


def test_a_head_is_fetched_once_by_a_client_and_once_by_all_that_share_a_folder(over: str, tmp_path: Path) -> None:
    teacher = scripted()
    with OVER[over](teacher) as address:
        with connect(address) as client:
            assert same(client.head(), HEAD)
            assert client.head() is client.head()
            assert teacher.calls == 2
        for _ in range(2):
            with connect(address) as client:
                assert same(plain(client.head(tmp_path)), HEAD)
        assert teacher.calls == 2 + 2 + 1


def plain(head: Head) -> Head:
    """Without memory maps."""
    return Head(np.array(head.weight), head.dtype, None if head.bias is None else np.array(head.bias))


def test_a_head_whose_stream_breaks_is_fetched_again_and_half_of_it_is_never_kept(over: str, tmp_path: Path) -> None:
    teacher = scripted(cut_head=2)
    with OVER[over](teacher) as address, connect(address, patience_s=20) as client:
        assert same(plain(client.head(tmp_path)), HEAD)
    assert teacher.cut_head == 0
    with (
        OVER[over](scripted(cut_head=9)) as address,
        connect(address, patience_s=0) as client,
        pytest.raises(errors.Unavailable, match="went away"),
    ):
        client.head(tmp_path / "other")
    assert not list((tmp_path / "other" / "heads").iterdir())


def test_refusals_come_through(over: str) -> None:
    teacher = scripted()
    with OVER[over](teacher) as address, connect(address) as client:
        teacher.head = None
        with pytest.raises(errors.Unsupported, match="no head"):
            client.head()
        teacher.info = replace(teacher.info, fingerprint="f2")
        with pytest.raises(errors.TeacherMismatch, match="this is f2, not f1"):
            client.head()


@pytest.mark.parametrize("damage", ["byte", "short", "gone", "about"])
def test_a_damaged_file_is_noticed_and_the_head_fetched_again(damage: str, tmp_path: Path) -> None:
    info = scripted().info
    heads.store(tmp_path, info, HEAD.parts(4))
    weight, about = (heads.folder_of(tmp_path, info) / name for name in ("weight.npy", heads.ABOUT))
    data = bytearray(weight.read_bytes())
    if damage == "byte":
        data[-1] ^= 1
        weight.write_bytes(data)
    elif damage == "short":
        weight.write_bytes(data[:-2])
    elif damage == "gone":
        weight.unlink()
    else:
        about.write_text("{")
    assert heads.load(tmp_path, info) is None
    assert same(plain(heads.store(tmp_path, info, HEAD.parts(3))), HEAD)
    assert same(plain(heads.load(tmp_path, info) or HEAD), HEAD)


def test_another_teachers_head_is_another_folder_and_a_head_that_was_not_described_is_refused(tmp_path: Path) -> None:
    info = scripted().info
    heads.store(tmp_path, info, HEAD.parts(4))
    assert heads.load(tmp_path, replace(info, fingerprint="f2")) is None
    with pytest.raises(errors.TeacherFailed, match=r"head is \[10, 4\], it described one of \[11, 4\]"):
        heads.assemble(HEAD.parts(4), replace(info, vocab_size=11))


def test_two_processes_that_keep_a_head_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    info = scripted().info

    def slowly() -> Iterator[Head]:
        for part in HEAD.parts(5):
            yield part
            heads.store(tmp_path, info, HEAD.parts(3))

    assert same(plain(heads.store(tmp_path, info, slowly())), HEAD)
    assert [folder.name for folder in (tmp_path / "heads").iterdir()] == [heads.folder_of(tmp_path, info).name]
