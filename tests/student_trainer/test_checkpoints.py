"""Folders of models: whole or not there, never overwritten, found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from student_trainer.checkpoints import (
    Layout,
    fault,
    is_finished,
    off_policy_layout,
    on_policy_layout,
    prepare,
    put,
    read_about,
    rotate,
    write_about,
)
from student_trainer.errors import UserError
from student_trainer.manifest import NAME, damage, seal
from student_trainer.storage import keep_aside, recover_folder, write_json


def make_checkpoint(layout: Layout, step: int, complete: bool = True) -> Path:
    folder = layout.checkpoint_folder(step)
    folder.mkdir(parents=True)
    write_about(folder, {"stage": layout.stage, "step": step})
    (folder / "trainer_state.json").write_text("{}")
    if complete:
        seal(folder)
    return folder


def test_the_folders_are_those_of_the_documents() -> None:
    first, second = off_policy_layout("out"), on_policy_layout("out")
    assert str(first.best_model) == "out/non_policy_distillation/best_model"
    assert str(first.final_model) == "out/non_policy_distillation/final_model"
    assert str(first.checkpoint_folder(1000)) == "out/non_policy_distillation/checkpoint-1000"
    assert str(second.best_model) == "out/policy_distillation/best_policy_model"
    assert str(second.final_model) == "out/policy_distillation/final_policy_model"
    assert str(second.checkpoint_folder(7)) == "out/policy_distillation/policy_checkpoint-7"


def test_a_fresh_run_keeps_what_an_earlier_one_left(tmp_path: Path) -> None:
    layout = off_policy_layout(str(tmp_path))
    for number in (1, 2):
        make_checkpoint(layout, 10 * number)
        checkpoint, aside = prepare(layout, False)
        assert checkpoint is None
        assert aside == tmp_path / f"non_policy_distillation.{number}"
        assert (aside / f"checkpoint-{10 * number}").is_dir()
    assert prepare(layout, False) == (None, None)


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_names_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = on_policy_layout(str(tmp_path))
    assert prepare(layout, True) == (None, None)
    make_checkpoint(layout, 9)
    newest = make_checkpoint(layout, 10)
    unsealed = make_checkpoint(layout, 11, complete=False)
    cut, changed = make_checkpoint(layout, 12), make_checkpoint(layout, 13)
    (cut / "trainer_state.json").write_text("")
    (changed / "trainer_state.json").write_text("[]")
    layout.staging.mkdir()
    assert prepare(layout, True) == (newest, None)
    assert not layout.staging.exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"passing over {changed}: the contents of trainer_state.json are not those that were written (SHA-256 differs)",
        f"passing over {cut}: trainer_state.json has 0 bytes instead of 2",
        f"passing over {unsealed}: it has no manifest.json, so it was not written to its end",
    ]
    assert all(folder.is_dir() for folder in (unsealed, cut, changed))


def test_damage_of_every_kind_is_found(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights").write_bytes(b"1234")
    assert "no manifest.json" in (damage(tmp_path) or "")
    seal(tmp_path)
    assert damage(tmp_path) is None
    assert json.loads((tmp_path / NAME).read_text())["files"]["part/weights"]["bytes"] == 4
    (tmp_path / "later").write_text("added by somebody")
    assert damage(tmp_path) is None
    (tmp_path / "part" / "weights").write_bytes(b"1239")
    assert "part/weights" in (damage(tmp_path) or "")
    assert damage(tmp_path, contents=False) is None
    (tmp_path / "part" / "weights").write_bytes(b"12345")
    assert damage(tmp_path, contents=False) == "part/weights has 5 bytes instead of 4"
    (tmp_path / "part" / "weights").unlink()
    assert damage(tmp_path) == "part/weights is missing"
    for broken in ("", "[]", '{"files": 3}', '{"files": {"a": {}}}'):
        (tmp_path / NAME).write_text(broken)
        assert "cannot be read" in (damage(tmp_path) or "")


def test_a_named_checkpoint_belongs_to_its_stage(tmp_path: Path) -> None:
    first, second = off_policy_layout(str(tmp_path)), on_policy_layout(str(tmp_path))
    folder = make_checkpoint(second, 5)
    assert prepare(second, str(folder))[0] == folder
    assert prepare(first, str(folder))[0] is None
    with pytest.raises(UserError, match="no such checkpoint"):
        prepare(first, str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="pretrained_student"):
        prepare(second, str(make_checkpoint(second, 6, complete=False)))


def test_rotation_never_removes_the_newest_whole_checkpoint_nor_a_damaged_one(tmp_path: Path) -> None:
    layout = off_policy_layout(str(tmp_path))
    for step in (2, 100, 30):
        make_checkpoint(layout, step)
    make_checkpoint(layout, 200, complete=False)
    newest = layout.checkpoint_folder(100)

    def left() -> list[int]:
        return [step for step, _ in layout.checkpoints()]

    rotate(layout, None, newest)
    assert left() == [2, 30, 100, 200]
    rotate(layout, 2, newest)
    assert left() == [30, 100, 200]
    rotate(layout, 0, newest)
    assert left() == [100, 200]
    assert layout.newest_whole() == newest


def test_rotation_keeps_what_was_just_written_beside_later_steps_of_an_earlier_run(tmp_path: Path) -> None:
    layout = off_policy_layout(str(tmp_path))
    for step in (4, 98, 100):
        make_checkpoint(layout, step)
    rotate(layout, 2, layout.checkpoint_folder(4))
    assert [step for step, _ in layout.checkpoints()] == [4, 100]


def test_a_stage_is_finished_once_its_final_model_is_there(tmp_path: Path) -> None:
    layout = off_policy_layout(str(tmp_path))
    assert not is_finished(layout, True)
    layout.final_model.mkdir(parents=True)
    assert not is_finished(layout, True)
    write_about(layout.final_model, {"step": 3})
    assert not is_finished(layout, True), "it has no manifest"
    seal(layout.final_model)
    assert is_finished(layout, True)
    assert not is_finished(layout, False)
    assert read_about(layout.final_model) == {"step": 3}
    assert read_about(tmp_path) == {}


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "model"
    for folder, text in ((new, "new"), (old, "old")):
        folder.mkdir()
        (folder / "weights").write_text(text)
    put(new, old)
    assert (old / "weights").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert damage(old) is None
    assert fault(old) == "trainer_state.json is missing"


def test_a_replacement_that_a_crash_cut_short_is_undone(tmp_path: Path) -> None:
    model, old = tmp_path / "model", tmp_path / ".model.old"
    old.mkdir()
    (old / "weights").write_text("old")
    recover_folder(model)
    assert (model / "weights").read_text() == "old"
    old.mkdir()
    recover_folder(model)
    assert (model / "weights").read_text() == "old"
    assert not old.exists()


@pytest.mark.parametrize("resume", [True, "named"])
def test_every_replacement_below_a_stage_is_undone_where_a_run_goes_on(tmp_path: Path, resume: bool | str) -> None:
    layout = off_policy_layout(str(tmp_path))
    folder = make_checkpoint(layout, 4)
    for path in (folder, layout.best_model):
        path.mkdir(exist_ok=True)
        path.rename(path.with_name(f".{path.name}.old"))
    assert prepare(layout, str(folder) if resume == "named" else True)[0] == folder
    assert layout.best_model.is_dir()


def test_an_empty_or_missing_folder_is_not_kept_aside(tmp_path: Path) -> None:
    assert keep_aside(tmp_path / "nothing") is None
    (tmp_path / "empty").mkdir()
    assert keep_aside(tmp_path / "empty") is None


def test_json_is_written_in_one_step(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
