"""Two real teachers of different weights in one run: who scores, answers, is checked, is named and is recorded."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from protos import errors
from protos.scores import Mode, Prompt, Sampling, ScoreSpec
from student_trainer import asking, opening
from student_trainer.batches import Row
from student_trainer.config import Config
from student_trainer.data import read_examples
from student_trainer.errors import UserError, explain
from student_trainer.evaluation import requests_for
from student_trainer.handshake import Use, check
from student_trainer.models import describe
from student_trainer.reporting import Reporter
from student_trainer.responses import collect, read, reuse
from student_trainer.row_scores import RowScores
from student_trainer.run import run
from student_trainer.stage import training_device
from student_trainer.teacher_client import connect
from student_trainer.teachers import Teachers
from teacher_server.keys import make_key, write
from tests.servers import ROOT, serving, theory
from tests.student_trainer.conftest import STUDENT
from tests.student_trainer.live import ScriptedTeacher, over_grpc, theoretical_teacher
from tests.student_trainer.test_stages import assert_same_weights, settings

SPEC = ScoreSpec(4, (1.0, 2.0))


def open_them(config: Config, stack: ExitStack, stage: str = "all", domains: Any = (None,)) -> Teachers:
    reporter = Reporter(Console(file=io.StringIO()))
    return opening.open_teachers(
        config, stage, describe(config, STUDENT), set(domains), reporter, training_device, stack
    )


def by_mode(folder: Path, thinking: str, other: str, **sections: Any) -> Config:
    routes = [{"endpoint": thinking, "mode": "thinking"}, {"endpoint": other, "mode": "non_thinking"}]
    return settings(folder, "unused:1", teacher={"endpoint": None, "patience": 0, "routes": routes}, **sections)


@pytest.fixture(scope="module")
def addresses(pair_teacher: dict[str, Any], student_as_teacher: dict[str, Any]) -> tuple[str, str]:
    """Of the tiny teacher, and of the tiny student as a teacher: the same tokenizer, other weights."""
    return pair_teacher["grpc"], student_as_teacher["http"]


@pytest.fixture(scope="module")
def both(addresses: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teachers]:
    """One teacher for each mode, opened as a run opens them."""
    with ExitStack() as stack:
        yield open_them(by_mode(tmp_path_factory.mktemp("routes"), *addresses), stack)


def rows() -> list[Row]:
    """Rows of both modes, mixed; two of them are of the same ids."""
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, 60, n).astype(np.int32) for n in (9, 14, 7, 11)]
    modes = [Mode.THINKING, Mode.NON_THINKING, Mode.NON_THINKING, Mode.THINKING]
    found = [Row(i, 3, f"row {n}", mode) for n, (i, mode) in enumerate(zip(ids, modes, strict=True))]
    return [*found, Row(ids[0], 3, "row 0 again", Mode.NON_THINKING)]


def direct(teachers: Teachers, row: Row) -> Any:
    """The score of a row by the client of its mode's teacher."""
    (teacher,) = (t for t in teachers.all if t.scope.mode is row.mode)
    return teacher.client.score([row.tokens()], SPEC)[0]


def test_each_row_is_scored_by_the_teacher_of_its_mode(both: Teachers, tmp_path: Path) -> None:
    assert len({t.info.fingerprint for t in both.all}) == 2
    asked = rows()
    expected = [direct(both, row) for row in asked]
    assert np.abs(expected[0].token_logprobs - expected[4].token_logprobs).max() > 0.5, (
        "the teachers say different things"
    )
    store = RowScores(both, SPEC, tmp_path / "scores")
    ways = {
        "at once": [p.result() for p in both.submit_score(asked, SPEC)],
        "kept": store.request(asked)(),
        "read back": store.request(asked)(),
        "not kept": RowScores(both, SPEC).request(asked)(),
    }
    store.close()
    again = RowScores(both, SPEC, tmp_path / "scores")
    ways["by a later run"] = again.request(asked)()
    assert (store.asked, again.asked) == (5, 0)
    again.close()
    for way, scores in ways.items():
        for score, right in zip(scores, expected, strict=True):
            np.testing.assert_allclose(score.token_logprobs, right.token_logprobs, atol=1e-5, err_msg=way)
            np.testing.assert_array_equal(score.top_token_ids, right.top_token_ids, err_msg=way)


