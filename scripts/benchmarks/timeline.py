"""What happens in an answer, noted where it happens on the edge: drafted, sent, committed, rolled back, shown.

Times are s of the monotonic clock. An engine's calls come from its own thread; appending to a list is safe there.
"""

import time
from collections.abc import Sequence
from typing import Any

from edge_agent.channel import Channel, Listener
from shared.core.messages import CloudMessage, Commit, Draft, EdgeMessage, Fingerprint, Sampling
from shared.engine import Capabilities, DraftEngine, Proposal

Notes = list[dict[str, Any]]


class NotingEngine:
    """A draft engine whose calls are noted."""

    def __init__(self, engine: DraftEngine, notes: Notes) -> None:
        self._engine = engine
        self._notes = notes
        self._length = 0

    @property
    def capabilities(self) -> Capabilities:
        """The engine's."""
        return self._engine.capabilities

    @property
    def fingerprint(self) -> Fingerprint:
        """The engine's."""
        return self._engine.fingerprint

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """See `DraftEngine`."""
        self._engine.reset(tokens, sampling, prompt_len)
        self._length = len(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """See `DraftEngine`."""
        self._engine.extend(tokens)
        self._length += len(tokens)

    def propose(self, n: int) -> Proposal:
        """See `DraftEngine`."""
        began = time.monotonic()
        proposal = self._engine.propose(n)
        note = {"event": "drafted", "began": began, "at": time.monotonic(), "start": self._length}
        self._notes.append(note | {"tokens": len(proposal.tokens)})
        self._length += len(proposal.tokens)
        return proposal

    def rollback(self, length: int) -> None:
        """See `DraftEngine`."""
        self._notes.append({"event": "rollback", "at": time.monotonic(), "start": length, "end": self._length})
        self._engine.rollback(length)
        self._length = length

    def close(self) -> None:
        """See `DraftEngine`."""
        self._engine.close()


class NotingChannel(Channel):
    """A channel whose drafts and commits are noted."""

    notes: Notes

    def send(self, stream: int, message: EdgeMessage) -> None:
        """See `Channel`."""
        if isinstance(message, Draft):
            note = {"event": "sent", "at": time.monotonic(), "start": message.start, "tokens": len(message.tokens)}
            self.notes.append(note)
        super().send(stream, message)

    def connect(self, stream: int, fresh: bool, listener: Listener) -> None:
        """See `Channel`."""
        super().connect(stream, fresh, _NotingListener(listener, self.notes))


class _NotingListener:
    def __init__(self, listener: Listener, notes: Notes) -> None:
        self._listener = listener
        self._notes = notes

    def connected(self, stream: int) -> None:
        self._listener.connected(stream)

    def received(self, stream: int, message: CloudMessage) -> None:
        if isinstance(message, Commit):
            note = {"event": "commit", "at": time.monotonic(), "start": message.start, "tokens": len(message.tokens)}
            note |= {"num_drafted": message.num_drafted, "num_accepted": message.num_accepted}
            self._notes.append(note | {"queue_ms": message.queue_ms, "verify_ms": message.verify_ms})
        self._listener.received(stream, message)

    def disconnected(self, stream: int) -> None:
        self._listener.disconnected(stream)
