"""Bytes of an answer and the CPU time that a client turns them into arrays with, on messages that a server really sent.

`measure` asks one call, keeps the serialised messages as they came, and decodes them again and again. It takes the raw
bytes from gRPC or HTTP itself, since the client hands out arrays alone; the decoding is the client's own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.scoring.client import random_seed
from benchmarks.scoring.work import KINDS, Load, Skipped

POSITIONS = 32_768
"""Positions to which decode times are scaled, and about as many are asked for."""
REPEATS = 9
TIMEOUT_S = 300.0


def measure(addresses: dict[str, str], load: Load, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """For each kind the bytes over gRPC and HTTP and the time to decode, or why not: "failure" or "skipped"."""
    found: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        try:
            found[kind] = _measure(addresses, load, kind)
        except Skipped as error:
            found[kind] = {"skipped": str(error)}
        except Exception as error:  # noqa: BLE001 - one kind that fails is one note, not the end of the run
            found[kind] = {"failure": f"{type(error).__name__}: {error}"}
    return found


def _measure(addresses: dict[str, str], load: Load, kind: str) -> dict[str, Any]:
    from protos import codec
    from protos.scores import ScoreRequest
    from student_trainer.teacher_client import connect

    with connect(addresses["grpc"], patience_s=10) as client:
        info = client.teacher()
    spec = KINDS[kind].spec(info)
    most = max(1, info.limits.request_tokens // load.tokens)
    count = min(most, math.ceil(POSITIONS / (load.tokens - load.score_start)))
    sequences = load.sequences(random_seed(), count, KINDS[kind].candidates)
    request = ScoreRequest(tuple(sequences), spec, info.fingerprint)
    messages = list(_over_grpc(addresses["grpc"], request))
    positions = sum(s.positions for s in sequences)
    times = []
    for _ in range(REPEATS):
        reader = codec.ScoreResponseReader(count)
        begun = time.thread_time()
        done = [reader.add_bytes(data) for data in messages]
        times.append(time.thread_time() - begun)
        assert sum(scores is not None for scores in done) == count
        del done, reader  # a trainer lets go of a batch's scores before it takes the next ones
    sent = sum(len(m.SerializeToString()) for m in codec.encode_score_request(request, codec.CHUNK_BYTES))
    return {
        "positions": positions,
        "messages": len(messages),
        "bytes_per_position": sum(map(len, messages)) / positions,
        "request_bytes_per_position": sent / positions,
        "http_bytes_per_position": _over_http(addresses["http"], request) / positions,
        "decode_ms": 1000 * statistics.median(times[1:]) * POSITIONS / positions,
        "decode_ms_all": [1000 * t * POSITIONS / positions for t in times],
    }


def _over_grpc(address: str, request: Any) -> Iterator[bytes]:
    import grpc

    from protos import codec
    from student_trainer.teacher_client.grpc_channel import SERVICE

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call: Any = channel.stream_stream(SERVICE + "Score")
        messages = (m.SerializeToString() for m in codec.encode_score_request(request, codec.CHUNK_BYTES))
        yield from call(messages, timeout=TIMEOUT_S)


def _over_http(address: str, request: Any) -> int:
    import httpx

    from protos import codec
    from student_trainer.teacher_client.http_channel import PROTOBUF

    (message,) = codec.encode_score_request(request)
    headers = {"accept": PROTOBUF, "content-type": PROTOBUF}
    with httpx.Client(base_url=address, timeout=TIMEOUT_S, trust_env=False) as client:
        response = client.post("/v1/score", content=message.SerializeToString(), headers=headers)
    if response.status_code != 200:
        raise RuntimeError(f"HTTP status {response.status_code}: {response.text[:300]}")
    return len(response.content)
