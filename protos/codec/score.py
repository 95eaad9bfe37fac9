"""Score: a call in one or many messages, its streamed rows, and the readers that merge either."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from protos import errors
from protos import scores as domain
from protos.codec import wire
from protos.codec.common import FIELDS, FIELDS_BACK, parse, to_bytes, to_ids
from protos.teacher.v1 import teacher_pb2 as pb

CHUNK_BYTES = 1280 * 1024
"""Target size of one streamed message in bytes, below gRPC's default limit of 4 MiB.

2,048 positions of a top-64 fit one message, whose arrays are then views of it; three messages of 512 KiB, which have to
be copied together, cost a client four times as much.
"""


def encode_score_request(request: domain.ScoreRequest, chunk_bytes: int = 0) -> Iterator[pb.ScoreRequest]:
    """The messages of a call: one, or several of about `chunk_bytes` each where that is above 0."""
    message = pb.ScoreRequest(
        top_k=request.spec.top_k,
        temperatures=request.spec.temperatures,
        want=sorted(FIELDS[f] for f in request.spec.want),
        fingerprint=request.fingerprint,
    )
    size = 0
    for index, sequence in enumerate(request.sequences):
        ids, candidates = to_bytes(sequence.token_ids), to_bytes(sequence.candidate_ids)
        step = chunk_bytes // 4 * 4 or len(ids) + len(candidates)
        first = True
        while first or ids or candidates:
            if chunk_bytes and size >= step:
                yield message
                message, size = pb.ScoreRequest(), 0
            room = step - size if chunk_bytes else step
            take_ids, ids = ids[:room], ids[room:]
            room -= len(take_ids)
            take_candidates, candidates = candidates[:room], candidates[room:]
            size += len(take_ids) + len(take_candidates)
            message.sequences.add(
                index=index,
                token_ids=take_ids,
                candidate_ids=take_candidates,
                score_start=sequence.score_start if first else 0,
                candidates=sequence.candidates if first else 0,
            )
            first = False
    yield message


class ScoreRequestReader:
    """Merges the messages of one Score call; `add` each in order, then `finish`.

    Raises InvalidRequest and its kinds with the sequence's index; TooLarge once `max_bytes` of ids have arrived, so
    that an endless stream holds no memory.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._spec: tuple[domain.ScoreSpec, str] | None = None
        self._parts: list[tuple[list[bytes], list[bytes], int, int]] = []

    def add(self, message: pb.ScoreRequest) -> None:
        """Takes the call's next message."""
        if self._spec is None:
            self._spec = _decode_spec(message), message.fingerprint
        for part in message.sequences:
            if part.index > len(self._parts):
                raise errors.InvalidSequence(
                    f"sequence {part.index} came before sequence {len(self._parts)}; number them from 0 without gaps",
                    index=part.index,
                )
            self._bytes += len(part.token_ids) + len(part.candidate_ids)
            if self._max_bytes and self._bytes > self._max_bytes:
                raise errors.TooLarge(
                    f"the call carries more than {self._max_bytes} bytes of ids, the limit of this teacher; split it"
                )
            if part.index == len(self._parts):
                self._parts.append(([], [], part.score_start or 1, part.candidates))
            self._parts[part.index][0].append(part.token_ids)
            self._parts[part.index][1].append(part.candidate_ids)

    def add_bytes(self, data: bytes) -> None:
        """Takes the call's next message from its serialised form."""
        message = pb.ScoreRequest()
        parse(message, data)
        self.add(message)

    def finish(self) -> domain.ScoreRequest:
        """The whole call."""
        if self._spec is None or not self._parts:
            raise errors.InvalidRequest("the call has no sequences; send at least one")
        sequences = tuple(self._sequence(index, *part) for index, part in enumerate(self._parts))
        return domain.ScoreRequest(sequences, *self._spec)

    @staticmethod
    def _sequence(index: int, ids: list[bytes], candidates: list[bytes], start: int, width: int) -> domain.Sequence:
        token_ids = to_ids(b"".join(ids), f"token_ids of sequence {index}", index)
        flat = to_ids(b"".join(candidates), f"candidate_ids of sequence {index}", index)
        positions = len(token_ids) - start
        if len(flat) != max(positions, 0) * width:
            raise errors.InvalidSequence(
                f"sequence {index} has {len(flat)} candidate ids, expected {positions} positions x {width} candidates",
                index=index,
            )
        try:
            return domain.Sequence(token_ids, start, flat.reshape(positions, width) if width else None)
        except ValueError as error:
            raise errors.InvalidSequence(f"sequence {index}: {error}", index=index) from error


def _decode_spec(message: pb.ScoreRequest) -> domain.ScoreSpec:
    unknown = [int(f) for f in message.want if f not in FIELDS_BACK]
    if unknown:
        raise errors.InvalidSpec(f"want names unknown fields {unknown}; known are 1 to {max(FIELDS_BACK)}")
    try:
        want = frozenset(FIELDS_BACK[f] for f in message.want)
        return domain.ScoreSpec(message.top_k, tuple(message.temperatures), want)
    except ValueError as error:
        raise errors.InvalidSpec(str(error)) from error


