"""The OpenAI-shaped routes say what Score and Generate say, in OpenAI's and vLLM's shapes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.servers import Server

CHAT = {"messages": [{"role": "user", "content": "1+1?"}]}


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    """A call's answer."""
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def scores(http: httpx.Client, ids: list[int], top_k: int = 2) -> dict[str, Any]:
    """Score's answer for one sequence."""
    (one,) = post(http, "/v1/score", sequences=[ids], top_k=top_k)["sequences"]
    return dict(one)


def events(http: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """A stream's events without the closing one."""
    parts = http.post(path, json=body | {"stream": True}).text.strip().split("\n\n")
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def test_the_one_model_is_listed(http: httpx.Client, server: Server) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert model["id"] == "theory"
    assert model["max_model_len"] == server.app.service.teacher().limits.sequence_tokens


def test_echo_without_a_completion_scores_the_prompt(http: httpx.Client) -> None:
    answer = post(http, "/v1/completions", prompt="hello", max_tokens=0, echo=True, logprobs=2)
    (choice,) = answer["choices"]
    truth = scores(http, list(b"hello"))
    logprobs = choice["logprobs"]
    assert choice["text"] == "hello"
    assert logprobs["tokens"] == list("hello")
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"] == [None, *truth["token_logprobs"]]
    assert logprobs["top_logprobs"][0] is None
    for row, tops, own in zip(
        logprobs["top_logprobs"][1:], truth["top_logprobs"], truth["token_logprobs"], strict=True
    ):
        assert set(tops) <= set(row.values())
        assert own in row.values()
        assert len(row) <= 3
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}


def test_echo_with_a_completion_has_the_log_probabilities_of_both(http: httpx.Client) -> None:
    options = {"max_tokens": 4, "seed": 1, "ignore_eos": True}
    (choice,) = post(http, "/v1/completions", prompt=[[5, 6, 7]], echo=True, logprobs=1, **options)["choices"]
    (plain,) = post(http, "/v1/completions", prompt=[[5, 6, 7]], logprobs=0, **options)["choices"]
    assert len(choice["logprobs"]["tokens"]) == 7
    assert choice["logprobs"]["token_logprobs"][3:] == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-5)
    own = zip(plain["logprobs"]["tokens"], plain["logprobs"]["token_logprobs"], strict=True)
    assert plain["logprobs"]["top_logprobs"] == [{name: logprob} for name, logprob in own]
    assert choice["text"] == "\x05\x06\x07" + plain["text"]


def test_prompt_logprobs_are_by_token_id_with_ranks(http: httpx.Client) -> None:
    (choice,) = post(http, "/v1/completions", prompt=[3, 4, 5], max_tokens=1, prompt_logprobs=2)["choices"]
    truth = scores(http, [3, 4, 5])
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    for t, row in enumerate(rest):
        own = row[str([4, 5][t])]
        assert own["logprob"] == truth["token_logprobs"][t]
        best = row[str(truth["top_token_ids"][t][0])]
        assert (best["rank"], best["logprob"]) == (1, truth["top_logprobs"][t][0])
    assert choice["logprobs"] is None


@pytest.mark.parametrize("prompt", ["ab", ["ab", "cd"], [97, 98], [[97, 98], [99]]])
def test_every_form_of_prompt_is_taken_and_choices_are_numbered(http: httpx.Client, prompt: Any) -> None:
    answer = post(http, "/v1/completions", prompt=prompt, n=2, max_tokens=3, seed=5, ignore_eos=True)
    many = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * many))
    assert answer["usage"]["completion_tokens"] == 6 * many
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}


