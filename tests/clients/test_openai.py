"""The `openai` package against a real server: what its typed answers, streams and exceptions are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from teacher_server.auth import Permission
from teacher_server.backends.theoretical_backend import Behaviour
from teacher_server.keys import make_key, write
from tests.clients.conftest import NAME, Teacher
from tests.servers import Server, serving, theory, wait_for

openai = pytest.importorskip("openai")

QUESTION: Any = [{"role": "user", "content": "Calculate 12+30"}]
THINKING, DIRECT = ({"chat_template_kwargs": {"enable_thinking": thinking}} for thinking in (True, False))
HANGING = 99


@pytest.fixture(scope="module")
def client(teacher: Teacher) -> Iterator[Any]:
    """The synchronous client."""
    with openai.OpenAI(base_url=f"{teacher.http}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, str]]:
    """A server with room for one completion and two keys: one that may do all, one that may only score."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    (key, stored), (scorer, scorer_stored) = make_key("all"), make_key("scorer", may=[Permission.SCORE])
    write(file, [stored, scorer_stored])
    backend = theory(Behaviour(hanging_id=HANGING))
    with serving(backend, key=key, keys_file=str(file), queue_sequences=1) as server:
        yield server, key, scorer


def against(server: Server, key: str, retries: int = 0) -> Any:
    """A client with a key."""
    return openai.OpenAI(base_url=f"{server.http}/v1", api_key=key, max_retries=retries)


def test_models_are_listed(client: Any) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.max_model_len) == (NAME, "model", 512)


def test_an_echo_with_logprobs_scores_a_text(client: Any, teacher: Teacher) -> None:
    text = "12+30=42"
    answer = client.completions.create(model=NAME, prompt=text, max_tokens=0, echo=True, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text == text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    body = {"sequences": [text], "top_k": 3}
    (truth,) = httpx.post(f"{teacher.http}/v1/score", json=body, timeout=60).json()["sequences"]
    assert logprobs.token_logprobs == [None, *truth["token_logprobs"]]
    for row, top in zip(logprobs.top_logprobs[1:], truth["top_logprobs"], strict=True):
        assert set(top) <= set(row.values())


def test_extra_members_reach_the_server_and_come_back(client: Any) -> None:
    extra = {"prompt_logprobs": 2, "return_token_ids": True, "top_k": 5}
    answer = client.completions.create(model=NAME, prompt="12+30=", max_tokens=4, seed=1, extra_body=extra)
    (choice,) = answer.choices
    assert len(choice.prompt_logprobs) == len(choice.prompt_token_ids)
    assert len(choice.token_ids) == answer.usage.completion_tokens
    assert answer.system_fingerprint


def test_a_thinking_chat_has_its_reasoning_apart_and_a_direct_one_has_none(client: Any) -> None:
    answers = {}
    for name, extra in {"thinking": THINKING, "direct": DIRECT}.items():
        answers[name] = client.chat.completions.create(
            model=NAME, messages=QUESTION, temperature=0, max_tokens=200, extra_body=extra
        )
    thinking, direct = answers["thinking"].choices[0].message, answers["direct"].choices[0].message
    assert thinking.reasoning.strip()
    assert "think>" not in thinking.reasoning + thinking.content + direct.content
    assert thinking.content.strip() == "42"
    assert direct.content.strip().isdigit()
    assert direct.reasoning is None
    assert answers["thinking"].usage.completion_tokens_details.reasoning_tokens > 0
    assert answers["direct"].usage.completion_tokens_details.reasoning_tokens == 0


def test_a_streamed_chat_says_the_same_in_pieces(client: Any) -> None:
    call: Any = {"model": NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 200, "logprobs": True}
    call |= {"top_logprobs": 2, "extra_body": THINKING}
    whole = client.chat.completions.create(**call)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**call, stream=True, stream_options=options))
    assert (chunks[0].choices[0].delta.role, chunks[-1].usage, chunks[-1].choices) == ("assistant", whole.usage, [])
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    message = whole.choices[0].message
    assert "".join(choice.delta.content or "" for choice in choices) == message.content
    assert "".join(getattr(choice.delta, "reasoning", "") for choice in choices) == message.reasoning
    rows = [row for choice in choices if choice.logprobs for row in choice.logprobs.content]
    assert [row.token for row in rows] == [row.token for row in whole.choices[0].logprobs.content]
    assert [len(row.top_logprobs) for row in rows] == [2] * whole.usage.completion_tokens
    assert choices[-1].finish_reason == "stop"


