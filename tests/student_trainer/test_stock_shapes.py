"""What stock servers answer becomes scores, completions and errors: of vLLM's and SGLang's shapes, without a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from protos import errors
from protos.scores import TAIL_FLOOR, Field, GenerateRequest, Mode, Prompt, Sampling, ScoreRequest, ScoreSpec, Sequence
from student_trainer.teacher_client.openai_channel import OpenAiTransport
from student_trainer.teacher_client.openai_completions import ask_of, deltas
from student_trainer.teacher_client.openai_errors import stock_error
from student_trainer.teacher_client.openai_handshake import introduce
from student_trainer.teacher_client.openai_model import StockModel
from student_trainer.teacher_client.openai_scores import TAIL_RESOLUTION, make_scores, table, tail_logprob
from student_trainer.teacher_client.openai_sglang import Sglang
from student_trainer.teacher_client.openai_vllm import Vllm

MODEL = StockModel(
    vocab_size=256,
    logits_width=320,
    eos_token_ids=(7,),
    tokenizer_hash="t",
    template_hash="c",
    modes=tuple(Mode),
    encode=lambda text: list(text.encode()),
    decode=lambda ids, plain: bytes(ids).decode("latin-1"),
)


def row(**logprobs: float) -> dict[str, Any]:
    """vLLM's entry of a position: ids (named t5) and their log-probabilities, the token itself first."""
    return {name[1:]: {"logprob": value, "rank": None, "decoded_token": "x"} for name, value in logprobs.items()}


def test_a_token_outside_the_top_is_scored_and_is_no_alternative() -> None:
    rows = [row(t9=-7.0, t4=-0.5, t5=-2.0), row(t5=-2.0, t4=-0.5)]
    own, ids, logprobs = table(rows, np.array([9, 5], np.int32), 2)
    assert own.tolist() == [-7.0, -2.0]
    assert ids.tolist() == [[4, 5], [4, 5]]
    assert logprobs.tolist() == [[-0.5, -2.0], [-0.5, -2.0]]


def test_without_alternatives_the_token_alone_is_scored() -> None:
    own, ids, logprobs = table([row(t9=-7.0)], np.array([9], np.int32), 0)
    assert (own.tolist(), ids.shape, logprobs.shape) == ([-7.0], (1, 0), (1, 0))


