"""The card of a model folder, and what is checked before a run that is to push its model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from student_trainer.config import Config
from student_trainer.errors import UserError
from student_trainer.model_card import check_push, model_card, on_hub, push
from tests.student_trainer.test_stages import Run, go  # noqa: F401


def about(stage: str = "policy", **sections: Any) -> dict[str, Any]:
    measured = {"accuracy_thinking": 0.936, "accuracy_non_thinking": 0.352, "forward_kl_thinking": 0.0633, "loss": 0.1}
    teacher = {"name": "Qwen/Qwen3-235B-A22B", "fingerprint": "f00d"}
    config = Config.model_validate(sections).model_dump(mode="json")
    return {"stage": stage, "step": 70, "teacher": teacher, "measured": measured, "config": config}


def front_of(card: str) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return front


def test_a_card_says_how_the_model_was_made_and_what_was_measured() -> None:
    card = model_card(about())
    assert front_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3-8B",
        "tags": ["distillation", "knowledge-distillation", "on-policy", "strong2weak"],
    }
    for line in (
        "# Qwen3-8B, taught by Qwen3-235B-A22B",
        "| teacher's fingerprint | `f00d` |",
        "| loss | `reverse_kl` |",
        "| over | `the teacher's top 64` |",
        "| temperature of the loss | `2.0` |",
        "| optimiser steps | `70` |",
        "| data | `train-00000-of-00001-cae87f8e074b4b5d.json` |",
        "| accuracy | 93.6% | 35.2% |",
        "| forward KL, nats a token | 0.0633 | – |",
    ):
        assert line in card.splitlines()
    first = model_card(about("non_policy", non_policy_distillation={"distribution": "full"}))
    assert "| weights | `0.7 of this, 0.3 of the cross-entropy` |" in first
    assert "| over | `the whole vocabulary` |" in first
    assert "off-policy" in front_of(first)["tags"]


def test_the_hub_reads_the_front_matter() -> None:
    data = ModelCard(model_card(about())).data
    assert data.base_model == "Qwen/Qwen3-8B"
    assert data.library_name == "transformers"


def test_names_cannot_break_the_card_and_folders_are_no_base_model(tmp_path: Path) -> None:
    values = about(models={"student_model": str(tmp_path)}, data={"data_path": "a|b`c\n---.json"})
    values["teacher"]["name"] = "x\n---\n<script>"
    card = model_card(values)
    assert "base_model" not in front_of(card)
    assert card.count("\n---\n") == 1
    assert not re.search(r"(?<![`\\])<script>(?!`)", card)
    assert "| data | `a\\|b'c ---.json` |" in card
    assert on_hub("Qwen/Qwen3-8B")
    for name in (str(tmp_path), "tiny_pair/student_base", "a/b/c", "../x", "./x", ""):
        assert not on_hub(name), name


def test_the_code_of_a_card_runs(go: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    go("policy", policy_distillation={"max_steps": 1})
    for name in ("best_policy_model", "final_policy_model"):
        folder = tmp_path / "outputs" / "policy_distillation" / name
        card = (folder / "README.md").read_text()
        assert "| optimiser steps | `1` |" in card
        assert "README.md" in json.loads((folder / "manifest.json").read_text())["files"]
    monkeypatch.chdir(folder)
    code = card.split("```python\n")[1].split("```")[0].replace("max_new_tokens=512", "max_new_tokens=4")
    exec(compile(code, "README.md", "exec"), {})


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in, and the hub is online as far as the settings go."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("nobody")
def test_a_run_that_cannot_push_is_refused_before_it_starts(go: Run, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match=r"training.push_to_hub: nobody is logged in .*hf auth login"):
        go(training={"push_to_hub": "me/model"})
    assert not (tmp_path / "outputs").exists()


@pytest.mark.usefixtures("nobody")
def test_bad_names_and_an_unreachable_hub_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name it as owner/name"):
        check_push("no name/at/all")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot push to me/model: .*null"):
        check_push("me/model")
    (tmp_path / "README.md").write_text("")
    with pytest.raises(UserError, match=rf"hf upload me/model {tmp_path} \."):
        push(tmp_path, "me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        check_push("me/model")