def test_candidates_go_to_the_teacher_of_their_row(both: Teachers) -> None:
    asked = rows()[:3]
    candidates = [np.tile(np.arange(i, i + 2, dtype=np.int32), (len(r.ids) - r.start, 1)) for i, r in enumerate(asked)]
    found = [p.result() for p in both.submit_score(asked, ScoreSpec(0), candidates)]
    for row, ids, score in zip(asked, candidates, found, strict=True):
        alone = both.of(row.mode, None).client.score([row.tokens(ids)], ScoreSpec(0))[0]
        np.testing.assert_allclose(score.candidate_logprobs, alone.candidate_logprobs, atol=1e-5)


def test_a_domain_has_its_own_teacher_in_both_modes(addresses: tuple[str, str], tmp_path: Path) -> None:
    teacher = {"endpoint": addresses[0], "routes": [{"endpoint": addresses[1], "domain": "hard"}]}
    with ExitStack() as stack:
        teachers = open_them(settings(tmp_path, "unused:1", teacher=teacher), stack, domains=("hard", None, "easy"))
        main, hard = (next(t for t in teachers.all if t.scope.domain == d) for d in (None, "hard"))
        one = rows()[0]
        asked = [one._replace(mode=m, domain=d) for m in Mode for d in ("hard", "easy", None)]
        found = [p.result().token_logprobs for p in teachers.submit_score(asked, SPEC)]
        for row, logprobs in zip(asked, found, strict=True):
            right = (hard if row.domain == "hard" else main).client.score([row.tokens()], SPEC)[0]
            np.testing.assert_allclose(logprobs, right.token_logprobs, atol=1e-5)


def test_responses_come_from_the_teacher_of_their_mode_and_say_so(both: Teachers, tmp_path: Path) -> None:
    tokenizer = describe(settings(tmp_path, "unused:1"), STUDENT).tokenizer
    examples = read_examples(ROOT / "dataset" / "arithmetic.json")[:3]
    requests = requests_for(tokenizer, [(e, mode) for e in examples for mode in Mode], 96)
    sampling, path, counts = Sampling(8, 0.0, seed=1), tmp_path / "responses", []
    found = collect(both, requests, sampling, path, progress=lambda done, *_: counts.append(done))
    assert counts == list(range(1, 7))
    assert [(r.example_id, r.mode) for r in found] == [(r.example_id, r.mode) for r in requests]
    for teacher in both.all:
        mine = [r for r in requests if r.mode is teacher.scope.mode]
        alone = collect(Teachers([teacher]), mine, sampling, tmp_path / f"{teacher.scope}")
        same = [r for r in found if r.mode is teacher.scope.mode]
        assert [r.completion_ids.tolist() for r in same] == [r.completion_ids.tolist() for r in alone]
        assert {r.teacher for r in same} == {teacher.info.fingerprint}
    again, origins = read(path)
    assert set(origins) == {t.info.fingerprint for t in both.all}
    assert {(r.example_id, r.mode): r.teacher for r in again} == {(r.example_id, r.mode): r.teacher for r in found}
    counts.clear()
    collect(both, requests, sampling, path, progress=lambda done, *_: counts.append(done))
    assert counts == []
    assert len(reuse(path, both)) == 6
    first, second = both.all
    swapped = Teachers([replace(first, scope=second.scope), replace(second, scope=first.scope)])
    with pytest.raises(UserError, match=r"this teacher for (non_)?thinking is .*allow_other_teacher"):
        reuse(path, swapped)
    with pytest.raises(UserError, match="start afresh without --resume"):
        collect(swapped, requests, sampling, path)
    with pytest.raises(UserError, match="no teacher for mode non_thinking, domain none"):
        reuse(path, Teachers([t for t in both.all if t.scope.mode is Mode.THINKING]))


def test_what_one_teacher_raises_ends_the_call_to_all(both: Teachers) -> None:
    good, failing = both.all[0], ScriptedTeacher()
    prompts = [Prompt(token_ids=np.array([5, 6], np.int32))] * 2
    with over_grpc(failing) as address, connect(address) as client:
        failing.failures.append(errors.InvalidRequest("not this one"))
        groups = [(good, [0]), (replace(good, client=client), [1])]
        with pytest.raises(errors.InvalidRequest, match="not this one"):
            asking.ask(groups, prompts, Sampling(4), 1, lambda *_: None)


def test_a_teacher_of_another_tokenizer_is_refused_naming_its_route(addresses: tuple[str, str], tmp_path: Path) -> None:
    with theoretical_teacher(tmp_path) as other, ExitStack() as stack, pytest.raises(UserError) as caught:
        open_them(by_mode(tmp_path, addresses[0], other["grpc"]), stack)
    text = str(caught.value)
    assert text.startswith("teacher theoretical at teacher.routes.1 (non_thinking): its vocabulary has ")
    assert "the student's" in text


