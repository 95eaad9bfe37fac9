from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_THINKING: _ClassVar[Mode]
    MODE_NON_THINKING: _ClassVar[Mode]

class Field(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIELD_UNSPECIFIED: _ClassVar[Field]
    FIELD_TOKEN_LOGPROBS: _ClassVar[Field]
    FIELD_TOP: _ClassVar[Field]
    FIELD_CANDIDATE_LOGPROBS: _ClassVar[Field]
    FIELD_LOG_NORMALIZER: _ClassVar[Field]
    FIELD_TAIL_LOGPROB: _ClassVar[Field]
    FIELD_HIDDEN_STATES: _ClassVar[Field]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
MODE_UNSPECIFIED: Mode
MODE_THINKING: Mode
MODE_NON_THINKING: Mode
FIELD_UNSPECIFIED: Field
FIELD_TOKEN_LOGPROBS: Field
FIELD_TOP: Field
FIELD_CANDIDATE_LOGPROBS: Field
FIELD_LOG_NORMALIZER: Field
FIELD_TAIL_LOGPROB: Field
FIELD_HIDDEN_STATES: Field
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class GetTeacherRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTeacherResponse(_message.Message):
    __slots__ = ("name", "fingerprint", "tokenizer_hash", "template_hash", "vocab_size", "normalized_size", "eos_token_ids", "limits", "modes", "fields", "can_generate", "engine", "dtype", "quantization", "hidden_size", "hidden_dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_HASH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    NORMALIZED_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    MODES_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    CAN_GENERATE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    tokenizer_hash: str
    template_hash: str
    vocab_size: int
    normalized_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    limits: Limits
    modes: _containers.RepeatedScalarFieldContainer[Mode]
    fields: _containers.RepeatedScalarFieldContainer[Field]
    can_generate: bool
    engine: str
    dtype: str
    quantization: str
    hidden_size: int
    hidden_dtype: str
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., tokenizer_hash: _Optional[str] = ..., template_hash: _Optional[str] = ..., vocab_size: _Optional[int] = ..., normalized_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., modes: _Optional[_Iterable[_Union[Mode, str]]] = ..., fields: _Optional[_Iterable[_Union[Field, str]]] = ..., can_generate: bool = ..., engine: _Optional[str] = ..., dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., hidden_size: _Optional[int] = ..., hidden_dtype: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("sequence_tokens", "top_k", "candidates", "request_tokens", "sequences", "temperatures")
    SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    sequence_tokens: int
    top_k: int
    candidates: int
    request_tokens: int
    sequences: int
    temperatures: int
    def __init__(self, sequence_tokens: _Optional[int] = ..., top_k: _Optional[int] = ..., candidates: _Optional[int] = ..., request_tokens: _Optional[int] = ..., sequences: _Optional[int] = ..., temperatures: _Optional[int] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("index", "token_ids", "score_start", "candidate_ids", "candidates")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORE_START_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: bytes
    score_start: int
    candidate_ids: bytes
    candidates: int
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., score_start: _Optional[int] = ..., candidate_ids: _Optional[bytes] = ..., candidates: _Optional[int] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("sequences", "top_k", "temperatures", "want", "fingerprint")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[Sequence]
    top_k: int
    temperatures: _containers.RepeatedScalarFieldContainer[float]
    want: _containers.RepeatedScalarFieldContainer[Field]
    fingerprint: str
    def __init__(self, sequences: _Optional[_Iterable[_Union[Sequence, _Mapping]]] = ..., top_k: _Optional[int] = ..., temperatures: _Optional[_Iterable[float]] = ..., want: _Optional[_Iterable[_Union[Field, str]]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("index", "first_row", "rows", "total_rows", "token_logprobs", "top_token_ids", "top_logprobs", "candidate_logprobs", "log_normalizer", "tail_logprob", "top_k", "candidates", "temperatures", "hidden_states", "hidden_size")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOG_NORMALIZER_FIELD_NUMBER: _ClassVar[int]
    TAIL_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    index: int
    first_row: int
    rows: int
    total_rows: int
    token_logprobs: bytes
    top_token_ids: bytes
    top_logprobs: bytes
    candidate_logprobs: bytes
    log_normalizer: bytes
    tail_logprob: bytes
    top_k: int
    candidates: int
    temperatures: int
    hidden_states: bytes
    hidden_size: int
    def __init__(self, index: _Optional[int] = ..., first_row: _Optional[int] = ..., rows: _Optional[int] = ..., total_rows: _Optional[int] = ..., token_logprobs: _Optional[bytes] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ..., candidate_logprobs: _Optional[bytes] = ..., log_normalizer: _Optional[bytes] = ..., tail_logprob: _Optional[bytes] = ..., top_k: _Optional[int] = ..., candidates: _Optional[int] = ..., temperatures: _Optional[int] = ..., hidden_states: _Optional[bytes] = ..., hidden_size: _Optional[int] = ...) -> None: ...

class GetHeadRequest(_message.Message):
    __slots__ = ("fingerprint",)
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    def __init__(self, fingerprint: _Optional[str] = ...) -> None: ...

class GetHeadResponse(_message.Message):
    __slots__ = ("first_row", "rows", "total_rows", "hidden_size", "dtype", "weight", "bias")
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    first_row: int
    rows: int
    total_rows: int
    hidden_size: int
    dtype: str
    weight: bytes
    bias: bytes
    def __init__(self, first_row: _Optional[int] = ..., rows: _Optional[int] = ..., total_rows: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[str] = ..., weight: _Optional[bytes] = ..., bias: _Optional[bytes] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("messages", "token_ids", "text", "mode")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    token_ids: bytes
    text: str
    mode: Mode
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ..., token_ids: _Optional[bytes] = ..., text: _Optional[str] = ..., mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "max_tokens", "stop_token_ids", "seed", "ignore_eos", "max_thinking_tokens")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MAX_THINKING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    seed: int
    ignore_eos: bool
    max_thinking_tokens: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., seed: _Optional[int] = ..., ignore_eos: bool = ..., max_thinking_tokens: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("prompts", "sampling", "n", "logprobs", "stream", "fingerprint")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    sampling: Sampling
    n: int
    logprobs: bool
    stream: bool
    fingerprint: str
    def __init__(self, prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., n: _Optional[int] = ..., logprobs: bool = ..., stream: bool = ..., fingerprint: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("deltas",)
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedCompositeFieldContainer[CompletionDelta]
    def __init__(self, deltas: _Optional[_Iterable[_Union[CompletionDelta, _Mapping]]] = ...) -> None: ...

class CompletionDelta(_message.Message):
    __slots__ = ("prompt_index", "sample_index", "token_ids", "logprobs", "text", "finish_reason", "prompt_token_ids")
    PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    prompt_index: int
    sample_index: int
    token_ids: bytes
    logprobs: bytes
    text: str
    finish_reason: FinishReason
    prompt_token_ids: bytes
    def __init__(self, prompt_index: _Optional[int] = ..., sample_index: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., text: _Optional[str] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., prompt_token_ids: _Optional[bytes] = ...) -> None: ...
