"""Checks the YAML and JSON of examples: settings against the configuration models, calls against the bodies that the
teacher takes, rows of data against the trainer's reader, composed files against Compose's own keys.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

COMPOSE = {"services", "volumes", "networks", "secrets", "configs", "name", "include"}


def _bodies() -> dict[str, type[BaseModel]]:
    from teacher_server.transports import openai_schemas, openai_tokens, schemas

    return {
        "/v1/score": schemas.ScoreBody,
        "/v1/generate": schemas.GenerateBody,
        "/v1/completions": openai_schemas.CompletionBody,
        "/v1/chat/completions": openai_schemas.ChatBody,
        "/tokenize": openai_tokens.TokenizeBody,
        "/detokenize": openai_tokens.DetokenizeBody,
    }


def check_body(path: str, text: str) -> str:
    """What is wrong with a JSON body for one of the teacher's routes; empty where nothing is."""
    try:
        json.loads(text)
    except ValueError as error:
        return f"the body for {path} is not JSON: {error}"
    body = _bodies().get(path)
    if body is None:
        return ""
    try:
        body.model_validate_json(text)
    except ValidationError as error:
        return f"the body for {path}: {error}"
    return ""


def check_yaml(text: str) -> str:
    """What is wrong with a YAML example: settings of the trainer, of the server, or a part of a Compose file."""
    from student_trainer.config import Config
    from student_trainer.errors import UserError
    from student_trainer.settings import load_config

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return f"not YAML: {error}"
    if not isinstance(found, dict):
        return f"YAML of a {type(found).__name__}, no keys and values"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "example.yaml"
        file.write_text(text, encoding="utf-8")
        if set(found) <= set(Config.model_fields):
            try:
                load_config(file, [], {})
            except UserError as error:
                return str(error)
            return ""
        if set(found) <= COMPOSE:
            return ""
        return _server_settings(file, found)


def _server_settings(file: Path, found: dict[str, Any]) -> str:
    from teacher_server.settings import ConfigError, load

    model = [] if "model" in found else ["--model", "MODEL"]
    try:
        load(["--config", str(file), *model], {})
    except ConfigError as error:
        return f"neither settings of the trainer nor of the server: {error}"
    return ""


def check_json(text: str) -> str:
    """What is wrong with a JSON example: a call's body, or rows of data (one object, a list, or one on each line)."""
    from student_trainer.errors import UserError

    try:
        lines = [json.loads(text)]
    except ValueError:
        try:
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            return f"neither JSON nor JSON lines: {error}"
    if len(lines) == 1 and any(_accepts(body, text) for body in _bodies().values()):
        return ""
    rows = lines[0] if len(lines) == 1 and isinstance(lines[0], list) else lines
    try:
        _read(rows)
    except UserError as error:
        return f"no body of a call, and no rows of data: {error}"
    return ""


def _accepts(body: type[BaseModel], text: str) -> bool:
    try:
        body.model_validate_json(text)
    except ValidationError:
        return False
    return True


def _read(rows: list[Any]) -> None:
    from student_trainer.data import read_examples

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        file.write_text(json.dumps(rows), encoding="utf-8")
        read_examples(file)
