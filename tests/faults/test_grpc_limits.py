"""What the gRPC server does with too many calls on a connection, and with clients that are gone without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

from protos.scores import GenerateRequest, Prompt, Sampling, Sequence
from student_trainer.teacher_client import connect
from teacher_server.backends.theoretical_backend import Behaviour
from teacher_server.transports import grpc_transport
from tests.contract.wires import GrpcWire
from tests.faults.proxy import Fault, Proxy
from tests.servers import ROOT, Server, environment, serving, theory, wait_for

GAUGES = ("teacher_queue_tokens", "teacher_queue_sequences")
CLIENT = """
import sys
from student_trainer.teacher_client import connect
from protos.scores import Prompt, Sampling

connect(sys.argv[1]).generate([Prompt(token_ids=(1, 2))], Sampling(100_000, ignore_eos=True))
"""


def idle(server: Server) -> bool:
    """Whether nobody's work is left."""
    return not server.app.service.open_calls and not any(server.metric(name) for name in GAUGES)


def test_more_calls_than_a_connection_may_have_wait_and_none_is_lost() -> None:
    behaviour = Behaviour(latency_s=0.01)
    with serving(theory(behaviour), limits={"streams": 4}, cache={"enabled": False}) as server:
        with connect(server.grpc, max_in_flight=64) as client:
            rows = [[Sequence(np.array([1, 2, number]))] for number in range(120)]
            futures = [client.submit_score(row) for row in rows]
            answers = [future.result(60) for future in futures]
        assert [len(answer) for answer in answers] == [1] * 120
        assert server.backend.counters.scored == 120
        wait_for(lambda: idle(server))


def test_a_connection_that_dies_without_a_word_frees_what_its_calls_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_transport, "PING_S", 1.0)
    monkeypatch.setattr(grpc_transport, "PONG_S", 1.0)
    endless = GenerateRequest((Prompt(token_ids=(1, 2)),), Sampling(100_000, ignore_eos=True), stream=True)
    with (
        serving(theory(Behaviour(tokens_per_second=200), max_sequence_tokens=200_000)) as server,
        Proxy(server.grpc, Fault("half-open", least=400, most=400, strikes=1)) as proxy,
        closing(GrpcWire(proxy.address, server.http, timeout=None)) as wire,
    ):
        deltas = wire.deltas(endless)  # the call ends with it
        next(deltas)
        wait_for(lambda: proxy.struck)
        assert not idle(server)
        wait_for(lambda: idle(server), 20)
        assert server.backend.counters.cancelled == 1


@pytest.mark.slow
def test_a_client_that_is_stopped_frees_what_its_calls_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_transport, "PING_S", 1.0)
    monkeypatch.setattr(grpc_transport, "PONG_S", 1.0)
    with serving(theory(Behaviour(tokens_per_second=200), max_sequence_tokens=200_000)) as server:
        client = subprocess.Popen([sys.executable, "-c", CLIENT, server.grpc], env=environment(), cwd=ROOT)
        try:
            wait_for(lambda: server.app.service.open_calls)
            os.kill(client.pid, signal.SIGSTOP)
            wait_for(lambda: idle(server), 20)
            assert server.backend.counters.cancelled == 1
        finally:
            client.kill()
            client.wait()
