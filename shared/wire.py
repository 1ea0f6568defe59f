"""Messages to protobuf and back: the only translator.

`*_to_wire` trusts its argument: a number that does not fit its field is a bug here, and protobuf raises `ValueError`.
`*_from_wire` trusts nothing: whatever breaks `protos/outrider/v1/speculation.proto` raises `RemoteProtocolError` with a
one-line reason. Both ways together give an equal message, except that `queue_ms` and `verify_ms` are rounded to whole
milliseconds, and `draft_ms`, `rtt_ms`, `step_ms` and the floats of a `SessionStatus` to float32. The enums of
`shared.core.messages` have the numbers of their protobuf twins.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import TypeVar

from shared.core.errors import RemoteProtocolError
from shared.core.messages import (
    Close,
    CloudMessage,
    Commit,
    Draft,
    EdgeMessage,
    Failure,
    FailureCode,
    Fingerprint,
    Finish,
    Heartbeat,
    NeedTokens,
    Open,
    Sampling,
    SessionStatus,
    Want,
)
from shared.pb import speculation_pb2 as pb

MAX_SESSION_TOKENS = 1 << 20  # also keeps an Open below gRPC's default limit of 4 MiB a message
MAX_DRAFT_TOKENS = 4096
MAX_STOP_IDS = 4096
MAX_SESSION_ID_CHARS = 128
MAX_DIGEST_BYTES = 64
MAX_PROBE_BYTES = 1 << 16
_INT_LIMIT = 1 << 31  # token ids, positions and lengths fit engines' and numpy's int32
_HASH_LIMIT = (1 << 61) - 1

_STATUS_FIELDS = tuple(field.name for field in fields(SessionStatus))

_E = TypeVar("_E", bound=Enum)


@dataclass(frozen=True, slots=True)
class Description:
    """What a verifier serves. `vocabulary_tokens` is empty unless asked for, else the bytes of each id in order.

    `step_ms[i]` is the expected time of a step of i + 1 rows, ms; a verifier may leave it out.
    """

    model: str
    vocabulary: Fingerprint
    context_length: int
    dtype: str
    engine: str
    max_sessions: int
    max_pending_tokens: int
    vocabulary_tokens: tuple[bytes, ...] = ()
    step_ms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionList:
    """Live sessions, and the cache of the whole verifier: blocks in use, blocks in all, sessions parked in it."""

    sessions: tuple[SessionStatus, ...]
    kv_blocks_used: int
    kv_blocks: int
    parked_sessions: int


def edge_to_wire(message: EdgeMessage) -> pb.EdgeMessage:
    """The edge's message as protobuf."""
    match message:
        case Open():
            return pb.EdgeMessage(open=_open_to_wire(message))
        case Draft():
            draft = pb.Draft(
                start=message.start,
                parent_hash=message.parent_hash,
                tokens=message.tokens,
                confidence=message.confidence,
                parents=[parent + 1 for parent in message.parents],
            )
            return pb.EdgeMessage(draft=draft)
        case Heartbeat():
            return pb.EdgeMessage(heartbeat=_heartbeat_to_wire(message))
        case _:  # Close: no other type is left
            return pb.EdgeMessage(close=pb.Close(reason=message.reason))


def edge_from_wire(wire: pb.EdgeMessage) -> EdgeMessage:
    """The message of an edge. Raises `RemoteProtocolError` where it is malformed."""
    match wire.WhichOneof("kind"):
        case "open":
            return _open_from_wire(wire.open)
        case "draft":
            return _draft_from_wire(wire.draft)
        case "heartbeat":
            return _heartbeat_from_wire(wire.heartbeat)
        case "close":
            return Close(reason=wire.close.reason)
        case _:
            raise RemoteProtocolError("EdgeMessage has no kind, or one that this version does not know")


