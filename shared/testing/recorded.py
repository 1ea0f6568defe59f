"""A target and drafts that replay what a real pair once did, at a given speed: load tests without a model.

A recording holds texts of a real target and, at each position, what a real draft model proposed after the true prefix,
with its confidence. Played back, the target selects the recorded tokens and a draft is right where it was right then;
only the durations are made up. Behind a wrong draft token the replayed draft has nothing but token 0, which the texts
never come back to, as real ones do: of what such a path is still good for, nothing is claimed.

A session's prompt says what it plays: stream, offset into it, and two tokens that make it unlike all others
(`Recording.prompt`). A text that is longer than its stream begins it again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.core.effects import Rows
from shared.core.errors import LocalProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS
from shared.core.messages import Fingerprint, Sampling
from shared.engine import Capabilities, Proposal, TargetLimits

SMOLLM2 = Path(__file__).parent / "recordings" / "smollm2_135m.npz"
_MAX_CONTEXT = 1 << 20
_NUMBERS = 30_000  # sessions are numbered in this base, which is below any vocabulary in use


@dataclass(frozen=True)
class Recording:
    """Texts of a target and the proposals of draft models, each array of shape (streams, positions).

    `drafts` and `confidences` are by draft model; a confidence is the draft's own probability of its token, in 255ths.
    """

    vocabulary_size: int
    tokens: NDArray[np.uint16]
    drafts: dict[str, NDArray[np.uint16]]
    confidences: dict[str, NDArray[np.uint8]]

    @classmethod
    def load(cls, file: Path = SMOLLM2) -> "Recording":
        """Read a file that `scripts/record` wrote."""
        with np.load(file) as found:
            arrays: dict[str, NDArray[Any]] = dict(found)
        names = [name.removeprefix("draft_") for name in arrays if name.startswith("draft_")]
        return cls(
            vocabulary_size=int(arrays["vocabulary_size"]),
            tokens=arrays["tokens"],
            drafts={name: arrays[f"draft_{name}"] for name in names},
            confidences={name: arrays[f"confidence_{name}"] for name in names},
        )

    def save(self, file: Path) -> None:
        """Write the file."""
        arrays: dict[str, Any] = {f"draft_{name}": drafts for name, drafts in self.drafts.items()}
        arrays |= {f"confidence_{name}": confidences for name, confidences in self.confidences.items()}
        np.savez_compressed(file, vocabulary_size=np.array(self.vocabulary_size), tokens=self.tokens, **arrays)

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the vocabulary by its size alone."""
        return Fingerprint(self.vocabulary_size, b"recorded")

    @property
    def num_streams(self) -> int:
        """Recorded texts."""
        return len(self.tokens)

    def acceptance(self, draft: str) -> float:
        """The fraction of positions at which this draft proposed what the target said."""
        return float((self.drafts[draft] == self.tokens).mean())

    def prompt(self, number: int, length: int, offset: int = 0) -> tuple[int, ...]:
        """The prompt of session `number`, of `length` tokens: it plays stream `number` modulo their count."""
        if length < 4:
            raise ValueError(f"a prompt that says what to play has 4 tokens or more, not {length}")
        unique = number % _NUMBERS, number // _NUMBERS
        return (number % self.num_streams, offset, *unique, *[0] * (length - 4))

    def text(self, prompt: Sequence[int], length: int) -> tuple[int, ...]:
        """The first `length` tokens that the target says after this prompt."""
        stream, offset = prompt[:2]
        return tuple(np.resize(np.roll(self.tokens[stream], -offset), length).tolist())


@dataclass(slots=True)
class _Played:
    """What the engine knows of one session; `stream` and `offset` are its first two tokens, once it has them."""

    cached: int = 0
    head: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()  # of the last forward's rows, until they are kept


