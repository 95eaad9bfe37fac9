"""Who a stock server is, as far as it can be asked: model, engine, limits, tokenizer, width, and what it cannot tell.

A stock server has no fingerprint and names neither weights nor tokenizer. Its tokenizer is compared with the expected
one by what it does: fixed texts to ids, and every id of the vocabulary to text. Knows no connection: `Ask` makes the
calls.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protos import errors
from protos.scores import (
    GenerateRequest,
    Limits,
    Prompt,
    Sampling,
    ScoreRequest,
    ScoreSpec,
    Sequence,
    TeacherInfo,
    ids_array,
)
from student_trainer.teacher_client import openai_completions
from student_trainer.teacher_client.openai_dialects import Dialect
from student_trainer.teacher_client.openai_model import StockModel
from student_trainer.teacher_client.openai_scores import GIVEN, make_scores
from student_trainer.teacher_client.openai_sglang import Sglang
from student_trainer.teacher_client.openai_tokens import check_tokenizer
from student_trainer.teacher_client.openai_vllm import Vllm

Ask = Callable[[str, str, Any], Any]
"""(method, path, JSON body or None) -> the JSON of the answer; raises the error tree."""

TOP_MOST = 1024
"""Alternatives beyond which no server is asked what it accepts."""
REQUEST_TOKENS = 8192
"""Tokens of one call to score, at some 5 KB of JSON each with 64 alternatives; a longer sequence goes alone."""
SEQUENCES = 64
"""Sequences of one call."""
MISSING = (errors.Unsupported, errors.InvalidRequest, errors.TooLarge)
"""What a server answers where it lacks a route or a parameter."""


@dataclass(frozen=True)
class Profile:
    """A stock server as it was found: who it is, how it is spoken to, under which name, and what is not known.

    `said` is what it says of itself (see `describe`), by which a later look tells whether it is the same one.
    """

    info: TeacherInfo
    said: dict[str, Any]
    dialect: Dialect
    served: str
    unknown: tuple[str, ...]


def introduce(ask: Ask, model: StockModel, address: str) -> Profile:
    """Asks a server; TeacherMismatch where it is not `model`, Unsupported where it cannot score or name its tokens."""
    said = describe(ask, model, address)
    card, about = said["card"], said["about"]
    served, sglang = str(card["id"]), card.get("owned_by") == "sglang"
    check_tokenizer(ask, model, served, address)
    probe = ids_array(model.encode("1 + 1 = 2"))
    length = int(card.get("max_model_len") or 0)
    if length < 2 + len(probe):
        raise errors.Unsupported(f"{address} does not say how long a sequence may be (max_model_len of /v1/models)")
    width, unknown = _width(ask, served, about, model)
    dialect: Dialect = Sglang() if sglang else Vllm()

    def score(top_k: int) -> None:
        request = ScoreRequest((Sequence(probe),), ScoreSpec(top_k))
        path, body = dialect.score_call(request, served)
        ((own, ids, logprobs),) = dialect.read_scores(ask("POST", path, body), request)
        make_scores(own, ids, logprobs, request.spec, width)

    top_k = _largest(score, min(TOP_MOST, model.vocab_size), address)
    can_generate, dialect, why = _generation(ask, dialect, served, model, address)
    unknown += [why] if why else []
    identity = [served, card.get("root"), about, model.tokenizer_hash, width]
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    engine = f"{about['engine']} {about.get('version', '')}".strip()
    info = TeacherInfo(
        name=served,
        fingerprint=f"stock-{digest}",
        tokenizer_hash=model.tokenizer_hash,
        template_hash=model.template_hash,
        vocab_size=model.vocab_size,
        normalized_size=width,
        eos_token_ids=model.eos_token_ids,
        limits=Limits(length - 1, top_k, 0, REQUEST_TOKENS, SEQUENCES, 1),
        modes=model.modes,
        fields=GIVEN,
        can_generate=can_generate,
        engine=f"stock {engine} server through its OpenAI interface",
        dtype="dtype not told",
        quantization="",
    )
    return Profile(info, said, dialect, served, (*_always(model, served), *unknown))


def describe(ask: Ask, model: StockModel, address: str) -> dict[str, Any]:
    """What the server says of itself: `card`, the model's entry of /v1/models, and `about`, engine and release."""
    card = _card(ask, model, address)
    named = {key: card.get(key) for key in ("id", "root", "owned_by", "max_model_len")}
    return {"card": named, "about": _about(ask, card.get("owned_by") == "sglang")}


