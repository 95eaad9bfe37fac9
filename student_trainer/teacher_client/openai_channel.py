"""HTTP to one stock vLLM or SGLang server: one attempt of each call, JSON both ways, its errors as the error tree.

It knows neither retries nor limits, and no engine's shapes (see `openai_dialects`). What such a server cannot do is
refused, never guessed: scores at another temperature than 1, candidates, hidden states, the LM head. A server that was
away, or silent for longer than one starts in, may be another one, so it says who it is before its next call.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Generator
from typing import Any

from protos import errors
from protos.head import Head
from protos.scores import CompletionDelta, GenerateRequest, ScoreRequest, Scores, TeacherInfo
from student_trainer.teacher_client import openai_completions, openai_scores
from student_trainer.teacher_client.credentials import Credentials
from student_trainer.teacher_client.http_connection import HttpConnection
from student_trainer.teacher_client.openai_errors import stock_error
from student_trainer.teacher_client.openai_handshake import Ask, Profile, describe, introduce
from student_trainer.teacher_client.openai_model import StockModel

log = logging.getLogger(__name__)
QUIET_S = 10.0
"""Seconds without an answer after which a server may have been started anew: loading a model takes longer."""
HEADERS = {"accept": "application/json", "content-type": "application/json"}


class OpenAiTransport:
    """See `transport.Transport`. `address` may end with /v1, as OpenAI's clients have it."""

    def __init__(
        self,
        address: str,
        model: StockModel,
        name: str = "",
        credentials: Credentials | None = None,
        host: str = "",
    ) -> None:
        base = address.rstrip("/").removesuffix("/v1")
        self._address, self._model = address, model
        self._connection = HttpConnection(base, name, credentials or Credentials(), host)
        self._lock = threading.Lock()
        self._profile: Profile | None = None
        self._warned = False
        self._answered = 0.0

    @property
    def address(self) -> str:
        """See `Transport.address`."""
        return self._address

    def teacher(self, timeout_s: float) -> TeacherInfo:
        """See `Transport.teacher`: asks the server some twenty small questions."""
        profile = introduce(self._asking(timeout_s), self._model, self._address)
        with self._lock:
            self._profile, warn, self._warned = profile, not self._warned, True
        if warn:
            log.info("%s is a %s; it is asked at temperature 1 alone", self._address, profile.info.engine)
            for line in profile.unknown:
                log.warning("%s does not tell %s", self._address, line)
        return profile.info

    def _asking(self, timeout_s: float) -> Ask:
        """Makes calls that all end within `timeout_s`."""
        end = time.monotonic() + timeout_s

        def ask(method: str, path: str, body: Any) -> Any:
            left = end - time.monotonic()
            if left <= 0:
                raise errors.DeadlineExceeded(f"{self._address} did not say who it is within {timeout_s:.4g} s")
            return self._call(method, path, body, left)

        return ask

    def score(self, request: ScoreRequest, timeout_s: float) -> list[Scores]:
        """See `Transport.score`."""
        openai_scores.check_spec(request.spec, self._address)
        for index, sequence in enumerate(request.sequences):
            if sequence.candidates:
                raise errors.Unsupported(
                    f"sequence {index} names {sequence.candidates} candidates at each position, and {self._address} "
                    "takes none: it is no strong2weak teacher",
                    index=index,
                )
            openai_completions.check_ids(sequence.token_ids, self._model, f"sequence {index}", index)
        profile = self._known(request.fingerprint, timeout_s)
        limits = profile.info.limits
        if request.spec.top_k > limits.top_k:
            raise errors.TooLarge(
                f"top_k is {request.spec.top_k}, {self._address} accepts {limits.top_k}; ask for less, or start vLLM "
                f"with --max-logprobs {request.spec.top_k}"
            )
        path, body = profile.dialect.score_call(request, profile.served)
        rows = profile.dialect.read_scores(self._call("POST", path, body, timeout_s), request)
        width = profile.info.normalized_size
        return [openai_scores.make_scores(*row, request.spec, width) for row in rows]

    def generate(self, request: GenerateRequest, timeout_s: float) -> Generator[list[CompletionDelta], None, None]:
        """See `Transport.generate`; completions come whole, when the last of the call has ended."""
        ask = openai_completions.ask_of(request, self._model, self._address)
        profile = self._known(request.fingerprint, timeout_s)
        path, body = profile.dialect.generate_call(ask, profile.served)
        answer = self._call("POST", path, body, timeout_s)
        yield openai_completions.deltas(ask, profile.dialect.read_completions(answer, ask))

    def head(self, fingerprint: str, timeout_s: float) -> Generator[Head, None, None]:
        """See `Transport.head`: Unsupported."""
        raise errors.Unsupported(f"{self._address} gives no LM head: it is no strong2weak teacher")
        yield  # makes this a generator

    def close(self) -> None:
        """See `Transport.close`."""
        self._connection.close()

    def _known(self, fingerprint: str, timeout_s: float) -> Profile:
        """The server as it was found; TeacherMismatch where it came back as another one than `fingerprint`."""
        with self._lock:
            profile, quiet = self._profile, time.monotonic() - self._answered > QUIET_S
        if quiet and profile and describe(self._asking(timeout_s), self._model, self._address) != profile.said:
            profile = None
        if profile is None:
            self.teacher(timeout_s)
            with self._lock:
                profile = self._profile
        if profile is None:
            raise errors.Unavailable(f"{self._address} went away")
        if fingerprint and profile.info.fingerprint != fingerprint:
            raise errors.TeacherMismatch(
                f"{self._address} has the fingerprint {profile.info.fingerprint}, the call expects {fingerprint}"
            )
        return profile

    def _call(self, method: str, path: str, body: Any, timeout_s: float) -> Any:
        """The JSON of an answer."""
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        try:
            with self._connection.stream(method, path, data, timeout_s, HEADERS, stock_error) as (_, chunks):
                raw = b"".join(chunks)
        except errors.Unavailable:
            with self._lock:
                self._profile = None
            raise
        self._answered = time.monotonic()
        try:
            return json.loads(raw)
        except ValueError as error:
            raise errors.TeacherFailed(f"{self._address} answered {path} with no JSON: {raw[:80]!r}") from error
