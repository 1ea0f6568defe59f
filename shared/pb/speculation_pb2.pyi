from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Want(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WANT_UNSPECIFIED: _ClassVar[Want]
    WANT_SPECULATE: _ClassVar[Want]
    WANT_STREAM: _ClassVar[Want]

class Finish(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_NONE: _ClassVar[Finish]
    FINISH_STOP: _ClassVar[Finish]
    FINISH_LENGTH: _ClassVar[Finish]

class FailureCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_CODE_UNSPECIFIED: _ClassVar[FailureCode]
    FAILURE_CODE_INTERNAL: _ClassVar[FailureCode]
    FAILURE_CODE_RESOURCE_EXHAUSTED: _ClassVar[FailureCode]
    FAILURE_CODE_PROTOCOL: _ClassVar[FailureCode]
    FAILURE_CODE_UNAUTHENTICATED: _ClassVar[FailureCode]
    FAILURE_CODE_VOCABULARY_MISMATCH: _ClassVar[FailureCode]
    FAILURE_CODE_CONTEXT_LENGTH: _ClassVar[FailureCode]
    FAILURE_CODE_INVALID_REQUEST: _ClassVar[FailureCode]
WANT_UNSPECIFIED: Want
WANT_SPECULATE: Want
WANT_STREAM: Want
FINISH_NONE: Finish
FINISH_STOP: Finish
FINISH_LENGTH: Finish
FAILURE_CODE_UNSPECIFIED: FailureCode
FAILURE_CODE_INTERNAL: FailureCode
FAILURE_CODE_RESOURCE_EXHAUSTED: FailureCode
FAILURE_CODE_PROTOCOL: FailureCode
FAILURE_CODE_UNAUTHENTICATED: FailureCode
FAILURE_CODE_VOCABULARY_MISMATCH: FailureCode
FAILURE_CODE_CONTEXT_LENGTH: FailureCode
FAILURE_CODE_INVALID_REQUEST: FailureCode

class EdgeMessage(_message.Message):
    __slots__ = ("open", "draft", "heartbeat", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: Open
    draft: Draft
    heartbeat: Heartbeat
    close: Close
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., draft: _Optional[_Union[Draft, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ...) -> None: ...

class CloudMessage(_message.Message):
    __slots__ = ("commit", "need_tokens", "heartbeat", "failure")
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    NEED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    commit: Commit
    need_tokens: NeedTokens
    heartbeat: Heartbeat
    failure: Failure
    def __init__(self, commit: _Optional[_Union[Commit, _Mapping]] = ..., need_tokens: _Optional[_Union[NeedTokens, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class Fingerprint(_message.Message):
    __slots__ = ("size", "digest")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    size: int
    digest: bytes
    def __init__(self, size: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol", "session_id", "tokens", "prompt_len", "max_new_tokens", "vocabulary", "sampling", "stop_ids", "want", "known_len", "known_hash")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    KNOWN_LEN_FIELD_NUMBER: _ClassVar[int]
    KNOWN_HASH_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    session_id: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    prompt_len: int
    max_new_tokens: int
    vocabulary: Fingerprint
    sampling: Sampling
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    want: Want
    known_len: int
    known_hash: int
    def __init__(self, protocol: _Optional[int] = ..., session_id: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., prompt_len: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., vocabulary: _Optional[_Union[Fingerprint, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., stop_ids: _Optional[_Iterable[int]] = ..., want: _Optional[_Union[Want, str]] = ..., known_len: _Optional[int] = ..., known_hash: _Optional[int] = ...) -> None: ...

class Draft(_message.Message):
    __slots__ = ("start", "parent_hash", "tokens", "confidence", "parents")
    START_FIELD_NUMBER: _ClassVar[int]
    PARENT_HASH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    start: int
    parent_hash: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    confidence: bytes
    parents: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, start: _Optional[int] = ..., parent_hash: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., confidence: _Optional[bytes] = ..., parents: _Optional[_Iterable[int]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("nonce", "committed_len", "draft_ms", "rtt_ms", "read_tokens")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LEN_FIELD_NUMBER: _ClassVar[int]
    DRAFT_MS_FIELD_NUMBER: _ClassVar[int]
    RTT_MS_FIELD_NUMBER: _ClassVar[int]
    READ_TOKENS_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    committed_len: int
    draft_ms: float
    rtt_ms: float
    read_tokens: int
    def __init__(self, nonce: _Optional[int] = ..., committed_len: _Optional[int] = ..., draft_ms: _Optional[float] = ..., rtt_ms: _Optional[float] = ..., read_tokens: _Optional[int] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("start", "tokens", "num_drafted", "num_accepted", "finish", "queue_ms", "verify_ms", "max_ahead", "hold_tokens", "is_holding", "num_recycled", "step_ms", "next_rows")
    START_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_AHEAD_FIELD_NUMBER: _ClassVar[int]
    HOLD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_HOLDING_FIELD_NUMBER: _ClassVar[int]
    NUM_RECYCLED_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    NEXT_ROWS_FIELD_NUMBER: _ClassVar[int]
    start: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    num_drafted: int
    num_accepted: int
    finish: Finish
    queue_ms: int
    verify_ms: int
    max_ahead: int
    hold_tokens: int
    is_holding: bool
    num_recycled: int
    step_ms: _containers.RepeatedScalarFieldContainer[float]
    next_rows: int
    def __init__(self, start: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., num_drafted: _Optional[int] = ..., num_accepted: _Optional[int] = ..., finish: _Optional[_Union[Finish, str]] = ..., queue_ms: _Optional[int] = ..., verify_ms: _Optional[int] = ..., max_ahead: _Optional[int] = ..., hold_tokens: _Optional[int] = ..., is_holding: bool = ..., num_recycled: _Optional[int] = ..., step_ms: _Optional[_Iterable[float]] = ..., next_rows: _Optional[int] = ...) -> None: ...

class NeedTokens(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "detail", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: FailureCode
    detail: str
    retry_after_ms: int
    def __init__(self, code: _Optional[_Union[FailureCode, str]] = ..., detail: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("include_vocabulary",)
    INCLUDE_VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    include_vocabulary: bool
    def __init__(self, include_vocabulary: bool = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("model", "vocabulary", "context_length", "dtype", "engine", "max_sessions", "max_pending_tokens", "vocabulary_tokens", "step_ms")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_PENDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    model: str
    vocabulary: Fingerprint
    context_length: int
    dtype: str
    engine: str
    max_sessions: int
    max_pending_tokens: int
    vocabulary_tokens: _containers.RepeatedScalarFieldContainer[bytes]
    step_ms: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, model: _Optional[str] = ..., vocabulary: _Optional[_Union[Fingerprint, _Mapping]] = ..., context_length: _Optional[int] = ..., dtype: _Optional[str] = ..., engine: _Optional[str] = ..., max_sessions: _Optional[int] = ..., max_pending_tokens: _Optional[int] = ..., vocabulary_tokens: _Optional[_Iterable[bytes]] = ..., step_ms: _Optional[_Iterable[float]] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("padding", "reply_bytes")
    PADDING_FIELD_NUMBER: _ClassVar[int]
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    padding: bytes
    reply_bytes: int
    def __init__(self, padding: _Optional[bytes] = ..., reply_bytes: _Optional[int] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("padding",)
    PADDING_FIELD_NUMBER: _ClassVar[int]
    padding: bytes
    def __init__(self, padding: _Optional[bytes] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionStatus(_message.Message):
    __slots__ = ("session", "state", "want", "prompt_len", "committed_len", "cached_len", "pending_tokens", "num_steps", "num_drafted", "num_accepted", "goodput", "draft_ms", "silent_ms")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LEN_FIELD_NUMBER: _ClassVar[int]
    CACHED_LEN_FIELD_NUMBER: _ClassVar[int]
    PENDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_FIELD_NUMBER: _ClassVar[int]
    DRAFT_MS_FIELD_NUMBER: _ClassVar[int]
    SILENT_MS_FIELD_NUMBER: _ClassVar[int]
    session: str
    state: str
    want: Want
    prompt_len: int
    committed_len: int
    cached_len: int
    pending_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int
    goodput: float
    draft_ms: float
    silent_ms: float
    def __init__(self, session: _Optional[str] = ..., state: _Optional[str] = ..., want: _Optional[_Union[Want, str]] = ..., prompt_len: _Optional[int] = ..., committed_len: _Optional[int] = ..., cached_len: _Optional[int] = ..., pending_tokens: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_drafted: _Optional[int] = ..., num_accepted: _Optional[int] = ..., goodput: _Optional[float] = ..., draft_ms: _Optional[float] = ..., silent_ms: _Optional[float] = ...) -> None: ...

class SessionList(_message.Message):
    __slots__ = ("sessions", "kv_blocks_used", "kv_blocks", "parked_sessions")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PARKED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStatus]
    kv_blocks_used: int
    kv_blocks: int
    parked_sessions: int
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionStatus, _Mapping]]] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., parked_sessions: _Optional[int] = ...) -> None: ...
