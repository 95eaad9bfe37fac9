"""Real teacher servers for tests: the theoretical teacher in its own process, and a small one that fails as told."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
import numpy as np

from protos import codec, errors
from protos import scores as domain
from protos.head import Head
from protos.teacher.v1 import teacher_pb2_grpc
from tests.servers import ROOT, process


@contextmanager
def theoretical_teacher(folder: Path, *arguments: str) -> Iterator[dict[str, str]]:
    """A theoretical teacher as its own process; yields {"grpc": "127.0.0.1:1", "http": "http://127.0.0.1:2"}."""
    with process(folder, "--model", "theoretical", "--backend", "theoretical", *arguments) as (_, addresses):
        yield addresses


@dataclass
class ScriptedTeacher:
    """A teacher that answers each call with the next failure of its script, and rightly once that is used up.

    The right score of a token id i is -i. `calls` counts every call, `sequences` the sizes of Score calls, `prompts`
    those of Generate calls, `most` the calls at the same time, `hosts` the names that HTTP calls give the server.
    `cut_generate` is the number of Generate streams that end after one completion, `cut_head` the number of GetHead
    streams that end after one part.
    """

    failures: list[errors.TeacherError] = field(default_factory=list)
    info: domain.TeacherInfo = field(default_factory=lambda: teacher_info())
    head: Head | None = None
    cut_head: int = 0
    slow_s: float = 0.0
    cut_generate: int = 0
    calls: int = 0
    sequences: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        with self.lock:
            self.calls += 1
            self.names.append(name)
            self.running += 1
            self.most = max(self.most, self.running)
            failure = self.failures.pop(0) if self.failures else None
        try:
            if failure is not None:
                raise failure
            if self.slow_s:
                time.sleep(self.slow_s)
            yield
        finally:
            with self.lock:
                self.running -= 1

    def score(self, request: domain.ScoreRequest) -> Iterator[Any]:
        self.sequences.append(len(request.sequences))
        if request.fingerprint not in ("", self.info.fingerprint):
            raise errors.TeacherMismatch(f"this is {self.info.fingerprint}, not {request.fingerprint}")
        for index, sequence in enumerate(request.sequences):
            if (sequence.token_ids >= self.info.vocab_size).any():
                raise errors.InvalidSequence(f"sequence {index} has an id that is none", index=index)
            ids = sequence.token_ids[sequence.score_start :]
            yield from codec.encode_scores(index, domain.Scores(token_logprobs=-ids.astype(np.float32)))

    def parts(self, fingerprint: str) -> Iterator[Any]:
        if fingerprint not in ("", self.info.fingerprint):
            raise errors.TeacherMismatch(f"this is {self.info.fingerprint}, not {fingerprint}")
        if self.head is None:
            raise errors.Unsupported("this teacher has no head")
        cut = self.cut_head > 0
        self.cut_head -= cut
        for part in self.head.parts(3):
            yield codec.encode_head(part)
            if cut:
                raise errors.Unavailable("the teacher went away", retry_after_s=0.01)

    def generate(self, request: domain.GenerateRequest) -> Iterator[Any]:
        self.prompts.append(len(request.prompts))
        self.seeds.append(request.sampling.seed)
        cut = self.cut_generate > 0
        self.cut_generate -= cut
        sent = 0
        for index, prompt in enumerate(request.prompts):
            for sample in range(request.n):
                if cut and sent == 1:
                    raise errors.Unavailable("the engine went away", retry_after_s=0.01)
                sent += 1
                text = prompt.text
                ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
                done = domain.FinishReason.STOP
                delta = domain.CompletionDelta(index, sample, ids + sample, None, text, done, ids)
                yield codec.encode_deltas([delta])


def teacher_info(**changes: Any) -> domain.TeacherInfo:
    """A teacher's description."""
    values: dict[str, Any] = {
        "name": "scripted",
        "fingerprint": "f1",
        "tokenizer_hash": "t",
        "template_hash": "",
        "vocab_size": 1000,
        "normalized_size": 1000,
        "eos_token_ids": (0,),
        "limits": domain.Limits(100, 8, 8, 200, 16, 8),
        "modes": tuple(domain.Mode),
        "fields": frozenset(domain.Field),
        "can_generate": True,
        "engine": "script",
        "dtype": "float32",
        "quantization": "none",
    }
    return domain.TeacherInfo(**(values | changes))