def _always(model: StockModel, served: str) -> list[str]:
    ends = ", ".join(map(str, model.eos_token_ids))
    return [
        f"its weights, dtype and quantisation: the fingerprint stands for the name {served!r}, its path and the "
        "engine's release, so other weights behind these are not noticed; serve them under another name",
        f"its end ids and its chat template: prompts are rendered by the student's, and its end ids ({ends}) go along "
        "as stop ids",
    ]


def _card(ask: Ask, model: StockModel, address: str) -> dict[str, Any]:
    """What /v1/models says of the wanted model, or of the only one."""
    answer = ask("GET", "/v1/models", None)
    cards = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and card.get("id") for card in cards):
        raise errors.Unavailable(f"{address} is no OpenAI server: /v1/models lists no models")
    names = ", ".join(str(card["id"]) for card in cards) or "none"
    if model.served:
        chosen = [card for card in cards if card["id"] == model.served]
        if not chosen:
            raise errors.TeacherMismatch(f"{address} serves {names}, not {model.served}")
        return dict(chosen[0])
    if len(cards) != 1:
        raise errors.TeacherMismatch(f"{address} serves {names}; name the one that is the teacher (teacher.model)")
    return dict(cards[0])


def _about(ask: Ask, sglang: bool) -> dict[str, Any]:
    """Engine and release, and for SGLang the version of the weights; what a server does not tell is left out."""
    if not sglang:
        version = _optional(ask, "/version").get("version")
        return {"engine": "vLLM", "version": str(version)} if version else {"engine": "OpenAI"}
    server, model = _optional(ask, "/server_info"), _optional(ask, "/model_info")
    named = {"version": server.get("version"), "weights": model.get("weight_version"), "path": model.get("model_path")}
    told = {key: str(value) for key, value in named.items() if value}
    return {"engine": "SGLang", **told}


def _optional(ask: Ask, path: str) -> dict[str, Any]:
    """The answer of a route that a server may lack."""
    try:
        answer = ask("GET", path, None)
    except (*MISSING, errors.TeacherMismatch, errors.PermissionDenied, errors.Unauthenticated):
        return {}
    return answer if isinstance(answer, dict) else {}


def _width(ask: Ask, served: str, about: dict[str, Any], model: StockModel) -> tuple[int, list[str]]:
    """The number of logits that the server normalises over, and what is to be said where it is taken to be so.

    vLLM refuses a bias on an id that has no logit, and says how many it has. Others might compute with it.
    """
    if model.normalized_size is not None:
        return model.normalized_size, []
    if about["engine"] == "vLLM":
        bias = {str(2**31 - 1): 0.0}
        body = {"model": served, "prompt": model.encode("1"), "max_tokens": 1, "logit_bias": bias}
        try:
            ask("POST", "/v1/completions", body)
        except MISSING as error:
            found = re.search(r"vocabulary size: (\d+)", error.message, re.IGNORECASE)
            if found:
                return int(found[1]), []
    return model.logits_width, [
        f"the number of logits that it normalises over: taken to be the student's {model.logits_width}; set "
        "teacher.normalized_size where its config.json has another vocab_size"
    ]


def _largest(score: Callable[[int], None], most: int, address: str) -> int:
    """The most alternatives that the server accepts, at most `most`."""

    def refusal(top_k: int) -> errors.TeacherError | None:
        try:
            score(top_k)
        except MISSING as error:
            return error
        return None

    error = refusal(most)
    if error is None:
        return most
    named = re.search(r"max allowed: (\d+)", error.message)
    if named and 0 < int(named[1]) < most and refusal(int(named[1])) is None:
        return int(named[1])
    error = refusal(1)
    if error is not None:
        raise errors.Unsupported(f"{address} gives no log-probabilities of prompts: {error.message}")
    low = 1
    while most - low > 1:
        middle = (low + most) // 2
        low, most = (low, middle) if refusal(middle) else (middle, most)
    return low


def _generation(ask: Ask, dialect: Dialect, served: str, model: StockModel, address: str) -> tuple[bool, Dialect, str]:
    """Whether the server gives the ids of what it generates, how it is asked for them, and else why it does not."""
    prompt = Prompt(token_ids=ids_array(model.encode("1")))
    wish = openai_completions.ask_of(
        GenerateRequest((prompt,), Sampling(1, ignore_eos=True), logprobs=True), model, address
    )
    refused: errors.TeacherError | None = None
    for way in [dialect, Vllm(names_ids=True)] if isinstance(dialect, Vllm) else [dialect]:
        try:
            path, body = way.generate_call(wish, served)
            openai_completions.deltas(wish, way.read_completions(ask("POST", path, body), wish))
        except MISSING as error:
            refused = refused or error
        else:
            return True, way, ""
    assert refused is not None
    return False, dialect, f"the ids of what it generates, so it only scores: {refused.message}"