def test_a_teacher_that_is_not_there_is_named_by_its_route(addresses: tuple[str, str], tmp_path: Path) -> None:
    with ExitStack() as stack, pytest.raises(errors.Unavailable) as caught:
        open_them(by_mode(tmp_path, addresses[0], "127.0.0.1:1"), stack)
    assert (explain(caught.value) or "").startswith("teacher: teacher.routes.1 (non_thinking): ")


def test_a_route_may_have_a_key_of_its_own(addresses: tuple[str, str], tmp_path: Path) -> None:
    key, stored = make_key("trainer")
    write(tmp_path / "keys.json", [stored])
    (tmp_path / "key").write_text(key)
    (tmp_path / "other").write_text(make_key("other")[0])
    shared = {"endpoint": addresses[0], "patience": 0, "api_key_file": str(tmp_path / "other")}
    with serving(theory(), key=key, keys_file=str(tmp_path / "keys.json")) as server, ExitStack() as stack:
        route = {"endpoint": server.grpc, "mode": "thinking"}
        with pytest.raises(errors.Unauthenticated, match=r"teacher\.routes\.0 \(thinking\): "):
            open_them(settings(tmp_path, "unused:1", teacher={**shared, "routes": [route]}), stack)
        own = {**route, "api_key_file": str(tmp_path / "key")}
        with pytest.raises(UserError, match=r"at teacher\.routes\.0 \(thinking\): its vocabulary has"):
            open_them(settings(tmp_path, "unused:1", teacher={**shared, "routes": [own]}), stack)


def test_a_fingerprint_is_expected_route_by_route(addresses: tuple[str, str], tmp_path: Path) -> None:
    config = by_mode(tmp_path, *addresses)
    routes = [r.model_dump() for r in config.teacher.routes]
    routes[1]["fingerprint"] = "another"
    wrong = config.model_copy(update={"teacher": config.teacher.model_validate({"routes": routes})})
    pattern = r"at teacher\.routes\.1 \(non_thinking\): its fingerprint is .*change teacher\.routes\.1\.fingerprint"
    with ExitStack() as stack, pytest.raises(UserError, match=pattern):
        open_them(wrong, stack)


def test_a_teacher_is_checked_for_its_own_modes_alone(both: Teachers, tmp_path: Path) -> None:
    config, student = by_mode(tmp_path, "a:1", "b:1"), describe(settings(tmp_path, "unused:1"), STUDENT)
    only = replace(both.all[0].info, modes=(Mode.THINKING,))
    arguments = only, student.tokenizer, student.logits_width, config
    check(*arguments, eos_ids=student.eos_ids, use=Use(modes=frozenset({Mode.THINKING})))
    with pytest.raises(UserError, match="the run needs the mode non_thinking"):
        check(*arguments, eos_ids=student.eos_ids, use=Use(modes=frozenset(Mode)))
    mute = replace(only, can_generate=False)
    stages = {"non_policy_distillation": {"modes": "non_thinking"}}
    for sections, fits in ((stages, True), ({}, False)):
        own = by_mode(tmp_path, "a:1", "b:1", **sections)
        use = Use("teacher.routes.0 (thinking)", modes=frozenset({Mode.THINKING}))
        if fits:
            check(mute, *arguments[1:3], own, eos_ids=student.eos_ids, use=use)
        else:
            with pytest.raises(UserError, match=r"routes\.0 \(thinking\): it .*scores and does not generate"):
                check(mute, *arguments[1:3], own, eos_ids=student.eos_ids, use=use)


def test_several_teachers_cannot_give_whole_distributions(addresses: tuple[str, str], tmp_path: Path) -> None:
    full = {"policy_distillation": {"distribution": "full"}}
    with ExitStack() as stack, pytest.raises(UserError, match=r"takes one teacher.*routes\.0 \(thinking\), .*top_k"):
        open_them(by_mode(tmp_path, *addresses, **full), stack)
    with ExitStack() as stack:
        open_them(by_mode(tmp_path, *addresses, **full), stack, stage="non_policy")