def cloud_to_wire(message: CloudMessage) -> pb.CloudMessage:
    """The verifier's message as protobuf."""
    match message:
        case Commit():
            commit = pb.Commit(
                start=message.start,
                tokens=message.tokens,
                num_drafted=message.num_drafted,
                num_accepted=message.num_accepted,
                finish=f"FINISH_{message.finish.name}",
                queue_ms=round(message.queue_ms),
                verify_ms=round(message.verify_ms),
                max_ahead=message.max_ahead,
                hold_tokens=message.hold_tokens,
                is_holding=message.is_holding,
                num_recycled=message.num_recycled,
                step_ms=message.step_ms,
                next_rows=message.next_rows,
            )
            return pb.CloudMessage(commit=commit)
        case NeedTokens():
            return pb.CloudMessage(need_tokens=pb.NeedTokens())
        case Heartbeat():
            return pb.CloudMessage(heartbeat=_heartbeat_to_wire(message))
        case _:  # Failure: no other type is left
            code = f"FAILURE_CODE_{message.code.name}"
            failure = pb.Failure(code=code, detail=message.detail, retry_after_ms=message.retry_after_ms)
            return pb.CloudMessage(failure=failure)


def cloud_from_wire(wire: pb.CloudMessage) -> CloudMessage:
    """The message of a verifier. Raises `RemoteProtocolError` where it is malformed."""
    match wire.WhichOneof("kind"):
        case "commit":
            return _commit_from_wire(wire.commit)
        case "need_tokens":
            return NeedTokens()
        case "heartbeat":
            return _heartbeat_from_wire(wire.heartbeat)
        case "failure":
            failure = wire.failure
            return Failure(_enum("Failure.code", FailureCode, failure.code), failure.detail, failure.retry_after_ms)
        case _:
            raise RemoteProtocolError("CloudMessage has no kind, or one that this version does not know")


def description_to_wire(description: Description) -> pb.Description:
    """A verifier's description as protobuf."""
    return pb.Description(
        model=description.model,
        vocabulary=_fingerprint_to_wire(description.vocabulary),
        context_length=description.context_length,
        dtype=description.dtype,
        engine=description.engine,
        max_sessions=description.max_sessions,
        max_pending_tokens=description.max_pending_tokens,
        vocabulary_tokens=description.vocabulary_tokens,
        step_ms=description.step_ms,
    )


def description_from_wire(wire: pb.Description) -> Description:
    """The description of a verifier. Raises `RemoteProtocolError` where it is malformed."""
    vocabulary = _fingerprint_from_wire("Description.vocabulary", wire.vocabulary)
    if len(wire.vocabulary_tokens) not in (0, vocabulary.size):
        raise RemoteProtocolError(
            f"Description has {len(wire.vocabulary_tokens)} vocabulary_tokens for a vocabulary of {vocabulary.size}"
        )
    return Description(
        model=wire.model,
        vocabulary=vocabulary,
        context_length=_integer("Description.context_length", wire.context_length, minimum=1),
        dtype=wire.dtype,
        engine=wire.engine,
        max_sessions=wire.max_sessions,
        max_pending_tokens=wire.max_pending_tokens,
        vocabulary_tokens=tuple(wire.vocabulary_tokens),
        step_ms=_durations("Description.step_ms", wire.step_ms),
    )


def session_list_to_wire(listed: SessionList) -> pb.SessionList:
    """A list of sessions as protobuf: the fields have the same names."""
    sessions = [pb.SessionStatus(**asdict(status) | {"want": status.want.value}) for status in listed.sessions]
    return pb.SessionList(
        sessions=sessions,
        kv_blocks_used=listed.kv_blocks_used,
        kv_blocks=listed.kv_blocks,
        parked_sessions=listed.parked_sessions,
    )


def session_list_from_wire(wire: pb.SessionList) -> SessionList:
    """The list of a verifier. Raises `RemoteProtocolError` where it is malformed."""
    sessions = tuple(_status_from_wire(status) for status in wire.sessions)
    return SessionList(sessions, wire.kv_blocks_used, wire.kv_blocks, wire.parked_sessions)


def _status_from_wire(wire: pb.SessionStatus) -> SessionStatus:
    for name in ("goodput", "draft_ms", "silent_ms"):
        if not 0 <= getattr(wire, name) < math.inf:
            raise RemoteProtocolError(f"SessionStatus.{name} is {getattr(wire, name)}, not a number from 0 on")
    if wire.num_accepted > wire.num_drafted:
        raise RemoteProtocolError(
            f"SessionStatus has {wire.num_accepted} tokens accepted of {wire.num_drafted} drafted"
        )
    want = _enum("SessionStatus.want", Want, wire.want)
    return SessionStatus(**{name: getattr(wire, name) for name in _STATUS_FIELDS} | {"want": want})


