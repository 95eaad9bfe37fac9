"""The README.md of a model folder, from what its training_config.json says; and pushing a folder to the model hub.

The front matter is the hub's (https://huggingface.co/docs/hub/model-cards#model-card-metadata). Values go into it
as YAML and into the text as code, so a name cannot break either. Knows no training.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, one_line
from .teachers import Scope, taught_by

log = logging.getLogger(__name__)

KEY = "training.push_to_hub"
NOT_PUSHED = ["training_args.bin", "manifest.json"]
"""A pickle that the hub warns of, and what only this program reads."""

_REPO = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
_MEASURED = (
    ("accuracy", "accuracy", "{:.1%}"),
    ("finished", "answers that ended by themselves", "{:.1%}"),
    ("completion_tokens", "tokens of an answer", "{:.1f}"),
    ("forward_kl", "forward KL, nats a token", "{:.4f}"),
    ("reverse_kl", "reverse KL, nats a token", "{:.4f}"),
)


def model_card(about: Mapping[str, Any]) -> str:
    """The card of a model folder; `about` is its training_config.json."""
    config, teachers, measured = about["config"], taught_by(about), about["measured"]
    policy = about["stage"] == "policy"
    student = config["models"]["student_model"]
    taught = " and ".join(dict.fromkeys(_plain(_last(name)) for _, name, _ in teachers))
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if on_hub(student):
        front["base_model"] = student
    front["tags"] = ["distillation", "knowledge-distillation", "on-policy" if policy else "off-policy", "strong2weak"]
    made = {
        "student": student,
        **_teachers(teachers),
        "stage": "2, on-policy: on the student's own answers" if policy else "1, off-policy: on the teacher's answers",
        "data": Path(config["data"]["data_path"]).name,
        "optimiser steps": about["step"],
        **_loss(config, policy),
    }
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            "",
            f"# {_plain(_last(student))}, taught by {taught}",
            "",
            "Distilled with strong2weak. All settings are in `training_config.json`.",
            "",
            "| made with | |",
            "| --- | --- |",
            *(f"| {_plain(name)} | {_code(value)} |" for name, value in made.items()),
            "",
            *_measured(measured),
            "## Loading",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # this folder, or the name of this repository',
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            'messages = [{"role": "user", "content": "What is 37 + 58?"}]',
            "inputs = tokenizer.apply_chat_template(  # enable_thinking=False for an answer at once",
            '    messages, add_generation_prompt=True, enable_thinking=True, return_dict=True, return_tensors="pt"',
            ")",
            "answer = model.generate(**inputs, max_new_tokens=512)",
            'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
            "```",
            "",
        ]
    )


def on_hub(name: str) -> bool:
    """Whether `name` is that of a hub repository rather than a folder's."""
    return _REPO.fullmatch(name) is not None and not Path(name).exists()


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", one_line(text))


def _code(value: Any) -> str:
    text = one_line(str(value)).replace("|", "\\|").replace("`", "'")
    return f"`{text}`"


def _teachers(teachers: Sequence[tuple[Scope, str, str]]) -> dict[str, str]:
    rows: dict[str, str] = {}
    for scope, name, fingerprint in teachers:
        which = f"teacher for {scope}" if len(teachers) > 1 else "teacher"
        rows |= {which: name, f"{which}, fingerprint" if len(teachers) > 1 else "teacher's fingerprint": fingerprint}
    return rows


def _loss(config: Mapping[str, Any], policy: bool) -> dict[str, Any]:
    options = config["policy_distillation" if policy else "non_policy_distillation"]
    full = options["distribution"] == "full"
    support = "the whole vocabulary" if full else f"the {options.get('support', 'teacher')}'s top {options['top_k']}"
    loss = {"loss": options["loss"], "over": support, "temperature of the loss": options["temperature"]}
    if policy:
        drawn = options["sampling_temperature"] or options["temperature"]
        share = options.get("lambda", 1.0)
        mixed = {} if share == 1 else {"share of the student's own answers, lambda": share}
        return {**loss, **mixed, "temperature of the answers": drawn, "share of thinking": options["thinking_prob"]}
    weights = f"{options['alpha']} of this, {options['beta']} of the cross-entropy"
    return {**loss, "weights": weights, "temperature of the answers": options["response_temperature"]}


def _measured(measured: Mapping[str, float]) -> list[str]:
    rows = []
    for name, label, form in _MEASURED:
        values = [measured.get(f"{name}_{mode}") for mode in ("thinking", "non_thinking")]
        if any(v is not None for v in values):
            rows.append(f"| {label} | {' | '.join('–' if v is None else form.format(v) for v in values)} |")
    if not rows:
        return []
    heads = [
        "## Measured",
        "",
        "On held-out problems; divergences from the teacher at temperature 1, on its answers.",
        "",
    ]
    return [*heads, "| | thinking | non-thinking |", "| --- | --: | --: |", *rows, ""]


def check_push(repo: str) -> None:
    """Makes sure that a model can be pushed to `repo`, before there is one: a UserError where it cannot.

    The repository is made, private, where it is not there yet.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # httpx or httpx2, as the hub uses

    if not _REPO.fullmatch(repo):
        raise UserError(f"{repo!r} is no name of a repository", KEY, "name it as owner/name")
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed", KEY, "unset it, or set this to null")
    if get_token() is None:
        step = "run `hf auth login`, set HF_TOKEN, or set this to null"
        raise UserError("nobody is logged in to the model hub", KEY, step)
    try:
        HfApi().create_repo(repo, private=True, exist_ok=True)
        HfApi().auth_check(repo, write=True)
    except (HTTPError, OSError) as error:
        step = "check the name, the token's right to write and the network, or set this to null"
        raise UserError(f"cannot push to {repo}: {one_line(str(error), 240)}", KEY, step) from error


def push(folder: Path, repo: str) -> None:
    """Pushes a model folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # httpx or httpx2, as the hub uses

    try:
        HfApi().upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"Push {folder.name}", ignore_patterns=NOT_PUSHED
        )
    except (HTTPError, OSError) as error:
        step = f"the model is whole in {folder}; push it with: hf upload {repo} {folder} ."
        raise UserError(f"pushing to {repo} failed: {one_line(str(error), 240)}", KEY, step) from error
    log.info("pushed %s to %s", folder, repo)