def test_rows_of_another_size_or_without_their_token_are_refused() -> None:
    with pytest.raises(errors.TeacherFailed, match="gave 1 alternatives where 2 were asked for"):
        table([row(t9=-7.0)], np.array([9], np.int32), 2)
    with pytest.raises(errors.TeacherFailed, match="left out the log-probability of a token"):
        table([row(t4=-0.5, t5=-2.0)], np.array([9], np.int32), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharpness", [0.5, 4.0, 8.0, 16.0])
def test_the_tail_of_a_real_vocabulary_is_known_to_its_resolution(sharpness: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(8, 151_936) * sharpness).to(dtype)
    logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
    top = logprobs.topk(64)
    exact = torch.log_softmax(logits.double(), -1).exp().scatter(1, top.indices, 0.0).sum(1).numpy()
    found = np.exp(tail_logprob(top.values.numpy(), 151_936), dtype=np.float64)
    assert (abs(found - exact) <= TAIL_RESOLUTION + 1e-3 * exact).all()


def test_a_tail_that_rounding_hides_counts_as_the_resolution_and_a_whole_top_has_none() -> None:
    certain = np.array([[-1e-9, -30.0]], np.float32)
    assert tail_logprob(certain, 320)[0] == pytest.approx(np.log(TAIL_RESOLUTION))
    assert tail_logprob(certain, 2)[0] == TAIL_FLOOR


def test_a_hidden_tail_moves_the_forward_kl_by_a_ten_thousandth_of_a_nat_at_most() -> None:
    student = np.exp(np.linspace(-30, -0.01, 400))
    for exact in (1e-13, 1e-9, TAIL_RESOLUTION):
        taken = TAIL_RESOLUTION
        moved = taken * (np.log(taken) - np.log(student)) - exact * (np.log(exact) - np.log(student))
        assert abs(moved).max() < 1e-4


@pytest.mark.parametrize(
    ("own", "top"), [(-1.0, [0.3, -2.0]), (-9999.0, [-0.1, -3.0]), (float("nan"), [-1.0, -2.0]), (-1.0, [-0.1, -0.2])]
)
def test_numbers_that_are_no_log_probabilities_are_refused(own: float, top: list[float]) -> None:
    arrays = np.array([own], np.float32), np.array([[1, 2]], np.int32), np.array([top], np.float32)
    with pytest.raises(errors.TeacherFailed):
        make_scores(*arrays, ScoreSpec(2), 320)


def test_only_wanted_fields_come() -> None:
    arrays = np.array([-1.0], np.float32), np.array([[1]], np.int32), np.array([[-1.0]], np.float32)
    spec = ScoreSpec(1, want=frozenset({Field.TAIL_LOGPROB}))
    assert set(make_scores(*arrays, spec, 320).arrays()) == {"tail_logprob"}


ERRORS: list[tuple[int, Any, type[errors.TeacherError], str]] = [
    (400, {"error": {"message": "This model's maximum context length is 512 tokens."}}, errors.TooLarge, "512"),
    (400, {"error": {"message": "max_tokens=9 cannot be greater than max_model_len=8."}}, errors.TooLarge, "=8"),
    (400, {"error": {"message": "top_p must be in (0, 1], got 2."}}, errors.InvalidRequest, "top_p"),
    (400, {"object": "error", "message": "no such thing", "code": 400}, errors.InvalidRequest, "no such thing"),
    (404, {"error": {"message": "The model `x` does not exist."}}, errors.TeacherMismatch, "`x`"),
    (404, {"detail": "Not Found"}, errors.Unsupported, "Not Found"),
    (401, {"error": "Unauthorized"}, errors.Unauthenticated, "Unauthorized"),
    (403, {"error": "no"}, errors.PermissionDenied, "no"),
    (408, "slow", errors.DeadlineExceeded, "slow"),
    (422, {"detail": [{"msg": "wrong"}]}, errors.InvalidRequest, "wrong"),
    (429, {"error": {"message": "busy"}}, errors.Overloaded, "busy"),
    (500, {"error": {"message": "boom"}}, errors.TeacherFailed, "boom"),
    (500, {"error": {"message": "EngineCore encountered an issue"}}, errors.Unavailable, "EngineCore"),
    (502, "<html>bad gateway</html>", errors.Unavailable, "bad gateway"),
    (503, "", errors.Unavailable, "HTTP status 503"),
]


@pytest.mark.parametrize(("status", "body", "kind", "text"), ERRORS)
def test_a_stock_servers_error_is_one_of_the_tree(
    status: int, body: Any, kind: type[errors.TeacherError], text: str
) -> None:
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    error = stock_error(status, httpx.Headers({"retry-after": "3"}), raw)
    assert type(error) is kind
    assert text in error.message
    assert error.retry_after_s == 3.0


def sglang_answer(sequence: Sequence, top_k: int) -> dict[str, Any]:
    """SGLang's answer to /generate: a null entry before the scored positions, [log-probability, id, text] after it."""
    ids = sequence.token_ids[sequence.score_start - 1 :].tolist()
    return {
        "text": "",
        "output_ids": [],
        "meta_info": {
            "input_token_logprobs": [
                [None, ids[0], None],
                *([-0.5 - i, t, None] for i, t in enumerate(ids[1:])),
            ],
            "input_top_logprobs": [None, *([[-1.0 - k, 40 + k, None] for k in range(top_k)] for _ in ids[1:])],
            "finish_reason": {"type": "length", "length": 0},
        },
    }


def test_sglang_is_asked_from_one_position_earlier_and_its_null_row_is_left_out() -> None:
    request = ScoreRequest((Sequence([5, 6, 7, 8], 2), Sequence([1, 2])), ScoreSpec(3))
    path, body = Sglang().score_call(request, "m")
    assert (path, body["logprob_start_len"], body["top_logprobs_num"]) == ("/generate", [1, 0], [3, 3])
    answer = [sglang_answer(sequence, 3) for sequence in request.sequences]
    (own, ids, logprobs), other = Sglang().read_scores(answer, request)
    assert own.tolist() == [-0.5, -1.5]
    assert ids.tolist() == [[40, 41, 42]] * 2
    assert logprobs.tolist() == [[-1.0, -2.0, -3.0]] * 2
    assert other[0].tolist() == [-0.5]
    with pytest.raises(errors.TeacherFailed, match="scored other tokens"):
        Sglang().read_scores(answer[1:], ScoreRequest((Sequence([9, 9]),), ScoreSpec(3)))


def test_sglangs_samples_are_prompts_of_their_own_with_seeds_of_their_own() -> None:
    request = GenerateRequest((Prompt(token_ids=[1]), Prompt(token_ids=[2])), Sampling(4, seed=5), n=2, logprobs=True)
    ask = ask_of(request, MODEL, "a")
    _, body = Sglang().generate_call(ask, "m")
    assert body["input_ids"] == [[1], [1], [2], [2]]
    assert [chosen["sampling_seed"] for chosen in body["sampling_params"]] == [5, 6, 5, 6]
    stop = {"type": "stop", "matched": 7}
    meta = {"finish_reason": stop, "output_token_logprobs": [[-0.1, 65, None], [-0.2, 7, None]]}
    answer = [{"text": "A", "output_ids": [65, 7], "meta_info": meta}] * 4
    pieces = deltas(ask, Sglang().read_completions(answer, ask))
    assert [(p.prompt_index, p.sample_index) for p in pieces] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert pieces[0].token_ids.tolist() == [65, 7]
    assert pieces[0].logprobs is not None
    assert pieces[0].logprobs.tolist() == pytest.approx([-0.1, -0.2])


def test_a_completion_that_ends_otherwise_than_the_students_is_refused() -> None:
    ask = ask_of(GenerateRequest((Prompt(token_ids=[1]),), Sampling(4)), MODEL, "a")
    choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": [65, 9]}
    with pytest.raises(errors.TeacherMismatch, match=r"token id 9, the student's completions end with \[7\]"):
        deltas(ask, Vllm().read_completions({"choices": [choice]}, ask))
    aborted = choice | {"finish_reason": "abort"}
    with pytest.raises(errors.TeacherFailed, match="'abort'"):
        deltas(ask, Vllm().read_completions({"choices": [aborted]}, ask))
    with pytest.raises(errors.Unsupported, match="gives no token ids"):
        Vllm().read_completions({"choices": [{"index": 0, "text": "A", "finish_reason": "stop"}]}, ask)


def test_greedy_samples_are_asked_for_once() -> None:
    ask = ask_of(GenerateRequest((Prompt(token_ids=[1]),), Sampling(4, temperature=0), n=3), MODEL, "a")
    assert Vllm().generate_call(ask, "m")[1]["n"] == 1
    choice = {"index": 0, "text": "A", "finish_reason": "length", "token_ids": [65]}
    pieces = deltas(ask, Vllm().read_completions({"choices": [choice]}, ask))
    assert [(p.sample_index, p.token_ids.tolist()) for p in pieces] == [(0, [65]), (1, [65]), (2, [65])]


def sglang(method: str, path: str, body: Any) -> Any:
    """A SGLang server as its source (0.5.23) answers; its routes that say who it is, and the model of MODEL."""
    match path:
        case "/v1/models":
            return {"data": [{"id": "m", "owned_by": "sglang", "root": "m", "max_model_len": 64}]}
        case "/server_info":
            return {"version": "0.5.23"}
        case "/model_info":
            return {"model_path": "/models/m", "weight_version": "default"}
        case "/tokenize":
            return {"tokens": MODEL.encode(body["prompt"]), "count": 0, "max_model_len": 64}
        case "/detokenize":
            return {"text": MODEL.decode(body["tokens"], True)}
        case "/generate" if body["return_logprob"] and "logprob_start_len" in body:
            sequences = [Sequence(ids) for ids in body["input_ids"]]
            answer = [sglang_answer(s, k) for s, k in zip(sequences, body["top_logprobs_num"], strict=True)]
            for one in answer:
                rows = one["meta_info"]["input_top_logprobs"][1:]
                one["meta_info"]["input_top_logprobs"][1:] = [[[e[0] - 1, *e[1:]] for e in r] for r in rows]
            return answer
        case "/generate":
            meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-0.1, 65, None]]}
            return [{"text": "A", "output_ids": [65], "meta_info": meta}]
    raise errors.Unsupported(path)


