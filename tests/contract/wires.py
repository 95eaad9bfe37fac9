"""The contract's calls over each transport, with raw stubs and httpx; back come domain types or the tree's errors.

Not the trainer's client: it splits no call and retries nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import numpy as np
from grpc_status import rpc_status

from protos import codec, errors
from protos.head import Head
from protos.scores import (
    Completion,
    CompletionDelta,
    FinishReason,
    GenerateRequest,
    ScoreRequest,
    Scores,
    TeacherInfo,
    ids_array,
)
from protos.teacher.v1 import teacher_pb2 as pb
from protos.teacher.v1 import teacher_pb2_grpc

PROTOBUF = "application/x-protobuf"


@dataclass
class Raw:
    """What a transport said about the last error."""

    status: str | int
    retry: bool
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)


class GrpcWire:
    """gRPC on a channel with default options."""

    name = "grpc"

    def __init__(
        self, grpc_address: str, http_address: str, client: str = "", timeout: float | None = 60, key: str = ""
    ) -> None:
        self._channel = grpc.insecure_channel(grpc_address)
        self._stub = teacher_pb2_grpc.TeacherServiceStub(self._channel)
        self._options: dict[str, Any] = {"timeout": timeout}
        metadata = [("x-client", client)] * bool(client) + [("authorization", f"Bearer {key}")] * bool(key)
        if metadata:
            self._options["metadata"] = metadata
        self.messages = 0
        self.raw: Raw | None = None

    def _fail(self, call: grpc.RpcError) -> errors.TeacherError:
        status = rpc_status.from_call(call)  # type: ignore[arg-type]
        name = call.code().name  # type: ignore[attr-defined]
        if status is None:
            return errors.from_wire("", call.details(), grpc_code=name)  # type: ignore[attr-defined]
        error = codec.decode_error(status, name)
        self.raw = Raw(name, any(detail.type_url.endswith("RetryInfo") for detail in status.details))
        return error

    def teacher(self) -> TeacherInfo:
        """GetTeacher."""
        try:
            return codec.decode_teacher(self._stub.GetTeacher(pb.GetTeacherRequest(), **self._options))
        except grpc.RpcError as error:
            raise self._fail(error) from None

    def score(self, request: ScoreRequest, chunk_bytes: int = 0) -> list[Scores]:
        """Score, in messages of `chunk_bytes`."""
        reader, results = codec.ScoreResponseReader(len(request.sequences)), {}
        try:
            for message in self._stub.Score(codec.encode_score_request(request, chunk_bytes), **self._options):
                self.messages += 1
                done = reader.add_bytes(message.SerializeToString())
                if done:
                    results[done[0]] = done[1]
        except grpc.RpcError as error:
            raise self._fail(error) from None
        assert reader.missing == 0
        return [results[index] for index in range(len(request.sequences))]

    def head(self, fingerprint: str = "") -> Head:
        """GetHead, put together."""
        try:
            return whole(map(codec.decode_head, self._stub.GetHead(pb.GetHeadRequest(fingerprint=fingerprint))))
        except grpc.RpcError as error:
            raise self._fail(error) from None

    def deltas(self, request: GenerateRequest) -> Iterator[list[CompletionDelta]]:
        """Generate."""
        try:
            for message in self._stub.Generate(codec.encode_generate_request(request), **self._options):
                yield codec.decode_deltas(message)
        except grpc.RpcError as error:
            raise self._fail(error) from None

    def generate(self, request: GenerateRequest) -> list[list[Completion]]:
        """Generate, put together."""
        return gather(request, self.deltas(request))

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()


class HttpWire:
    """The same messages over HTTP."""

    name = "http"

    def __init__(
        self, grpc_address: str, http_address: str, client: str = "", timeout: float | None = 60, key: str = ""
    ) -> None:
        headers = {"x-client": client} if client else {}
        if key:
            headers["authorization"] = f"Bearer {key}"
        if timeout is not None:
            headers["x-timeout-s"] = str(timeout)
        self._client = httpx.Client(base_url=http_address, headers=headers, timeout=60)
        self.messages = 0
        self.raw: Raw | None = None

    def _fail(self, response: httpx.Response) -> errors.TeacherError:
        response.read()
        assert response.headers["content-type"] == "application/problem+json"
        body = response.json()
        headers = dict(response.headers.items())
        self.raw = Raw(response.status_code, "retry-after" in headers, headers, body)
        return errors.from_wire(
            body["reason"],
            body["detail"],
            http_status=response.status_code,
            retry_after_s=body.get("retry_after_s"),
            index=body.get("index"),
        )

    def teacher(self) -> TeacherInfo:
        """GET /v1/teacher."""
        response = self._client.get("/v1/teacher", headers={"accept": PROTOBUF})
        if response.status_code != 200:
            raise self._fail(response)
        return codec.decode_teacher_bytes(response.content)

    def _frames(self, path: str, content: bytes) -> Iterator[bytes]:
        with self._client.stream("POST", path, content=content, headers={"content-type": PROTOBUF}) as response:
            if response.status_code != 200:
                raise self._fail(response)
            for message in codec.unframe(response.iter_bytes()):
                self.messages += 1
                yield message

    def score(self, request: ScoreRequest, chunk_bytes: int = 0) -> list[Scores]:
        """POST /v1/score."""
        reader, results = codec.ScoreResponseReader(len(request.sequences)), {}
        (message,) = codec.encode_score_request(request)
        for data in self._frames("/v1/score", message.SerializeToString()):
            done = reader.add_bytes(data)
            if done:
                results[done[0]] = done[1]
        assert reader.missing == 0
        return [results[index] for index in range(len(request.sequences))]

    def head(self, fingerprint: str = "") -> Head:
        """GET /v1/head, put together."""
        with self._client.stream("GET", "/v1/head", params={"fingerprint": fingerprint}) as response:
            if response.status_code != 200:
                raise self._fail(response)
            return whole(map(codec.decode_head_bytes, codec.unframe(response.iter_bytes())))

    def deltas(self, request: GenerateRequest) -> Iterator[list[CompletionDelta]]:
        """POST /v1/generate."""
        for data in self._frames("/v1/generate", codec.encode_generate_request(request).SerializeToString()):
            yield codec.decode_deltas_bytes(data)

    def generate(self, request: GenerateRequest) -> list[list[Completion]]:
        """POST /v1/generate, put together."""
        return gather(request, self.deltas(request))

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


class JsonWire(HttpWire):
    """JSON over HTTP, as a person would write it."""

    name = "json"

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self._client.post(path, json=body)
        if response.status_code != 200:
            raise self._fail(response)
        answer: dict[str, Any] = response.json()
        return answer

    def teacher(self) -> TeacherInfo:
        """GET /v1/teacher, whose JSON must say what the message says."""
        response = self._client.get("/v1/teacher")
        if response.status_code != 200:
            raise self._fail(response)
        info = super().teacher()
        body = response.json()
        assert body["fingerprint"] == info.fingerprint
        assert body["limits"] == vars(info.limits)
        assert set(body["fields"]) == {field.value for field in info.fields}
        return info

    def score(self, request: ScoreRequest, chunk_bytes: int = 0) -> list[Scores]:
        """POST /v1/score."""
        sequences = [
            {
                "token_ids": s.token_ids.tolist(),
                "score_start": s.score_start,
                "candidate_ids": [] if s.candidate_ids is None else s.candidate_ids.tolist(),
            }
            for s in request.sequences
        ]
        body = {
            "sequences": sequences,
            "top_k": request.spec.top_k,
            "temperatures": list(request.spec.temperatures),
            "want": [field.value for field in request.spec.want],
            "fingerprint": request.fingerprint,
        }
        answer = self._post("/v1/score", body)
        names = ("token_logprobs", "top_logprobs", "candidate_logprobs", "log_normalizer", "tail_logprob")
        return [
            Scores(
                **{name: np.array(one[name], np.float32) for name in names if name in one},
                top_token_ids=ids_array(one["top_token_ids"], 2) if "top_token_ids" in one else None,
            )
            for one in answer["sequences"]
        ]

    def generate(self, request: GenerateRequest) -> list[list[Completion]]:
        """POST /v1/generate without a stream."""
        rows: list[list[Completion]] = [[] for _ in request.prompts]
        for one in self._post("/v1/generate", self._body(request, stream=False))["completions"]:
            logprobs = one["logprobs"]
            rows[one["prompt_index"]].append(
                Completion(
                    ids_array(one["prompt_token_ids"]),
                    ids_array(one["token_ids"]),
                    one["text"],
                    FinishReason(one["finish_reason"]),
                    None if logprobs is None else np.array(logprobs, np.float32),
                )
            )
        return rows

    @staticmethod
    def _body(request: GenerateRequest, *, stream: bool) -> dict[str, Any]:
        prompts = []
        for p in request.prompts:
            prompt: dict[str, Any] = {"mode": p.mode.value if p.mode else None}
            if p.token_ids is not None:
                prompt["token_ids"] = p.token_ids.tolist()
            elif p.text:
                prompt["text"] = p.text
            else:
                prompt["messages"] = [vars(m) for m in p.messages]
            prompts.append(prompt)
        sampling = vars(request.sampling) | {"stop_token_ids": list(request.sampling.stop_token_ids)}
        return {
            "prompts": prompts,
            "sampling": sampling,
            "n": request.n,
            "logprobs": request.logprobs,
            "stream": stream,
            "fingerprint": request.fingerprint,
        }


Wire = GrpcWire | HttpWire | JsonWire
WIRES: dict[str, Callable[..., Wire]] = {"grpc": GrpcWire, "http": HttpWire, "json": JsonWire}


def whole(parts: Iterator[Head]) -> Head:
    """The head of a stream of its parts."""
    reader = codec.HeadReader()
    found = [reader.add(part) for part in parts]
    reader.finish()
    biases = [part.bias for part in found if part.bias is not None]
    weight = np.concatenate([part.weight for part in found])
    return Head(weight, found[0].dtype, np.concatenate(biases) if biases else None)


def gather(request: GenerateRequest, stream: Iterator[list[CompletionDelta]]) -> list[list[Completion]]:
    """The completions of a stream; checks that each list has at most one piece of a completion."""
    pieces: dict[tuple[int, int], list[CompletionDelta]] = {}
    for deltas in stream:
        keys = [(d.prompt_index, d.sample_index) for d in deltas]
        assert len(keys) == len(set(keys))
        for key, delta in zip(keys, deltas, strict=True):
            pieces.setdefault(key, []).append(delta)
    rows = []
    for prompt in range(len(request.prompts)):
        row = []
        for sample in range(request.n):
            parts = pieces[prompt, sample]
            reason, first = parts[-1].finish_reason, parts[0].prompt_token_ids
            assert reason is not None
            assert first is not None
            assert all(part.finish_reason is None and part.prompt_token_ids is None for part in parts[1:-1])
            logprobs = [part.logprobs for part in parts if part.logprobs is not None]
            row.append(
                Completion(
                    first,
                    np.concatenate([part.token_ids for part in parts]),
                    "".join(part.text for part in parts),
                    reason,
                    np.concatenate(logprobs) if logprobs else None,
                )
            )
        rows.append(row)
    return rows