class RecordedTarget:
    """A `TargetEngine` that says what the recording's target said; a forward takes `step_ms(rows, sessions)`.

    It checks the cache rule on every forward, and sleeps without the interpreter's lock like an accelerator's driver.
    """

    def __init__(
        self,
        recording: Recording,
        step_ms: Callable[[int, int], float],
        cache_tokens: int = 1 << 20,
        max_rows: int = 4096,
    ) -> None:
        self._recording = recording
        self._streams = [stream.tolist() for stream in recording.tokens]
        self._step_ms = step_ms
        self._limits = TargetLimits(max_rows, cache_tokens - cache_tokens % BLOCK_TOKENS, cache_sessions=1 << 20)
        self._sessions: dict[str, _Played] = {}

    @property
    def capabilities(self) -> Capabilities:
        """Everything."""
        return Capabilities(can_rollback=True, can_tree=True, max_context=_MAX_CONTEXT)

    @property
    def limits(self) -> TargetLimits:
        """As given."""
        return self._limits

    @property
    def fingerprint(self) -> Fingerprint:
        """The recording's."""
        return self._recording.fingerprint

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        """See `TargetEngine`; takes as long as the emulated target would."""
        began = time.perf_counter()
        selected = [self._forward(rows) for rows in batch]
        took_s = self._step_ms(sum(len(rows.tokens) for rows in batch), len(batch)) / 1000
        time.sleep(max(0.0, took_s - (time.perf_counter() - began)))
        return selected

    def keep(self, session_id: str, start: int, rows: Sequence[int]) -> None:
        """See `TargetEngine`."""
        session = self._sessions[session_id]
        if any(session.parents[row] != parent for parent, row in zip((-1, *rows), rows, strict=False)):
            raise LocalProtocolError(f"{session_id}: rows {tuple(rows)} are no path in {session.parents}")
        session.cached, session.parents = start + len(rows), ()

    def truncate(self, session_id: str, length: int) -> None:
        """See `TargetEngine`."""
        session = self._sessions[session_id]
        if length > session.cached:
            raise LocalProtocolError(f"{session_id}: truncated to {length}, {session.cached} are cached")
        session.cached = length

    def share(self, session_id: str, source_id: str, length: int) -> None:
        """See `TargetEngine`."""
        source = self._sessions[source_id]
        if length > source.cached or length % BLOCK_TOKENS or session_id in self._sessions:
            raise LocalProtocolError(f"{session_id}: cannot share {length} of {source.cached} tokens")
        self._sessions[session_id] = _Played(length, source.head)

    def release(self, session_id: str) -> None:
        """See `TargetEngine`."""
        self._sessions.pop(session_id, None)

    def cost_ms(self, rows: int) -> float:
        """As if each row were a session's own, up to a row for each of 64 sessions."""
        return self._step_ms(rows, min(rows, 64))

    def _forward(self, rows: Rows) -> tuple[int, ...]:
        session = self._sessions.setdefault(rows.session_id, _Played())
        if rows.start != session.cached:
            raise LocalProtocolError(f"{rows.session_id}: rows from {rows.start}, {session.cached} tokens are cached")
        if len(session.head) < 2:
            session.head = (*session.head, *rows.tokens)[:2]
        session.parents = rows.parents
        session.cached += len(rows.tokens)
        first = rows.first_selected
        if first == len(rows.tokens):
            return ()
        stream = self._streams[session.head[0]]
        shift = session.head[1] - rows.prompt_len + 1  # from a row's position to that of what it selects
        positions: list[int] = []
        for parent in rows.parents:
            positions.append(rows.start if parent < 0 else positions[parent] + 1)
        return tuple(stream[(position + shift) % len(stream)] for position in positions[first:])


class RecordedDraft:
    """A `DraftEngine` that proposes what a recorded draft model did. It takes no time: its driver waits."""

    def __init__(self, recording: Recording, draft: str) -> None:
        self._recording = recording
        self._all_drafts, self._all_confidences = recording.drafts[draft], recording.confidences[draft]
        self._texts = recording.tokens
        self._drafts, self._confidences = list[int](), list[float]()  # of the stream that is played
        self._is_right = list[bool]()
        self._offset = self._prompt_len = self._length = 0
        self._right_len = _MAX_CONTEXT  # of the list, as far as it is the text

    @property
    def capabilities(self) -> Capabilities:
        """Everything but trees."""
        return Capabilities(can_rollback=True, can_tree=False, max_context=_MAX_CONTEXT)

    @property
    def fingerprint(self) -> Fingerprint:
        """The recording's."""
        return self._recording.fingerprint

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """See `DraftEngine`."""
        stream, self._offset = tokens[:2]
        self._drafts = self._all_drafts[stream].tolist()
        self._confidences = (self._all_confidences[stream] / 255).tolist()
        self._is_right = (self._all_drafts[stream] == self._texts[stream]).tolist()
        self._prompt_len, self._length, self._right_len = prompt_len, len(tokens), _MAX_CONTEXT

    def extend(self, tokens: Sequence[int]) -> None:
        """See `DraftEngine`."""
        self._length += len(tokens)

    def propose(self, n: int) -> Proposal:
        """See `DraftEngine`."""
        begin = self._offset + self._length - self._prompt_len
        tokens, confidences = list[int](), list[float]()
        for index in (position % len(self._drafts) for position in range(begin, begin + n)):
            tokens.append(self._drafts[index] if self._length < self._right_len else 0)
            confidences.append(self._confidences[index])
            if not self._is_right[index]:
                self._right_len = min(self._right_len, self._length + 1)
            self._length += 1
        return Proposal(tuple(tokens), tuple(confidences))

    def rollback(self, length: int) -> None:
        """See `DraftEngine`."""
        if length > self._length:
            raise LocalProtocolError(f"rollback to {length} of a draft engine with {self._length} tokens")
        self._length = length
        self._right_len = self._right_len if length >= self._right_len else _MAX_CONTEXT

    def close(self) -> None:
        """See `DraftEngine`."""
