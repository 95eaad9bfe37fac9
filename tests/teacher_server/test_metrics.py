"""What Prometheus gets: numbers by client and kind, a bounded number of series, and a page that knows all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from protos.errors import TeacherError
from protos.scores import Prompt, Sampling, ScoreSpec, Sequence
from student_trainer.teacher_client import connect
from teacher_server.backends.theoretical_backend import Behaviour
from teacher_server.keys import make_key, write
from teacher_server.metrics import MOST_CLIENTS, ClientLabels, Metrics, describe_metrics
from teacher_server.usage import OTHERS
from tests.servers import ROOT, Server, serving, theory, wait_for

PAGE = (ROOT / "docs" / "observability.md").read_text()


def ids(seed: int, n: int) -> Sequence:
    return Sequence(np.random.default_rng(seed).integers(0, 200, n, dtype=np.int32))


@pytest.fixture(scope="module")
def used() -> Iterator[Server]:
    """A teacher that two clients have used, one over each transport."""
    with serving(theory(Behaviour(failing_id=255))) as server:
        with connect(server.grpc, name="one") as one, connect(server.http, name="two") as two:
            one.score([ids(1, 30), ids(2, 20), ids(1, 30)], ScoreSpec(8))
            two.score([ids(1, 30), ids(3, 7)], ScoreSpec(8))
            two.generate([Prompt(token_ids=(1, 2, 3))], Sampling(6, ignore_eos=True), n=2)
            with pytest.raises(TeacherError):
                two.score([Sequence(np.array([1, 255], dtype=np.int32))])
        yield server


def test_tokens_and_sequences_are_their_clients(used: Server) -> None:
    def tokens(name: str, **labels: str) -> float:
        return used.metric(f"teacher_{name}_tokens_total", **labels)

    assert [tokens("scored", client=name) for name in ("one", "two")] == [50, 7]
    assert [tokens("joined", client=name) for name in ("one", "two")] == [30, 0]
    assert tokens("cached", client="two", tier="memory") == 30
    assert tokens("prompt", client="two") == 3
    assert tokens("generated", client="two") == 12
    assert tokens("generated", client="one") == 0
    sources = {
        (client, source): used.metric("teacher_score_sequences_total", client=client, source=source)
        for client in ("one", "two")
        for source in ("engine", "joined", "memory")
    }
    assert list(sources.values()) == [2, 1, 0, 1, 0, 1]


def test_calls_and_errors_are_counted_by_client_method_transport_and_class(used: Server) -> None:
    def calls(**labels: str) -> float:
        return used.metric("teacher_requests_total", **labels)

    assert calls(client="one", method="score", transport="grpc", outcome="OK") == 1
    assert calls(client="two", method="score", transport="http", outcome="OK") == 1
    assert calls(client="two", method="generate", transport="http", outcome="OK") == 1
    assert calls(client="two", method="score", transport="http", outcome="TEACHER_FAILED") == 1
    assert calls(client="one") == 1


def test_time_is_split_by_client_and_kind_into_queue_engine_and_bytes(used: Server) -> None:
    for name in ("queue", "engine"):
        assert used.metric(f"teacher_{name}_seconds_count", client="one", kind="score") == 2
        assert used.metric(f"teacher_{name}_seconds_count", client="two", kind="score") == 2  # one of them failed
        assert used.metric(f"teacher_{name}_seconds_count", client="two", kind="generate") == 1
    assert used.metric("teacher_request_seconds_count", client="one", method="score") == 1
    for client, method in (("one", "score"), ("two", "score"), ("two", "generate")):
        for direction in ("read", "write"):
            spent = used.metric(
                "teacher_serialisation_seconds_total", client=client, method=method, direction=direction
            )
            assert 0 < spent < 10


def test_batches_are_counted_with_their_sizes(used: Server) -> None:
    assert used.metric("teacher_batch_sequences_count", kind="score") == 3
    assert used.metric("teacher_batch_tokens_sum", kind="score") == 57
    assert used.metric("teacher_batch_sequences_sum", kind="generate") == 1 + 6 * 2
    assert used.metric("teacher_batch_seconds_count", kind="generate") == 7


def test_a_real_engine_says_how_much_it_batches_and_how_long_it_reads_out() -> None:
    from teacher_server.backends.options import BackendOptions
    from teacher_server.backends.transformers_backend import TransformersBackend

    options = BackendOptions(model=str(ROOT / "tiny_pair" / "teacher"), dtype="float32", device="cpu")
    with serving(lambda: TransformersBackend(options)) as server, connect(server.grpc, name="me") as client:
        client.score([ids(seed, 12) for seed in range(8)], ScoreSpec(4))
        assert server.metric("teacher_batch_tokens_sum", kind="score") == 96
        assert 1 <= server.metric("teacher_batch_sequences_count", kind="score") < 8
        spent = server.metric("teacher_batch_seconds_sum", kind="score")
        assert 0 < server.metric("teacher_readout_seconds_total") < spent
        assert server.metric("teacher_engine_seconds_count", client="me", kind="score") == 8
        client.generate([Prompt(token_ids=(1, 2, 3))], Sampling(4, ignore_eos=True))
        assert server.metric("teacher_batch_sequences_count", kind="generate") == 4  # a prefill and three steps
        assert server.metric("teacher_batch_tokens_sum", kind="generate") == 3 + 3


def test_names_that_nobody_vouches_for_share_a_label_after_some() -> None:
    labels = ClientLabels(most=2)
    assert [labels.enter(name, known=False) for name in "abcab"] == ["a", "b", OTHERS, "a", "b"]
    assert labels.enter("key", known=True) == labels.of("key") == "key"
    assert labels.enter("c", known=True) == "c"
    assert labels.of("stranger") == OTHERS


def test_series_stay_few_whatever_clients_call_themselves() -> None:
    with serving(theory()) as server, httpx.Client(base_url=server.http) as http:
        for i in range(3 * MOST_CLIENTS):
            body = {"sequences": [[1, 2]]}
            http.post("/v1/score", json=body, headers={"x-client": f"client {i}"}).raise_for_status()
        text = http.get("/metrics").text
        names = set(re.findall(r'client="([^"]*)"', text))
        assert len(names) == MOST_CLIENTS + 1
        assert OTHERS in names
        assert server.metric("teacher_requests_total", client=re.escape(OTHERS)) == 2 * MOST_CLIENTS
        assert len(server.app.service.live.clients({})) <= 256


def test_a_clients_key_and_not_what_it_says_is_its_label(tmp_path: Path) -> None:
    key, stored = make_key("trainer-1")
    write(tmp_path / "keys.json", [stored])
    with serving(theory(), key=key, keys_file=str(tmp_path / "keys.json")) as server:
        headers = {"authorization": f"Bearer {key}", "x-client": "somebody"}
        httpx.post(f"{server.http}/v1/score", json={"sequences": [[1, 2]]}, headers=headers).raise_for_status()
        text = httpx.get(f"{server.http}/metrics", headers=headers).text
    assert set(re.findall(r'client="([^"]*)"', text)) == {"trainer-1"}
    assert key not in text


def test_ready_and_the_teachers_name_are_there_to_count_replicas() -> None:
    with serving(theory(), restart={"backoff_s": 30.0}) as server:
        assert server.metric("teacher_ready") == 1
        assert server.metric("teacher_info", name="theory", fingerprint=server.backend.info.fingerprint) == 1
        server.call(server.backend.vanish)
        wait_for(lambda: server.metric("teacher_ready") == 0)


def test_the_page_names_every_metric_and_no_other() -> None:
    shown = set(re.findall(r"\bteacher_[a-z_]+(?=[`{*\[ ])", PAGE)) - {"teacher_server"}
    shown = {name.removesuffix("_bucket") for name in shown}
    assert shown == {name for name, *_ in describe_metrics()}


def test_every_metric_says_what_it_is() -> None:
    text = Metrics().text().decode()
    for name, _, labels, meaning in describe_metrics():
        assert f"# HELP {name} " in text or f"# HELP {name.removesuffix('_total')} " in text
        assert meaning.endswith(".")
        assert len(labels) == len(set(labels))