def test_a_sglang_server_of_documented_shape_is_introduced() -> None:
    profile = introduce(sglang, MODEL, "http://t")
    info = profile.info
    assert (info.engine, info.limits.sequence_tokens) == ("stock SGLang 0.5.23 server through its OpenAI interface", 63)
    assert (info.limits.top_k, info.normalized_size, info.can_generate) == (256, 320, True)
    assert any("taken to be the student's 320" in line for line in profile.unknown)


Answer = Callable[[str, str, Any], Any]


def changed(**answers: Any) -> Answer:
    """The same server with other answers to some paths, / written as _."""
    given = {name.replace("_", "/"): answer for name, answer in answers.items()}
    return lambda method, path, body: given[path] if path in given else sglang(method, path, body)


def test_the_fingerprint_is_another_one_with_another_name_or_release() -> None:
    def card(**other: str) -> Any:
        return {"data": [{"id": "m", "owned_by": "sglang", "root": "m", "max_model_len": 64} | other]}

    seen = {introduce(sglang, MODEL, "http://t").info.fingerprint}
    for other in (card(id="n"), card(root="n")):
        seen.add(introduce(changed(_v1_models=other), MODEL, "http://t").info.fingerprint)
    assert len(seen) == 3
    assert introduce(sglang, MODEL, "http://elsewhere").info.fingerprint in seen


def test_one_of_several_models_has_to_be_named() -> None:
    cards = {"data": [{"id": "a", "owned_by": "sglang"}, {"id": "b", "owned_by": "sglang"}]}
    with pytest.raises(errors.TeacherMismatch, match=r"serves a, b; name the one that is the teacher"):
        introduce(changed(_v1_models=cards), MODEL, "http://t")
    with pytest.raises(errors.Unavailable, match="no OpenAI server"):
        introduce(changed(_v1_models={"hello": 1}), MODEL, "http://t")


def test_a_server_without_tokenize_is_refused() -> None:
    def ask(method: str, path: str, body: Any) -> Any:
        if path == "/tokenize":
            raise errors.Unsupported("Not Found")
        return sglang(method, path, body)

    with pytest.raises(errors.Unsupported, match="has no /tokenize, so that its tokenizer cannot be compared"):
        introduce(ask, MODEL, "http://t")


def test_an_address_that_nobody_answers_is_unavailable() -> None:
    transport = OpenAiTransport("http://127.0.0.1:9/v1", MODEL)
    with pytest.raises(errors.Unavailable, match="no teacher answers at"):
        transport.teacher(1.0)
    transport.close()
