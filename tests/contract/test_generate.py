"""Generate, over every transport and backend."""

from __future__ import annotations

import numpy as np
import pytest

from protos.scores import (
    Field,
    FinishReason,
    GenerateRequest,
    Message,
    Mode,
    Prompt,
    Sampling,
    ScoreRequest,
    ScoreSpec,
    Sequence,
)
from tests.contract.wires import GrpcWire, HttpWire, JsonWire, Wire
from tests.servers import Server

QUESTION = (Message("user", "What is 12 + 30?"),)


def generate(
    wire: Wire, *prompts: Prompt, n: int = 1, logprobs: bool = False, stream: bool = False, **sampling: object
):
    """The completions of some prompts."""
    drawn = Sampling(**{"max_tokens": 12, "seed": 7} | sampling)  # type: ignore[arg-type]
    return wire.generate(GenerateRequest(prompts, drawn, n, logprobs, stream))


def test_each_prompt_is_rendered_in_its_own_mode(wire: Wire, server: Server) -> None:
    prompts = [Prompt(QUESTION, mode=mode) for mode in (None, Mode.THINKING, Mode.NON_THINKING)]
    (default,), (thinking,), (non_thinking,) = generate(wire, *prompts)
    encode = server.app.service.text.encode
    np.testing.assert_array_equal(default.prompt_token_ids, thinking.prompt_token_ids)
    closed = encode("<think>\n\n</think>\n\n")
    np.testing.assert_array_equal(non_thinking.prompt_token_ids[-len(closed) :], closed)
    np.testing.assert_array_equal(non_thinking.prompt_token_ids[: -len(closed)], thinking.prompt_token_ids)


def test_tokens_and_text_are_prompts_too(wire: Wire, server: Server) -> None:
    ids = server.app.service.text.encode("12 + 30 =")
    (by_ids,), (by_text,) = generate(wire, Prompt(token_ids=ids), Prompt(text="12 + 30 ="))
    np.testing.assert_array_equal(by_ids.prompt_token_ids, ids)
    np.testing.assert_array_equal(by_text.prompt_token_ids, ids)


def test_samples_differ_and_equal_seeds_repeat_them(wire: Wire) -> None:
    (first,) = generate(wire, Prompt(text="a"), n=4)
    (again,) = generate(wire, Prompt(text="a"), n=4)
    (other,) = generate(wire, Prompt(text="a"), n=4, seed=8)
    tokens = [tuple(c.token_ids.tolist()) for c in first]
    assert len(set(tokens)) == 4
    assert tokens == [tuple(c.token_ids.tolist()) for c in again]
    assert tokens != [tuple(c.token_ids.tolist()) for c in other]


def test_without_a_seed_each_call_is_fresh(wire: Wire) -> None:
    one, other = (generate(wire, Prompt(text="a"), n=4, seed=None)[0] for _ in range(2))
    assert [c.token_ids.tolist() for c in one] != [c.token_ids.tolist() for c in other]


def test_greedy_is_the_most_likely_token_each_time(wire: Wire) -> None:
    ((completion,),) = generate(wire, Prompt(text="abc"), temperature=0.0, max_tokens=6, ignore_eos=True)
    ids = np.concatenate([completion.prompt_token_ids, completion.token_ids])
    start = len(completion.prompt_token_ids)
    request = ScoreRequest((Sequence(ids, start),), ScoreSpec(1, want=frozenset({Field.TOP})))
    (scores,) = wire.score(request)
    assert scores.top_token_ids is not None
    np.testing.assert_array_equal(scores.top_token_ids[:, 0], completion.token_ids)


def test_a_stop_id_ends_a_completion_and_is_its_last_token(wire: Wire) -> None:
    stops = tuple(range(0, 256, 2))
    (row,) = generate(wire, Prompt(text="x"), n=8, stop_token_ids=stops, max_tokens=200, ignore_eos=True)
    for completion in row:
        assert completion.finish_reason is FinishReason.STOP
        assert completion.token_ids[-1] in stops
        assert not set(completion.token_ids[:-1].tolist()) & set(stops)


def test_without_a_stop_the_length_ends_it(wire: Wire) -> None:
    (row,) = generate(wire, Prompt(text="x"), n=3, ignore_eos=True, max_tokens=5)
    assert all(c.finish_reason is FinishReason.LENGTH and len(c.token_ids) == 5 for c in row)


def test_sampled_logprobs_are_the_scores_of_the_same_tokens(wire: Wire) -> None:
    prompts = [Prompt(QUESTION, mode=mode) for mode in Mode]
    rows = generate(wire, *prompts, n=2, logprobs=True, temperature=0.7, top_p=0.9, top_k=50)
    for completion in (one for row in rows for one in row):
        ids = np.concatenate([completion.prompt_token_ids, completion.token_ids])
        (scores,) = wire.score(ScoreRequest((Sequence(ids, len(completion.prompt_token_ids)),)))
        np.testing.assert_allclose(completion.logprobs, scores.token_logprobs, atol=5e-5)


def test_no_logprobs_come_unasked(wire: Wire) -> None:
    ((completion,),) = generate(wire, Prompt(text="x"))
    assert completion.logprobs is None


def test_top_k_1_is_greedy(wire: Wire) -> None:
    ((one,),) = generate(wire, Prompt(text="abc"), top_k=1)
    ((greedy,),) = generate(wire, Prompt(text="abc"), temperature=0.0)
    np.testing.assert_array_equal(one.token_ids, greedy.token_ids)


@pytest.mark.parametrize("make", [GrpcWire, HttpWire])
def test_a_stream_says_the_same_in_pieces(server: Server, make: type[GrpcWire] | type[HttpWire]) -> None:
    wire = make(server.grpc, server.http)
    sampling = Sampling(max_tokens=20, seed=3, ignore_eos=True)
    prompts = (Prompt(text="first"), Prompt(QUESTION))
    whole = wire.generate(GenerateRequest(prompts, sampling, 2, True))
    before = wire.messages
    request = GenerateRequest(prompts, sampling, 2, True, stream=True)
    pieces = [delta for deltas in wire.deltas(request) for delta in deltas]
    if make is HttpWire:
        assert wire.messages - before > 10
    assert len(pieces) > 4 * 10
    for p, row in enumerate(whole):
        for s, completion in enumerate(row):
            mine = [d for d in pieces if (d.prompt_index, d.sample_index) == (p, s)]
            np.testing.assert_array_equal(np.concatenate([d.token_ids for d in mine]), completion.token_ids)
            assert "".join(d.text for d in mine) == completion.text
            assert mine[-1].finish_reason is completion.finish_reason
            logprobs = [d.logprobs for d in mine if d.logprobs is not None]
            assert completion.logprobs is not None
            np.testing.assert_allclose(np.concatenate(logprobs), completion.logprobs, atol=5e-5)
    wire.close()


def test_server_sent_events_say_the_same(server: Server) -> None:
    import json

    wire = JsonWire(server.grpc, server.http)
    request = GenerateRequest((Prompt(text="hi"),), Sampling(max_tokens=6, seed=1, ignore_eos=True), 1, True)
    ((whole,),) = wire.generate(request)
    events = wire._client.post("/v1/generate", json=wire._body(request, stream=True)).text.strip().split("\n\n")
    assert events[-1] == "event: done\ndata: {}"
    deltas = [d for event in events[:-1] for d in json.loads(event.removeprefix("data: "))["deltas"]]
    assert [i for d in deltas for i in d["token_ids"]] == whole.token_ids.tolist()
    assert "".join(d["text"] for d in deltas) == whole.text
    assert deltas[-1]["finish_reason"] == "length"
    wire.close()