class _Servicer(teacher_pb2_grpc.TeacherServiceServicer):
    def __init__(self, teacher: ScriptedTeacher) -> None:
        self.teacher = teacher

    def _run(self, context: Any, work: Any) -> Iterator[Any]:
        from grpc_status import rpc_status

        try:
            name = dict(context.invocation_metadata()).get("x-client", "")
            with self.teacher.call(name):
                yield from work()
        except errors.TeacherError as error:
            context.abort_with_status(rpc_status.to_status(codec.encode_error(error)))

    def GetTeacher(self, request: Any, context: Any) -> Any:
        return next(self._run(context, lambda: iter([codec.encode_teacher(self.teacher.info)])))

    def Score(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        reader = codec.ScoreRequestReader()
        for message in request_iterator:
            reader.add(message)
        yield from self._run(context, lambda: self.teacher.score(reader.finish()))

    def GetHead(self, request: Any, context: Any) -> Iterator[Any]:
        yield from self._run(context, lambda: self.teacher.parts(request.fingerprint))

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:
        yield from self._run(context, lambda: self.teacher.generate(codec.decode_generate_request(request)))


@contextmanager
def over_grpc(teacher: ScriptedTeacher, port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
    """`teacher` behind a real gRPC server; yields its address."""
    server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    teacher_pb2_grpc.add_TeacherServiceServicer_to_server(_Servicer(teacher), server)
    bound = server.add_insecure_port(f"{host}:{port}")
    server.start()
    try:
        yield f"grpc://{host}:{bound}"
    finally:
        server.stop(None).wait()


def _handler(teacher: ScriptedTeacher) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on standard error."""

        def do_GET(self) -> None:
            if self.path.startswith("/v1/head"):
                fingerprint = parse_qs(urlsplit(self.path).query).get("fingerprint", [""])[0]
                self._answer(lambda body: teacher.parts(fingerprint), framed=True)
            else:
                self._answer(lambda body: iter([codec.encode_teacher(teacher.info)]), framed=False)

        def do_POST(self) -> None:
            self._answer(self._score if self.path == "/v1/score" else self._generate, framed=True)

        def _score(self, body: bytes) -> Iterator[Any]:
            reader = codec.ScoreRequestReader()
            reader.add_bytes(body)
            return teacher.score(reader.finish())

        def _generate(self, body: bytes) -> Iterator[Any]:
            return teacher.generate(codec.decode_generate_request_bytes(body))

        def _answer(self, work: Any, framed: bool) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            sent: list[bytes] = []
            try:
                teacher.hosts.append(self.headers.get("host", ""))
                with teacher.call(self.headers.get("x-client", "")):
                    for message in work(body):
                        data = message.SerializeToString()
                        sent.append(codec.frame(data) if framed else data)
            except errors.TeacherError as error:
                if not sent:
                    return self._problem(error)
                sent.append(codec.frame_error(error))
            return self._send(200, "application/x-protobuf", b"".join(sent))

        def _problem(self, error: errors.TeacherError) -> None:
            problem = {"detail": error.message, "reason": error.reason, "index": error.index}
            if error.retry_after_s is not None:
                problem["retry_after_s"] = error.retry_after_s
            self._send(error.http_status, "application/problem+json", json.dumps(problem).encode())

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the test."""


@contextmanager
def over_http(teacher: ScriptedTeacher, port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
    """`teacher` behind a real HTTP server; yields its address."""
    server = _HttpServer((host, port), _handler(teacher))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


OVER = {"grpc": over_grpc, "http": over_http}


def environment() -> dict[str, str]:
    """The environment of child processes in tests: the packages on the path, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
