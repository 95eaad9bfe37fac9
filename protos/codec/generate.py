"""Generate: a call and the pieces of its completions."""

from __future__ import annotations

from collections.abc import Iterable

from protos import errors
from protos import scores as domain
from protos.codec.common import FINISH, FINISH_BACK, MODES, MODES_BACK, parse, to_bytes, to_floats, to_ids
from protos.teacher.v1 import teacher_pb2 as pb


def encode_generate_request(request: domain.GenerateRequest) -> pb.GenerateRequest:
    """The message of a Generate call; ValueError for what the contract does not carry."""
    if request.alternatives or request.rules is not None:
        raise ValueError("the contract's Generate carries neither alternatives nor rules of the text")
    s = request.sampling
    return pb.GenerateRequest(
        prompts=[
            pb.Prompt(
                messages=[pb.Message(role=m.role, content=m.content) for m in p.messages],
                token_ids=to_bytes(p.token_ids),
                text=p.text,
                mode=MODES[p.mode] if p.mode else pb.MODE_UNSPECIFIED,
            )
            for p in request.prompts
        ],
        sampling=pb.Sampling(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            max_tokens=s.max_tokens,
            stop_token_ids=s.stop_token_ids,
            seed=s.seed,
            ignore_eos=s.ignore_eos,
            max_thinking_tokens=s.max_thinking_tokens,
        ),
        n=request.n,
        logprobs=request.logprobs,
        stream=request.stream,
        fingerprint=request.fingerprint,
    )


def decode_generate_request(message: pb.GenerateRequest) -> domain.GenerateRequest:
    """The call in a message; raises InvalidSpec, or InvalidSequence with the prompt's index."""
    if not message.prompts:
        raise errors.InvalidRequest("the call has no prompts; send at least one")
    s = message.sampling
    try:
        sampling = domain.Sampling(
            max_tokens=s.max_tokens,
            temperature=s.temperature if s.HasField("temperature") else 1.0,
            top_p=s.top_p if s.HasField("top_p") else 1.0,
            top_k=s.top_k,
            stop_token_ids=tuple(s.stop_token_ids),
            seed=s.seed if s.HasField("seed") else None,
            ignore_eos=s.ignore_eos,
            max_thinking_tokens=s.max_thinking_tokens,
        )
    except ValueError as error:
        raise errors.InvalidSpec(str(error)) from error
    prompts = tuple(_decode_prompt(index, prompt) for index, prompt in enumerate(message.prompts))
    return domain.GenerateRequest(
        prompts, sampling, message.n or 1, message.logprobs, message.stream, message.fingerprint
    )


def decode_generate_request_bytes(data: bytes) -> domain.GenerateRequest:
    """The call in a serialised message."""
    message = pb.GenerateRequest()
    parse(message, data)
    return decode_generate_request(message)


def _decode_prompt(index: int, message: pb.Prompt) -> domain.Prompt:
    if message.mode not in (pb.MODE_UNSPECIFIED, *MODES_BACK):
        raise errors.InvalidSequence(f"prompt {index} has an unknown mode {int(message.mode)}", index=index)
    token_ids = to_ids(message.token_ids, f"token_ids of prompt {index}", index) if message.token_ids else None
    turns = tuple(domain.Message(m.role, m.content) for m in message.messages)
    try:
        return domain.Prompt(turns, token_ids, message.text, MODES_BACK.get(message.mode))
    except ValueError as error:
        raise errors.InvalidSequence(f"prompt {index}: {error}", index=index) from error


def encode_deltas(deltas: Iterable[domain.CompletionDelta]) -> pb.GenerateResponse:
    """The message of some completions' new pieces."""
    return pb.GenerateResponse(
        deltas=[
            pb.CompletionDelta(
                prompt_index=d.prompt_index,
                sample_index=d.sample_index,
                token_ids=to_bytes(d.token_ids),
                logprobs=to_bytes(d.logprobs),
                text=d.text,
                finish_reason=FINISH[d.finish_reason] if d.finish_reason else pb.FINISH_REASON_UNSPECIFIED,
                prompt_token_ids=to_bytes(d.prompt_token_ids),
            )
            for d in deltas
        ]
    )


def decode_deltas(message: pb.GenerateResponse) -> list[domain.CompletionDelta]:
    """The pieces in a message."""
    return [
        domain.CompletionDelta(
            prompt_index=d.prompt_index,
            sample_index=d.sample_index,
            token_ids=to_ids(d.token_ids, "token_ids"),
            logprobs=to_floats(d.logprobs) if d.logprobs else None,
            text=d.text,
            finish_reason=FINISH_BACK.get(d.finish_reason),
            prompt_token_ids=to_ids(d.prompt_token_ids, "prompt_token_ids") if d.prompt_token_ids else None,
        )
        for d in message.deltas
    ]


def decode_deltas_bytes(data: bytes) -> list[domain.CompletionDelta]:
    """The pieces in a serialised message."""
    message = pb.GenerateResponse()
    parse(message, data)
    return decode_deltas(message)