def test_teachers_that_normalise_over_other_sizes_are_refused_naming_both(both: Teachers) -> None:
    none: frozenset[Mode] = frozenset()
    wanted = [opening.Place(f"teacher.routes.{i}", t.scope, "a:1", None, "", none) for i, t in enumerate(both.all)]
    infos = [both.all[0].info, replace(both.all[1].info, normalized_size=9)]
    with pytest.raises(UserError, match=r"routes\.1 normalises over 9 logits, .* at teacher\.routes\.0 over \d+"):
        opening._check_together(wanted, infos)


def data_with_domains(folder: Path) -> dict[str, Any]:
    """Sixteen problems to train on and six held out, every other one of the domain hard."""
    paths = {}
    for key, name, count in (("data_path", "arithmetic", 16), ("val_path", "arithmetic_heldout", 6)):
        problems = json.loads((ROOT / "dataset" / f"{name}.json").read_text())[:count]
        marked = [{**p, "domain": "hard" if i % 2 else "easy"} for i, p in enumerate(problems)]
        paths[key] = folder / f"{name}.json"
        paths[key].write_text(json.dumps(marked))
    return {key: str(path) for key, path in paths.items()}


def test_a_whole_run_records_and_names_both_teachers_and_goes_on_only_with_them(
    addresses: tuple[str, str], both: Teachers, tmp_path: Path
) -> None:
    def go(one: str, other: str, stage: str = "all", **sections: Any) -> str:
        shown = io.StringIO()
        config = by_mode(tmp_path, one, other, data=data_with_domains(tmp_path), **sections)
        run(config, stage, None, Console(file=shown, width=220))
        return shown.getvalue()

    short = {"non_policy_distillation": {"max_steps": 2}, "policy_distillation": {"max_steps": 3}}
    shown = go(*addresses, **short)
    prints = {t.scope.mode.value: t.info.fingerprint for t in both.all if t.scope.mode}
    for mode, fingerprint in prints.items():
        assert f"for {mode}, fingerprint {fingerprint}" in shown
    outputs = tmp_path / "outputs"
    table = pq.read_table(outputs / "non_policy_distillation" / "responses.parquet").to_pylist()
    assert {(r["mode"], r["teacher_fingerprint"]) for r in table} == set(prints.items())
    assert {r["domain"] for r in table} == {"hard", "easy"}
    (answers,) = (outputs / "evaluation").glob("*/answers.parquet")
    assert {(r["mode"], r["teacher_fingerprint"]) for r in pq.read_table(answers).to_pylist()} == set(prints.items())
    folder = outputs / "policy_distillation"
    recorded = json.loads((folder / "policy_checkpoint-2" / "training_config.json").read_text())["teachers"]
    assert {t["mode"]: t["fingerprint"] for t in recorded} == prints
    card = (folder / "final_policy_model" / "README.md").read_text()
    page = (outputs / "report.html").read_text()
    for mode, fingerprint in prints.items():
        assert fingerprint in card
        assert f"Teacher for {mode}" in page
        assert fingerprint in page
    rows = json.loads((outputs / "summary.json").read_text())["rows"]
    for row in rows:
        assert all(f"accuracy_{name}" in row for name in ("thinking", "non_thinking", "hard", "easy"))
    assert all(f"{kl}_{d}" in rows[-1] for kl in ("forward_kl", "reverse_kl") for d in ("hard", "easy"))

    shutil.move(folder / "final_policy_model", tmp_path / "final")
    resume = {**short, "training": {"resume": True}}
    with pytest.raises(UserError, match=r"checkpoint-3: the checkpoint was trained with teacher \w+ for thinking"):
        go(*addresses[::-1], stage="policy", **resume)
    with pytest.raises(UserError, match="for non_thinking"):
        go(addresses[0], addresses[0], stage="policy", **resume)
    shown = go(*addresses, stage="policy", **resume)
    assert "going on from" in shown
    assert "step 4/3" not in shown
    assert_same_weights(folder / "final_policy_model", tmp_path / "final", 0.0)


def test_the_test_stage_asks_both(addresses: tuple[str, str], tmp_path: Path) -> None:
    shown = io.StringIO()
    run(by_mode(tmp_path, *addresses), "test", None, Console(file=shown, width=220))
    text = shown.getvalue()
    for mode in Mode:
        assert re.search(rf"── score by teacher .*\({mode.value}\)", text)
        own = text.split(f"── {mode.value.replace('_', '-')} ")[1].split("── ")[0]
        assert re.search(rf"teacher .*\({mode.value}\) \(\d+ tokens", own)
        assert own.count(" tokens, ") == 2, "the student and this mode's teacher answer, and nobody else"
    assert "all models are loaded and fit together" in text