def test_a_chat_is_rendered_in_the_mode_that_is_asked_for(http: httpx.Client) -> None:
    tokens = {}
    for thinking in (None, True, False):
        kwargs = {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
        tokens[thinking] = post(http, "/v1/chat/completions", **CHAT, max_tokens=1, **kwargs)["usage"]["prompt_tokens"]
    assert tokens[None] == tokens[True] < tokens[False]


def test_a_chat_has_log_probabilities_with_alternatives(http: httpx.Client) -> None:
    options = {"max_tokens": 3, "seed": 2, "ignore_eos": True, "return_tokens_as_token_ids": True}
    answer = post(http, "/v1/chat/completions", **CHAT, logprobs=True, top_logprobs=2, **options)
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    content = choice["logprobs"]["content"]
    assert len(content) == 3
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert all(entry["token"].startswith("token_id:") for entry in content)
    (plain,) = post(http, "/v1/chat/completions", **CHAT, logprobs=True, **options)["choices"]
    assert [e["logprob"] for e in content] == pytest.approx(
        [e["logprob"] for e in plain["logprobs"]["content"]], abs=1e-5
    )


def test_a_chat_without_a_limit_may_fill_what_is_left(http: httpx.Client) -> None:
    (choice,) = post(http, "/v1/chat/completions", **CHAT, seed=1, stop_token_ids=list(range(0, 250)))["choices"]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_says_the_same_in_pieces(http: httpx.Client, path: str) -> None:
    call: dict[str, Any] = {"max_tokens": 8, "seed": 3, "n": 2, "ignore_eos": True}
    call |= CHAT if "chat" in path else {"prompt": "x"}
    whole = post(http, path, **call)
    *pieces, last = events(http, path, **call, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        if "chat" in path:
            assert [piece["delta"].get("role") for piece in mine] == ["assistant", *[None] * (len(mine) - 1)]
            assert "".join(piece["delta"].get("content", "") for piece in mine) == choice["message"]["content"]
        else:
            assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_parts_of_text_are_one_message(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    whole = post(http, "/v1/chat/completions", **CHAT, max_tokens=1)["usage"]
    split = post(http, "/v1/chat/completions", messages=[{"role": "user", "content": parts}], max_tokens=1)["usage"]
    assert whole == split


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 0.5),
        ("presence_penalty", 1),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"5": 10}),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("min_p", 0.1),
        ("best_of", 3),
    ],
)
def test_what_would_change_the_result_is_refused_not_ignored(http: httpx.Client, name: str, value: Any) -> None:
    response = http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 1, name: value})
    body = response.json()
    assert (response.status_code, body["reason"]) == (501, "UNSUPPORTED")
    assert f"does not have {name} (got" in body["detail"]
    assert body["error"]["message"] == body["detail"]


def test_neutral_values_and_what_changes_nothing_are_taken(http: httpx.Client) -> None:
    neutral = {"frequency_penalty": 0.0, "logit_bias": None, "stop": None, "user": "me", "tools": [], "top_k": -1}
    post(http, "/v1/chat/completions", **CHAT, model="theory", max_tokens=1, **neutral)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/chat/completions", CHAT | {"max_token": 1}, 422, "unknown member max_token, did you mean max_tokens"),
        ("/v1/chat/completions", CHAT | {"model": "gpt"}, 412, "names the model 'gpt', this server serves 'theory'"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 1}, 422, "top_logprobs needs logprobs"),
        ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {"tone": 1}}, 501, "enable_thinking alone, got tone"),
        ("/v1/chat/completions", {"messages": [{"role": "jester", "content": "x"}]}, 422, "jester"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 422, "nothing to do without echo"),
        ("/v1/completions", {"prompt": ""}, 422, "prompt is empty"),
        ("/v1/completions", {"prompt": "x", "prompt_logprobs": 2, "stream": True}, 422, "without a stream only"),
        ("/v1/completions", {"prompt": "x", "stop": ["a", ""]}, 422, "stop string 1 is empty"),
        ("/v1/completions", {"prompt": "x", "stop": ["a"] * 17}, 413, "stop has 17 strings, this teacher takes 16"),
        ("/v1/completions", {"prompt": "x", "stream_options": {"include_usage": True}}, 422, "needs stream: true"),
        ("/v1/completions", {"prompt": "x" * 400, "echo": True, "logprobs": 99, "n": 100}, 413, "fewer alternatives"),
        ("/v1/completions", {"prompt": [[1, 999]]}, 422, "prompt 0, position 1: token id 999"),
        ("/v1/completions", {"prompt": "x", "logprobs": 9999, "max_tokens": 1}, 413, "asks for 9999 alternatives"),
    ],
)
def test_a_wrong_call_is_told_what_is_wrong(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == status, response.text
    assert words in response.json()["detail"]
