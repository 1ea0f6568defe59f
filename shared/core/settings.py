"""What a session is asked for and what each side's operator sets, as the core needs it. Durations in ms."""

from dataclasses import dataclass
from enum import Enum

from shared.core.link import LinkSettings
from shared.core.messages import Fingerprint, Finish, Open, Sampling, Want
from shared.core.tokens import TokenLog


class OnDisconnect(Enum):
    """What the user sees while the link is down: local tokens, a pause, or an error."""

    CONTINUE = "continue"
    PAUSE = "pause"
    FAIL = "fail"


class OnReconnect(Enum):
    """What becomes of local tokens when the link returns."""

    CONTINUE = "continue"
    REVISE = "revise"


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to produce."""

    session_id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    vocabulary: Fingerprint
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    want: Want = Want.SPECULATE

    @property
    def limit(self) -> int:
        """Length of the log at which the text ends."""
        return len(self.prompt) + self.max_new_tokens

    def ending(self, log: TokenLog) -> Finish:
        """How the log as it stands ends the text."""
        if len(log) > len(self.prompt) and log[len(log) - 1] in self.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if len(log) >= self.limit else Finish.NONE

    def is_drafted(self, log: TokenLog) -> bool:
        """Whether a verifier could end the text with these drafts: the last token is its own."""
        return len(log) + 1 >= self.limit or self.ending(log) is not Finish.NONE

    def open(self, log: TokenLog, known_len: int, opened_len: int) -> Open:
        """The Open that hands the first `opened_len` tokens over, `known_len` of them by hash."""
        return Open(
            session_id=self.session_id,
            tokens=log.tokens(known_len, opened_len),
            prompt_len=len(self.prompt),
            max_new_tokens=self.max_new_tokens,
            vocabulary=self.vocabulary,
            sampling=self.sampling,
            stop_ids=self.stop_ids,
            want=self.want,
            known_len=known_len,
            known_hash=log.hash_at(known_len),
        )


@dataclass(frozen=True, slots=True)
class EdgeSettings:
    """How the session treats its link. Durations in ms. `offline`: never dial."""

    link: LinkSettings = LinkSettings()
    patience_ms: float = 5_000.0
    connect_timeout_ms: float = 700.0
    backoff_initial_ms: float = 50.0
    backoff_max_ms: float = 250.0
    on_disconnect: OnDisconnect = OnDisconnect.CONTINUE
    on_reconnect: OnReconnect = OnReconnect.CONTINUE
    offline: bool = False


class SelfDecode(Enum):
    """When the verifier decodes without drafts."""

    OFF = "off"
    IDLE = "idle"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class CloudSettings:
    """What an operator sets for every session. Durations in ms."""

    context_length: int
    self_decode: SelfDecode = SelfDecode.IDLE
    max_draft_rows: int = 16
    max_pending_tokens: int = 256
    window_tokens: int = 128
    starved_after_ms: float = 500.0


@dataclass(frozen=True, slots=True)
class TableSettings:
    """Limits over all sessions. Durations in ms.

    `cache_blocks` and `cache_sessions` are what the engine's cache takes; a session that has been served within
    `residency_ms` and has more to do is not evicted from it. `max_active_sessions` bounds those that have something to
    do, `max_pending_in_all` the draft tokens held for all sessions together. `step_ms[i]` is how long a step of i + 1
    rows of one session is expected to take, as far as there are any; edges are told.
    """

    session: CloudSettings
    vocabulary: Fingerprint
    cache_blocks: int
    step_ms: tuple[float, ...] = ()
    cache_sessions: int = 1 << 20
    max_sessions: int = 256
    max_active_sessions: int = 1 << 20
    max_pending_in_all: int = 16_384
    max_new_tokens: int = 4096
    share_across_identities: bool = False
    idle_timeout_ms: float = 30_000.0
    park_timeout_ms: float = 300_000.0  # how long a session's tokens and cache are kept after its stream is gone
    residency_ms: float = 2_000.0
    retry_after_ms: int = 1_000
