"""The only place where a message becomes a domain object and back, for both transports and both sides.

Callers handle messages as opaque values to send. Decoding checks sizes and raises the error tree's InvalidRequest with
the numbers; it knows no engine and no vocabulary.
"""

from protos.codec.generate import (
    decode_deltas,
    decode_deltas_bytes,
    decode_generate_request,
    decode_generate_request_bytes,
    encode_deltas,
    encode_generate_request,
)
from protos.codec.head import HeadReader, decode_head, decode_head_bytes, encode_head, encode_head_request
from protos.codec.score import CHUNK_BYTES, ScoreRequestReader, ScoreResponseReader, encode_score_request, encode_scores
from protos.codec.status import GRPC_NUMBERS, FrameReader, decode_error, encode_error, frame, frame_error, unframe
from protos.codec.teacher import decode_teacher, decode_teacher_bytes, encode_teacher

__all__ = [
    "CHUNK_BYTES",
    "GRPC_NUMBERS",
    "FrameReader",
    "HeadReader",
    "ScoreRequestReader",
    "ScoreResponseReader",
    "decode_deltas",
    "decode_deltas_bytes",
    "decode_error",
    "decode_generate_request",
    "decode_generate_request_bytes",
    "decode_head",
    "decode_head_bytes",
    "decode_teacher",
    "decode_teacher_bytes",
    "encode_deltas",
    "encode_error",
    "encode_generate_request",
    "encode_head",
    "encode_head_request",
    "encode_score_request",
    "encode_scores",
    "encode_teacher",
    "frame",
    "frame_error",
    "unframe",
]
