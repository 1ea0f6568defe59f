"""What a driver must do: the outputs of the edge and cloud state machines, as data.

The machines never await, read a clock or call a model. Each input method returns a list of effects, to be carried out
in order; engine effects (`Draft`, `Rollback`) go to one worker in order, so a rollback lands after the draft before it.
"""

from dataclasses import dataclass
from enum import Enum

from shared.core.messages import CloudMessage, EdgeMessage, Finish, Sampling


class Provenance(Enum):
    """Where an emitted token came from."""

    ACCEPTED = "accepted"  # drafted here, accepted by the target
    CLOUD = "cloud"  # the target's own next_token
    LOCAL = "local"  # drafted here, shown without the cloud


@dataclass(frozen=True, slots=True)
class Send:
    """Put a message on the stream with this number; a stream that is gone drops it."""

    stream: int
    message: EdgeMessage | CloudMessage


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a new stream, on a fresh connection where `fresh`; report `connected` or `disconnected` with its number."""

    stream: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Drop this stream without waiting for anything; what it still delivers is ignored."""

    stream: int


@dataclass(frozen=True, slots=True)
class Draft:
    """Run the draft engine: extend it by `feed`, propose up to `n` tokens; report `drafted(start, parent_hash, ...)`.

    `start` is the position of the first proposed token and `parent_hash` the hash of the prefix that it extends.
    """

    start: int
    parent_hash: int
    feed: tuple[int, ...]
    n: int


@dataclass(frozen=True, slots=True)
class Rollback:
    """Roll the draft engine back to its first `length` tokens."""

    length: int


@dataclass(frozen=True, slots=True)
class Emit:
    """Show tokens for positions `start`, ... to the user; one provenance each. LOCAL ones are unverified."""

    start: int
    tokens: tuple[int, ...]
    provenance: tuple[Provenance, ...]


@dataclass(frozen=True, slots=True)
class Confirm:
    """Tokens before `length` that were shown as local are now verified (`on_reconnect: revise`)."""

    length: int


@dataclass(frozen=True, slots=True)
class Retract:
    """Take back what was shown from position `length` on; all of it was unverified (`on_reconnect: revise`)."""

    length: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The verifier will not serve this session; `detail` is one line for the user. The session goes on without it."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The session's text is complete, or given up (`error` set); nothing follows."""

    finish: Finish
    error: str = ""


EdgeEffect = Send | Connect | Disconnect | Draft | Rollback | Emit | Confirm | Retract | Refused | Finished


@dataclass(slots=True)
class Rows:
    """One session's part of the next target step (`TargetEngine.forward`); not frozen: each step makes hundreds.

    Row i evaluates `tokens[i]` on top of the cached prefix (`start` tokens) and its ancestors: `parents[i]` is the
    index of its parent row, -1 for the cached prefix itself; a parent precedes its child. So the absolute position of
    row i is `start` + its depth. A chain has `parents == (-1, 0, 1, ...)`. Only rows from `first_selected` on get a
    selected token.
    """

    session_id: str
    start: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    first_selected: int
    sampling: Sampling
    prompt_len: int


@dataclass(frozen=True, slots=True)
class EndStream:
    """The verifier is done with this stream: finish the call after what was sent."""

    stream: int


@dataclass(frozen=True, slots=True)
class Keep:
    """`TargetEngine.keep`: what stands of the last forward."""

    session_id: str
    start: int
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Truncate:
    """`TargetEngine.truncate`."""

    session_id: str
    length: int


@dataclass(frozen=True, slots=True)
class Release:
    """`TargetEngine.release`."""

    session_id: str


@dataclass(frozen=True, slots=True)
class Share:
    """`TargetEngine.share`: the session's cache begins as the first `length` tokens of another's."""

    session_id: str
    source_id: str
    length: int


CloudEffect = Send | EndStream | Keep | Truncate | Release | Share
