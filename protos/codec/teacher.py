"""GetTeacher: the teacher's description as a message and back."""

from __future__ import annotations

from protos import scores as domain
from protos.codec.common import FIELDS, FIELDS_BACK, MODES, MODES_BACK, parse
from protos.teacher.v1 import teacher_pb2 as pb


def encode_teacher(info: domain.TeacherInfo) -> pb.GetTeacherResponse:
    """The message of a teacher's description."""
    return pb.GetTeacherResponse(
        name=info.name,
        fingerprint=info.fingerprint,
        tokenizer_hash=info.tokenizer_hash,
        template_hash=info.template_hash,
        vocab_size=info.vocab_size,
        normalized_size=info.normalized_size,
        eos_token_ids=info.eos_token_ids,
        limits=pb.Limits(**vars(info.limits)),
        modes=[MODES[m] for m in info.modes],
        fields=sorted(FIELDS[f] for f in info.fields),
        can_generate=info.can_generate,
        engine=info.engine,
        dtype=info.dtype,
        quantization=info.quantization,
        hidden_size=info.hidden_size,
        hidden_dtype=info.hidden_dtype,
    )


def decode_teacher(message: pb.GetTeacherResponse) -> domain.TeacherInfo:
    """The description in a message; modes and fields that this version does not know are left out."""
    limits = message.limits
    return domain.TeacherInfo(
        name=message.name,
        fingerprint=message.fingerprint,
        tokenizer_hash=message.tokenizer_hash,
        template_hash=message.template_hash,
        vocab_size=message.vocab_size,
        normalized_size=message.normalized_size,
        eos_token_ids=tuple(message.eos_token_ids),
        limits=domain.Limits(
            limits.sequence_tokens,
            limits.top_k,
            limits.candidates,
            limits.request_tokens,
            limits.sequences,
            limits.temperatures,
        ),
        modes=tuple(MODES_BACK[m] for m in message.modes if m in MODES_BACK),
        fields=frozenset(FIELDS_BACK[f] for f in message.fields if f in FIELDS_BACK),
        can_generate=message.can_generate,
        engine=message.engine,
        dtype=message.dtype,
        quantization=message.quantization,
        hidden_size=message.hidden_size,
        hidden_dtype=message.hidden_dtype,
    )


def decode_teacher_bytes(data: bytes) -> domain.TeacherInfo:
    """The description in a serialised message."""
    message = pb.GetTeacherResponse()
    parse(message, data)
    return decode_teacher(message)