def _open_to_wire(message: Open) -> pb.Open:
    return pb.Open(
        protocol=message.protocol,
        session_id=message.session_id,
        tokens=message.tokens,
        prompt_len=message.prompt_len,
        max_new_tokens=message.max_new_tokens,
        vocabulary=_fingerprint_to_wire(message.vocabulary),
        sampling=_sampling_to_wire(message.sampling),
        stop_ids=sorted(message.stop_ids),
        want=f"WANT_{message.want.name}",
        known_len=message.known_len,
        known_hash=message.known_hash,
    )


def _open_from_wire(wire: pb.Open) -> Open:
    session_id = wire.session_id
    if not (0 < len(session_id) <= MAX_SESSION_ID_CHARS and session_id.isascii() and session_id.isprintable()):
        raise RemoteProtocolError(f"Open.session_id is not 1 to {MAX_SESSION_ID_CHARS} printable ASCII characters")
    num_tokens = wire.known_len + len(wire.tokens)
    if num_tokens > MAX_SESSION_TOKENS:
        raise RemoteProtocolError(f"Open has {num_tokens} tokens; a session has at most {MAX_SESSION_TOKENS}")
    if not 1 <= wire.prompt_len <= num_tokens:
        raise RemoteProtocolError(f"Open.prompt_len is {wire.prompt_len}, not 1 to its {num_tokens} tokens")
    return Open(
        session_id=session_id,
        tokens=_tokens("Open.tokens", wire.tokens, MAX_SESSION_TOKENS),
        prompt_len=wire.prompt_len,
        max_new_tokens=_integer("Open.max_new_tokens", wire.max_new_tokens),
        vocabulary=_fingerprint_from_wire("Open.vocabulary", wire.vocabulary),
        sampling=_sampling_from_wire(wire.sampling),
        stop_ids=frozenset(_tokens("Open.stop_ids", wire.stop_ids, MAX_STOP_IDS)),
        want=_enum("Open.want", Want, wire.want),
        known_len=wire.known_len,
        known_hash=_integer("Open.known_hash", wire.known_hash, limit=_HASH_LIMIT),
        protocol=wire.protocol,
    )


def _sampling_to_wire(sampling: Sampling) -> pb.Sampling:
    return pb.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=None if sampling.top_p == 1 else sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=None if sampling.repetition_penalty == 1 else sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
    )


def _sampling_from_wire(wire: pb.Sampling) -> Sampling:
    top_p = wire.top_p if wire.HasField("top_p") else 1.0
    repetition_penalty = wire.repetition_penalty if wire.HasField("repetition_penalty") else 1.0
    # Written so that NaN fails each of them.
    ranges = {
        "temperature, at least 0": 0 <= wire.temperature < math.inf,
        "top_p, above 0 and at most 1": 0 < top_p <= 1,
        "min_p, 0 to 1": 0 <= wire.min_p <= 1,
        "repetition_penalty, above 0": 0 < repetition_penalty < math.inf,
        "presence_penalty, finite": math.isfinite(wire.presence_penalty),
        "frequency_penalty, finite": math.isfinite(wire.frequency_penalty),
    }
    for rule, holds in ranges.items():
        if not holds:
            raise RemoteProtocolError(f"Open.sampling is out of range: {rule}")
    return Sampling(
        temperature=wire.temperature,
        top_k=_integer("Open.sampling.top_k", wire.top_k),
        top_p=top_p,
        min_p=wire.min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        seed=wire.seed,
    )


def _draft_from_wire(wire: pb.Draft) -> Draft:
    if not wire.tokens:
        raise RemoteProtocolError("Draft has no tokens")
    if len(wire.confidence) not in (0, len(wire.tokens)):
        raise RemoteProtocolError(f"Draft.confidence has {len(wire.confidence)} bytes for {len(wire.tokens)} tokens")
    num_branches, length = len(wire.parents), len(wire.tokens)
    if num_branches > length:
        raise RemoteProtocolError(f"Draft has {num_branches} parents for {length} tokens")
    if any(parent > index for index, parent in enumerate(wire.parents, start=length - num_branches)):
        raise RemoteProtocolError("Draft.parents has a token that does not come before its child")
    return Draft(
        start=_integer("Draft.start", wire.start),
        parent_hash=_integer("Draft.parent_hash", wire.parent_hash, limit=_HASH_LIMIT),
        tokens=_tokens("Draft.tokens", wire.tokens, MAX_DRAFT_TOKENS),
        confidence=wire.confidence,
        parents=tuple([parent - 1 for parent in wire.parents]),
    )


