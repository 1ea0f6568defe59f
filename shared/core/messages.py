"""What crosses the wire, as frozen dataclasses.

`shared.wire` is the only translator between these and protobuf; the field meanings are the same as in
`protos/outrider/v1/speculation.proto`. Token ids are non-negative ints, lengths and positions count tokens from the
start of the session (position 0 is the first prompt token), durations are milliseconds.
"""

from dataclasses import dataclass
from enum import Enum

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is selected from logits; together with the prompt it fixes the whole target stream.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0, `repetition_penalty` 1 and the two additive penalties 0
    each switch their filter off. `seed` is a 64-bit unsigned int and keys the selection noise.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    @property
    def has_penalties(self) -> bool:
        """Whether selection depends on the tokens before the position and not on the logits alone."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identity of a vocabulary: the number of real tokens (padded tail left out) and a digest over id -> bytes."""

    size: int
    digest: bytes


class Want(Enum):
    """What a session asks of the verifier."""

    SPECULATE = 1  # drafts will come; decode alone as the operator allows
    STREAM = 2  # cloud-only: no drafts will come, decode token by token


class Finish(Enum):
    """Why a session's text ended."""

    NONE = 0  # it goes on
    STOP = 1  # a stop token was selected
    LENGTH = 2  # max_new_tokens or the context length was reached


class FailureCode(Enum):
    """Why a verifier gives a session up. `is_final`: asking again will not help."""

    INTERNAL = 1
    RESOURCE_EXHAUSTED = 2
    PROTOCOL = 3
    UNAUTHENTICATED = 4
    VOCABULARY_MISMATCH = 5
    CONTEXT_LENGTH = 6
    INVALID_REQUEST = 7

    @property
    def is_final(self) -> bool:
        """True where the same request would be refused again."""
        return self not in (FailureCode.INTERNAL, FailureCode.RESOURCE_EXHAUSTED)


@dataclass(frozen=True, slots=True)
class Open:
    """Begin, or begin again, a session on this stream; any verifier can serve it.

    The tokens so far are the verifier's first `known_len` tokens of this session, whose prefix hash must be
    `known_hash`, followed by `tokens`. With `known_len` 0 (the default) `tokens` is everything.
    """

    session_id: str
    tokens: tuple[int, ...]
    prompt_len: int
    max_new_tokens: int
    vocabulary: Fingerprint
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    want: Want = Want.SPECULATE
    known_len: int = 0
    known_hash: int = 0
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens for positions `start`, `start + 1`, ...; they extend the prefix whose hash is `parent_hash`.

    `confidence` holds the draft model's own probability of each token, quantized to one byte (`tokens.quantize`); it is
    empty or as long as `tokens`. That of a sibling is given that the siblings before it are wrong.

    A tree is a chain with branches: the last tokens, as many as there are `parents`, each hang on the token with that
    index, -1 on the named prefix; those before them follow each other.
    """

    start: int
    parent_hash: int
    tokens: tuple[int, ...]
    confidence: bytes = b""
    parents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Liveness, RTT and acknowledgement; the verifier echoes it with its own `committed_len`.

    An edge tells its `draft_ms` and `rtt_ms` where they are news; 0: as it said before, or not known yet. A verifier
    that has yet to read a prompt, or to read a text again, tells how many tokens it has read; 0: all of them.
    """

    nonce: int
    committed_len: int
    draft_ms: float = 0.0
    rtt_ms: float = 0.0
    read_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Close:
    """The edge is done with the session."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """Target tokens for positions `start`, ...: `num_accepted` accepted drafts, then one next_token.

    `num_drafted` draft tokens were evaluated in this step. Where there were none, `num_recycled` tokens before the
    next_token were guessed by the verifier itself, from a rejected path or the text. `max_ahead` is how many tokens
    beyond `committed_len` the verifier is willing to hold pending; for the first `hold_tokens` of them a coming step
    waits for a time, which is the next one if the verifier `is_holding`. Else, where it is decided, that one has
    `next_rows` beside the last token's: drafts, or where there are none, maybe recycled ones. The first commit of a
    stream says what steps cost: `step_ms[i]` is the expected time of one with i such rows, alone.
    """

    start: int
    tokens: tuple[int, ...]
    num_drafted: int = 0
    num_accepted: int = 0
    finish: Finish = Finish.NONE
    queue_ms: float = 0.0
    verify_ms: float = 0.0
    max_ahead: int = 0
    hold_tokens: int = 0
    is_holding: bool = False
    num_recycled: int = 0
    next_rows: int | None = None
    step_ms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class NeedTokens:
    """The known prefix of the last Open does not stand here: open again with all tokens."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The verifier gives this session up; `detail` is for people."""

    code: FailureCode
    detail: str
    retry_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """One live session, for the operator's list. Lengths in tokens, `goodput` in tokens/s, times in ms.

    `session` is "identity/session_id". `state` is one of: prefill, waiting (for drafts or an acknowledgement), ready,
    stepping, finished. Counts are over the whole session; `silent_ms` is the time since its last message.
    """

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


EdgeMessage = Open | Draft | Heartbeat | Close
CloudMessage = Commit | NeedTokens | Heartbeat | Failure