def encode_scores(index: int, scores: domain.Scores, chunk_bytes: int = CHUNK_BYTES) -> Iterator[pb.ScoreResponse]:
    """The messages of one sequence's scores, each of about `chunk_bytes`."""
    total = scores.positions
    per_row = max(1, scores.nbytes // max(1, total))
    step = max(1, chunk_bytes // per_row)
    width = {name: int(a.shape[1]) for name, a in scores.arrays().items() if a.ndim == 2}
    for first in range(0, max(total, 1), step):
        part = scores.rows(first, first + step)
        yield pb.ScoreResponse(
            index=index,
            first_row=first,
            rows=part.positions,
            total_rows=total,
            top_k=width.get("top_token_ids", 0),
            candidates=width.get("candidate_logprobs", 0),
            temperatures=width.get("log_normalizer", width.get("tail_logprob", 0)),
            hidden_size=width.get("hidden_states", 0),
            **{name: to_bytes(array) for name, array in part.arrays().items()},
        )


_NAMES = {field.number: field.name for field in pb.ScoreResponse.DESCRIPTOR.fields}
_WIDTHS = {
    "token_logprobs": "",
    "top_token_ids": "top_k",
    "top_logprobs": "top_k",
    "candidate_logprobs": "candidates",
    "log_normalizer": "temperatures",
    "tail_logprob": "temperatures",
}
"""The field of a response that says how wide an array's rows are."""


class ScoreResponseReader:
    """Collects the streamed rows of a call of `sequences` sequences; `add_bytes` returns a finished sequence.

    Raises TeacherFailed for rows that are missing, doubled or of a wrong size: the stream is then broken.
    """

    def __init__(self, sequences: int) -> None:
        self._arrays: list[dict[str, np.ndarray]] = [{} for _ in range(sequences)]
        self._rows = [0] * sequences
        self.missing = sequences

    def add_bytes(self, data: bytes) -> tuple[int, domain.Scores] | None:
        """Takes a serialised message; returns (index, scores) when it completes its sequence."""
        try:
            numbers, parts = wire.fields(data, _NAMES)
        except ValueError as error:
            raise errors.TeacherFailed(f"the stream is broken: {error}") from error
        index, rows, first, total = (numbers.get(name, 0) for name in ("index", "rows", "first_row", "total_rows"))
        if index >= len(self._arrays) or first != self._rows[index] or first + rows > total:
            raise errors.TeacherFailed(f"the stream is broken: row {first} of sequence {index} out of turn")
        views: dict[str, np.ndarray] = {}
        for name, width in _WIDTHS.items():
            part = parts.get(name)
            if part is None or not len(part):
                continue
            shape = (rows, numbers.get(width, 0)) if width else (rows,)
            if len(part) != 4 * int(np.prod(shape)):
                raise errors.TeacherFailed(f"the stream is broken: {name} has {len(part)} bytes for {list(shape)}")
            views[name] = np.frombuffer(part, dtype="<i4" if name == "top_token_ids" else "<f4").reshape(shape)
        if len(parts.get("hidden_states", b"")):
            views["hidden_states"] = _hidden(parts["hidden_states"], rows, numbers.get("hidden_size", 0))
        self._copy(index, first, total, views)
        self._rows[index] += rows
        if self._rows[index] < total:
            return None
        self.missing -= 1
        arrays, self._arrays[index] = self._arrays[index], {}
        return index, domain.Scores(**arrays)

    def _copy(self, index: int, first: int, total: int, views: dict[str, np.ndarray]) -> None:
        """Copies rows to where they belong, once: the message's bytes are not aligned."""
        arrays = self._arrays[index]
        if first == 0:
            for name, view in views.items():
                arrays[name] = np.empty((total, *view.shape[1:]), view.dtype.newbyteorder("="))
        if {name: view.shape[1:] for name, view in views.items()} != {n: a.shape[1:] for n, a in arrays.items()}:
            raise errors.TeacherFailed(f"the stream is broken: the fields of sequence {index} change at row {first}")
        for name, view in views.items():
            arrays[name][first : first + len(view)] = view


def _hidden(data: memoryview, rows: int, hidden_size: int) -> domain.Bits:
    """[R,H] of a message: 16-bit numbers stay bits, because only GetTeacher names their dtype."""
    numbers = rows * hidden_size
    if not numbers or len(data) not in (2 * numbers, 4 * numbers):
        raise errors.TeacherFailed(
            f"the stream is broken: hidden_states has {len(data)} bytes for [{rows}, {hidden_size}]"
        )
    held = "<u2" if len(data) == 2 * numbers else "<f4"
    return np.frombuffer(data, dtype=held).reshape(rows, hidden_size)