def _commit_from_wire(wire: pb.Commit) -> Commit:
    # An edge reads one for each step: no field is read twice.
    tokens = _tokens("Commit.tokens", wire.tokens, MAX_SESSION_TOKENS)
    drafted, accepted, recycled, step_ms = wire.num_drafted, wire.num_accepted, wire.num_recycled, wire.step_ms
    if accepted > drafted or accepted > len(tokens):
        raise RemoteProtocolError(f"Commit.num_accepted is {accepted} of {drafted} drafted, with {len(tokens)} tokens")
    if recycled > (0 if drafted else len(tokens)):
        raise RemoteProtocolError(f"Commit.num_recycled is {recycled}, with {len(tokens)} tokens and {drafted} drafted")
    return Commit(
        start=_integer("Commit.start", wire.start),
        tokens=tokens,
        num_drafted=_integer("Commit.num_drafted", drafted),
        num_accepted=accepted,
        finish=_enum("Commit.finish", Finish, wire.finish),
        queue_ms=float(wire.queue_ms),
        verify_ms=float(wire.verify_ms),
        max_ahead=_integer("Commit.max_ahead", wire.max_ahead),
        hold_tokens=_integer("Commit.hold_tokens", wire.hold_tokens),
        is_holding=wire.is_holding,
        num_recycled=recycled,
        step_ms=_durations("Commit.step_ms", step_ms) if step_ms else (),
        next_rows=_integer("Commit.next_rows", wire.next_rows) if wire.HasField("next_rows") else None,
    )


def _heartbeat_to_wire(message: Heartbeat) -> pb.Heartbeat:
    return pb.Heartbeat(
        nonce=message.nonce, committed_len=message.committed_len, draft_ms=message.draft_ms, rtt_ms=message.rtt_ms,
        read_tokens=message.read_tokens,
    )  # fmt: skip


def _heartbeat_from_wire(wire: pb.Heartbeat) -> Heartbeat:
    for name in ("draft_ms", "rtt_ms"):
        if not 0 <= getattr(wire, name) < math.inf:
            raise RemoteProtocolError(f"Heartbeat.{name} is {getattr(wire, name)}, not a duration")
    lengths = {name: _integer(f"Heartbeat.{name}", getattr(wire, name)) for name in ("committed_len", "read_tokens")}
    return Heartbeat(nonce=wire.nonce, draft_ms=wire.draft_ms, rtt_ms=wire.rtt_ms, **lengths)


def _fingerprint_to_wire(fingerprint: Fingerprint) -> pb.Fingerprint:
    return pb.Fingerprint(size=fingerprint.size, digest=fingerprint.digest)


def _fingerprint_from_wire(name: str, wire: pb.Fingerprint) -> Fingerprint:
    if not 1 <= len(wire.digest) <= MAX_DIGEST_BYTES:
        raise RemoteProtocolError(f"{name}.digest has {len(wire.digest)} bytes, not 1 to {MAX_DIGEST_BYTES}")
    return Fingerprint(size=_integer(f"{name}.size", wire.size, minimum=1), digest=wire.digest)


def _tokens(name: str, wire: Iterable[int], most: int) -> tuple[int, ...]:
    tokens = tuple(wire)
    if len(tokens) > most:
        raise RemoteProtocolError(f"{name} has {len(tokens)} tokens; at most {most} are allowed")
    # A negative id cannot be told apart: as a uint32 it is beyond the limit too.
    if max(tokens, default=0) >= _INT_LIMIT:
        raise RemoteProtocolError(f"{name} has a token id that is negative or not below 2^31")
    return tokens


def _integer(name: str, value: int, *, minimum: int = 0, limit: int = _INT_LIMIT) -> int:
    if not minimum <= value < limit:
        raise RemoteProtocolError(f"{name} is {value}, not {minimum} to {limit - 1}")
    return value


def _durations(name: str, wire: Iterable[float]) -> tuple[float, ...]:
    durations = tuple(wire)
    if not all(0 < duration_ms < math.inf for duration_ms in durations):
        raise RemoteProtocolError(f"{name} is {list(durations)}, not durations")
    return durations


def _enum(name: str, kind: type[_E], value: int) -> _E:
    try:
        return kind(value)
    except ValueError:
        raise RemoteProtocolError(f"{name} is {value}, which this version does not know") from None