def test_reasoning_that_is_not_wanted_is_not_shown(client: Any) -> None:
    call: Any = {"model": NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 200, "logprobs": True}
    extra = THINKING | {"include_reasoning": False, "return_token_ids": True}
    (choice,) = client.chat.completions.create(**call, extra_body=extra).choices
    assert (choice.message.reasoning, choice.logprobs, choice.token_ids) == (None, None, None)
    assert choice.message.content.strip() == "42"
    chunks = client.chat.completions.create(**call, extra_body=extra, stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert not any(getattr(delta, "reasoning", None) for delta in deltas)


def test_stop_strings_end_a_completion(client: Any) -> None:
    (free,) = client.completions.create(model=NAME, prompt="12+30=", max_tokens=40, seed=5).choices
    stop = free.text[6:8]
    (choice,) = client.completions.create(model=NAME, prompt="12+30=", max_tokens=40, seed=5, stop=[stop]).choices
    assert choice.text == free.text[: free.text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_the_asynchronous_client_runs_many_calls_at_once(teacher: Teacher) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{teacher.http}/v1", api_key="none", max_retries=0) as client:

            async def ask(seed: int) -> str:
                stream = await client.completions.create(
                    model=NAME, prompt="1+1=", max_tokens=8, seed=seed % 2, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*map(ask, range(8))))

    texts = asyncio.run(main())
    assert texts[::2] == [texts[0]] * 4
    assert texts[1::2] == [texts[1]] * 4


@pytest.mark.parametrize(
    ("call", "error", "status"),
    [
        ({"prompt": [[1, 99999]]}, "UnprocessableEntityError", 422),
        ({"prompt": "x", "max_tokens": 600}, "APIStatusError", 413),
        ({"prompt": "x", "model": "gpt-4"}, "APIStatusError", 412),
        ({"prompt": "x", "logit_bias": {"5": 10}}, "InternalServerError", 501),
        ({"prompt": "x", "presence_penalty": 1.0}, "InternalServerError", 501),
        ({"prompt": "x", "extra_body": {"max_token": 1}}, "UnprocessableEntityError", 422),
    ],
)
def test_a_refused_call_raises_the_packages_own_error(
    teacher: Teacher, call: dict[str, Any], error: str, status: int
) -> None:
    client = openai.OpenAI(base_url=f"{teacher.http}/v1", api_key="none", max_retries=5)
    with client, pytest.raises(getattr(openai, error)) as refused:
        client.completions.create(**{"model": NAME, "max_tokens": 1} | call)
    assert refused.value.status_code == status
    assert refused.value.body["message"] in refused.value.response.text
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert refused.value.response.request.headers["x-stainless-retry-count"] == "0"  # it was not tried again


def test_keys_open_what_they_may(locked: tuple[Server, str, str]) -> None:
    server, key, scorer = locked
    with against(server, key) as client:
        assert client.completions.create(model="theory", prompt="x", max_tokens=1).usage.completion_tokens == 1
    with against(server, "wrong") as client, pytest.raises(openai.AuthenticationError) as unknown:
        client.models.list()
    assert unknown.value.status_code == 401
    with against(server, scorer) as client:
        assert list(client.models.list())
        with pytest.raises(openai.PermissionDeniedError):
            client.completions.create(model="theory", prompt="x", max_tokens=1)


def test_a_full_queue_is_a_rate_limit_that_says_when_to_try_again(locked: tuple[Server, str, str]) -> None:
    server, key, _ = locked
    with against(server, key) as client, httpx.Client(timeout=60) as other:

        def hang() -> None:
            body = {"prompt": [HANGING], "max_tokens": 1}
            headers = {"authorization": f"Bearer {key}", "x-timeout-s": "3"}
            other.post(f"{server.http}/v1/completions", json=body, headers=headers)

        waiting = threading.Thread(target=hang)
        waiting.start()
        wait_for(lambda: server.metric("teacher_in_flight", method="generate") > 0)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="theory", prompt="x", max_tokens=1)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.response.headers["x-should-retry"] == "true"
        waiting.join()
