"""OpenAI-shaped answers beyond plain completions: stop strings, streamed alternatives, token ids, the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any

import httpx
import pytest

from tests.servers import Server, wait_for
from tests.teacher_server.test_openai_api import CHAT, events, post, scores

LONG: dict[str, Any] = {"prompt": "x", "seed": 11, "max_tokens": 200, "ignore_eos": True, "temperature": 1.5}


def joined(parts: Iterable[list[Any]]) -> list[Any]:
    """Lists one after the other."""
    return list(chain.from_iterable(parts))


def whole_text(http: httpx.Client) -> tuple[str, list[int]]:
    """The text and the ids of LONG's completion, which nothing stops."""
    (choice,) = post(http, "/v1/completions", **LONG, return_token_ids=True)["choices"]
    return choice["text"], choice["token_ids"]


def plain_stop(text: str) -> str:
    """Three characters from the middle of a text, where they stand for the first time."""
    return next(text[i : i + 3] for i in range(20, 100) if text[i : i + 3].isprintable() and "�" not in text[i : i + 3])


@pytest.mark.parametrize("shown", [False, True])
def test_a_stop_string_ends_the_text_the_same_way_whole_and_streamed(http: httpx.Client, shown: bool) -> None:
    text, ids = whole_text(http)
    stop = plain_stop(text)
    call = LONG | {"stop": ["never comes up", stop], "include_stop_str_in_output": shown, "return_token_ids": True}
    (choice,) = post(http, "/v1/completions", **call)["choices"]
    end = text.index(stop)
    assert choice["text"] == text[: end + (len(stop) if shown else 0)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["token_ids"] == ids[: len(choice["token_ids"])]
    pieces = [event["choices"][0] for event in events(http, "/v1/completions", **call)]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    assert joined(piece["token_ids"] for piece in pieces) == choice["token_ids"]
    assert (pieces[-1]["finish_reason"], pieces[-1]["stop_reason"]) == ("stop", stop)
    assert all(piece["finish_reason"] is None for piece in pieces[:-1])


def test_a_stop_string_ends_the_work_of_the_engine_for_each_sample_alone(http: httpx.Client, server: Server) -> None:
    options = LONG | {"n": 2, "max_tokens": 600}
    first, second = post(http, "/v1/completions", **options)["choices"]
    stop = next(
        first["text"][i : i + 3]
        for i in range(20, 150)
        if "�" not in first["text"][i : i + 3] and first["text"][i : i + 3] not in second["text"]
    )
    before = server.backend.counters.new_tokens
    stopped, other = post(http, "/v1/completions", **options, stop=stop)["choices"]
    assert stopped["text"] == first["text"][: first["text"].index(stop)]
    assert other["text"] == second["text"]
    assert server.backend.counters.new_tokens - before < 600 + 200
    before = server.backend.counters.new_tokens
    answer = post(http, "/v1/completions", **options | {"n": 1}, stop=stop)
    assert server.backend.counters.new_tokens - before <= answer["usage"]["completion_tokens"] + 2
    wait_for(lambda: server.metric("teacher_queue_tokens") == 0)


def test_the_text_of_a_stop_id_is_left_out_and_the_id_named(http: httpx.Client) -> None:
    text, ids = whole_text(http)
    at = next(i for i in range(10, 100) if ids[i] < 128 and ids[i] not in ids[:i])
    (hidden,) = post(http, "/v1/completions", **LONG, stop_token_ids=[ids[at]], return_token_ids=True)["choices"]
    assert (hidden["finish_reason"], hidden["stop_reason"], hidden["token_ids"]) == ("stop", ids[at], ids[: at + 1])
    (shown,) = post(http, "/v1/completions", **LONG, stop_token_ids=[ids[at]], include_stop_str_in_output=True)[
        "choices"
    ]
    assert shown["text"] == hidden["text"] + chr(ids[at])
    assert text.startswith(hidden["text"])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_alternatives_are_streamed_and_say_what_score_says(http: httpx.Client, path: str) -> None:
    chat = "chat" in path
    call: dict[str, Any] = {"seed": 4, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
    call |= CHAT | {"logprobs": True, "top_logprobs": 2} if chat else {"prompt": "hello", "logprobs": 2}
    call |= {"return_tokens_as_token_ids": True}
    whole = post(http, path, **call)
    (choice,) = whole["choices"]
    streamed = events(http, path, **call)
    pieces = [event["choices"][0] for event in streamed]
    prompt = (streamed[0] if chat else pieces[0])["prompt_token_ids"]
    assert prompt == (whole if chat else choice)["prompt_token_ids"]
    truth = scores(http, prompt + choice["token_ids"])
    own, top = truth["token_logprobs"][-6:], truth["top_logprobs"][-6:]
    given = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
    if chat:
        assert joined(part["content"] for part in given) == choice["logprobs"]["content"]
        rows = choice["logprobs"]["content"]
        assert [row["logprob"] for row in rows] == pytest.approx(own, abs=1e-5)
        found = [[other["logprob"] for other in row["top_logprobs"]] for row in rows]
    else:
        for name, value in choice["logprobs"].items():
            assert joined(part[name] for part in given) == value, name
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(own, abs=1e-5)
        found = [sorted(row.values(), reverse=True)[:2] for row in choice["logprobs"]["top_logprobs"]]
    for row, expected in zip(found, top, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


def test_an_echo_is_streamed_first_with_its_log_probabilities(http: httpx.Client) -> None:
    call = {"prompt": ["hello", "ab"], "echo": True, "logprobs": 1, "max_tokens": 3, "seed": 1, "ignore_eos": True}
    whole = post(http, "/v1/completions", **call)
    pieces = [event["choices"][0] for event in events(http, "/v1/completions", **call)]
    for choice in whole["choices"]:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        for name, value in choice["logprobs"].items():
            assert joined(piece["logprobs"][name] for piece in mine) == value, name
    (alone,) = events(http, "/v1/completions", **call | {"prompt": "ab", "max_tokens": 0})
    assert (alone["choices"][0]["text"], alone["choices"][0]["finish_reason"]) == ("ab", "length")


def test_usage_may_come_with_every_event(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    call = CHAT | {"max_tokens": 4, "seed": 3, "ignore_eos": True, "stream_options": options}
    *pieces, last = events(http, "/v1/chat/completions", **call)
    counts = [piece["usage"]["completion_tokens"] for piece in pieces]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], last["usage"]["completion_tokens"]) == (0, 4, 4)
    assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_text_and_tokens_go_both_ways(http: httpx.Client, server: Server) -> None:
    answer = post(http, "/tokenize", prompt="hé<|im_end|>", return_token_strs=True)
    limit = server.app.service.teacher().limits.sequence_tokens
    assert (answer["count"], answer["max_model_len"]) == (4, limit)
    assert answer["token_strs"] == ["<0x68>", "<0xC3>", "<0xA9>", "<|im_end|>"]
    assert post(http, "/detokenize", tokens=answer["tokens"]) == {"prompt": "hé<|im_end|>"}
    assert post(http, "/tokenize", prompt="", model="theory") | {"max_model_len": 0} == {
        "count": 0,
        "max_model_len": 0,
        "tokens": [],
        "token_strs": None,
    }


def test_a_chats_tokens_are_those_of_its_completion(http: httpx.Client) -> None:
    for thinking in (True, False):
        kwargs = {"chat_template_kwargs": {"enable_thinking": thinking}}
        tokens = post(http, "/tokenize", **CHAT, **kwargs)["tokens"]
        answer = post(http, "/v1/chat/completions", **CHAT, **kwargs, max_tokens=1, return_token_ids=True)
        assert answer["prompt_token_ids"] == tokens
    closed = post(http, "/tokenize", **CHAT, add_generation_prompt=False)["tokens"]
    assert post(http, "/detokenize", tokens=closed)["prompt"] == "<|im_start|>user\n1+1?<|im_end|>\n"


def test_an_answers_message_may_be_sent_back(http: httpx.Client) -> None:
    message = {"role": "assistant", "content": "2", "reasoning": "1 and 1", "refusal": None, "tool_calls": []}
    older = {"role": "assistant", "content": "2", "reasoning_content": "1 and 1"}
    turns = [[*CHAT["messages"], one, {"role": "user", "content": "And 2?"}] for one in (message, older)]
    first, second = (post(http, "/tokenize", messages=messages)["tokens"] for messages in turns)
    assert first == second
    assert "<think>\n1 and 1\n</think>\n\n2" in post(http, "/detokenize", tokens=first)["prompt"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/tokenize", {}, 422, "give prompt or messages"),
        ("/tokenize", CHAT | {"prompt": "x"}, 422, "give prompt or messages"),
        ("/tokenize", CHAT | {"continue_final_message": True}, 501, "does not have continue_final_message"),
        ("/tokenize", {"prompt": "x", "model": "gpt"}, 412, "names the model 'gpt'"),
        ("/tokenize", {"prompt": "x", "chat_template": "{{x}}"}, 501, "does not have chat_template"),
        ("/detokenize", {"tokens": [1, 261]}, 422, "position 1: token id 261"),
        ("/detokenize", {"tokens": [-1]}, 422, "tokens.0"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 422, "a message needs content"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            501,
            "tool_calls",
        ),
    ],
)
def test_a_wrong_call_is_told_what_is_wrong(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    response = http.post(path, json=body)
    assert (response.status_code, response.headers["x-should-retry"]) == (status, "false"), response.text
    assert words in response.json()["detail"]
    assert response.json()["error"]["message"] == response.json()["detail"]


def test_calls_of_the_tokenizer_are_counted(http: httpx.Client, server: Server) -> None:
    good = server.metric("teacher_requests_total", method="tokenize", outcome="OK")
    bad = server.metric("teacher_requests_total", method="detokenize", outcome="INVALID_SEQUENCE")
    post(http, "/tokenize", prompt="x")
    http.post("/detokenize", content=json.dumps({"tokens": [999]}))
    assert server.metric("teacher_requests_total", method="tokenize", outcome="OK") == good + 1
    assert server.metric("teacher_requests_total", method="detokenize", outcome="INVALID_SEQUENCE") == bad + 1
