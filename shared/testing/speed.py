"""How fast a pair is by the clock of a simulation: the real machines, with given durations, and nothing that fails.

`shared.testing.world` asks whether the machines are right whatever happens; this asks how fast they and their policies
are where nothing does. Models are replaced by a `Script` of who says what, so that two policies can be compared on the
same luck, and a token costs some microseconds.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from random import Random

from shared import wire
from shared.core import effects as fx
from shared.core.draft_path import Learnt
from shared.core.edge_session import EdgeSession
from shared.core.messages import CloudMessage, Commit, EdgeMessage, Fingerprint, Want
from shared.core.policies import DraftPolicy, StepPolicy
from shared.core.session_table import SessionTable
from shared.core.settings import CloudSettings, EdgeSettings, Request, TableSettings

PROMPT = (1, 2)
FRAME_BYTES = 76  # around a message: gRPC 5, HTTP/2 9, TLS 22, TCP/IP 40
FEED_SHARE = 0.05  # a token that is fed takes this part of one that is drafted
_VOCABULARY = Fingerprint(size=1 << 14, digest=b"script")
WRONG = _VOCABULARY.size - 1  # a token that is in no text
MARGIN = 64  # tokens of a script behind the end of the text: the edge drafts beyond it


@dataclass(frozen=True, slots=True)
class Script:
    """What the target says after the prompt, what the draft model proposes at each position, and how sure it is.

    Behind a wrong token the draft proposes `WRONG` ones only: the text never comes back to a path that it has left.
    """

    tokens: Sequence[int]
    drafts: Sequence[int]
    confidences: Sequence[float]

    @classmethod
    def of_acceptance(cls, acceptance: float, length: int, seed: int) -> "Script":
        """Drafts that are right with one probability at every position; with one seed, more often at a higher one."""
        random = Random(seed)
        return cls.of_drafts([random.random() < acceptance for _ in range(length)], [0.8] * length)

    @classmethod
    def of_drafts(cls, is_right: Sequence[bool], confidences: Sequence[float]) -> "Script":
        """Drafts that are right where it says so; the text repeats no token, so there is nothing to look up in it."""
        tokens = [1 + max(PROMPT) + index for index in range(len(is_right))]
        assert tokens[-1] < WRONG, "the vocabulary has no more tokens"
        drafts = [token if right else WRONG for token, right in zip(tokens, is_right, strict=True)]
        return cls(tokens, drafts, confidences)

    @property
    def is_right(self) -> list[bool]:
        """Where the draft proposes what the target says."""
        return [token == draft for token, draft in zip(self.tokens, self.drafts, strict=True)]


@dataclass(frozen=True, slots=True)
class Situation:
    """What takes how long: a drafted token, a round trip, a forward by its rows. `rate` of the uplink in bytes/ms.

    Reading the prompt takes the edge and the verifier so much on top of the first draft and the first step.
    """

    draft_ms: float
    rtt_ms: float
    cost_ms: Sequence[float]
    rate: float = inf
    edge_prompt_ms: float = 0.0
    cloud_prompt_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Speed:
    """What a run came to, from the commit at which measuring began to the last one."""

    tpot_ms: float
    messages_up_per_s: float
    messages_down_per_s: float
    drafted_tokens: int
    committed_tokens: int


@dataclass(slots=True)
class _Course:
    """Marks of a run while it is measured."""

    since: float = 0.0
    until: float = 0.0
    first_len: int = 0
    last_len: int = 0
    messages_up: int = 0
    messages_down: int = 0
    drafted: int = 0


class TimedPair:
    """One edge and one verifier; `run` plays one answer."""

    def __init__(
        self,
        situation: Situation,
        script: Script,
        draft_policy: DraftPolicy,
        step_policy: StepPolicy,
        cloud: CloudSettings | None = None,
        want: Want = Want.SPECULATE,
        learnt: Learnt | None = None,
    ) -> None:
        self.now = 0.0
        self._situation = situation
        self._script = script
        length = len(script.tokens) - MARGIN
        request = Request("s", PROMPT, length, _VOCABULARY, want=want)
        cloud = cloud or CloudSettings(context_length=1 << 20)
        step_ms = tuple(situation.cost_ms[1 : cloud.max_draft_rows + 2])
        settings = TableSettings(cloud, _VOCABULARY, cache_blocks=1 << 12, step_ms=step_ms)
        self.edge = EdgeSession(request, EdgeSettings(), draft_policy, learnt)
        self.table = SessionTable(settings, step_policy)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._queue: deque[fx.Draft] = deque()
        self._is_drafting = False
        self._edge_wakes_at = self._cloud_wakes_at = inf
        self._uplink_free_at = 0.0
        self._is_over = False
        self._course = _Course()

    def run(self, warm_up_tokens: int) -> Speed:
        """Play the answer; what comes before the commit that reaches `warm_up_tokens` is not measured."""
        self._warm_len = len(PROMPT) + warm_up_tokens
        self._enact(self.edge.start(0.0))
        while not self._is_over:
            self.now, _, action = heapq.heappop(self._events)
            action()
        course = self._course
        seconds, tokens = course.until - course.since, course.last_len - course.first_len
        return Speed(
            seconds * 1000 / tokens,
            course.messages_up / seconds,
            course.messages_down / seconds,
            course.drafted,
            tokens,
        )

    def _at(self, time: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (time, self._serial, action))

    # -- the edge's driver ------------------------------------------------------------------------------------------

    def _enact(self, effects: list[fx.EdgeEffect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(message=message):
                    assert isinstance(message, EdgeMessage)
                    self._course.messages_up += 1
                    self._at(self._lands_at(message), partial(self._cloud_receives, message))
                case fx.Draft():
                    self._queue.append(effect)
                case fx.Connect(stream=stream):
                    self.table.opened(stream, "edge", self.now)
                    self._at(self.now, lambda: self._enact(self.edge.connected(1, self.now)))
                case fx.Finished():
                    self._is_over = True
                case fx.Emit() | fx.Rollback():
                    pass
                case _:
                    raise AssertionError(f"{effect} where nothing fails")
        if self._queue and not self._is_drafting:
            draft = self._queue.popleft()
            self._is_drafting = True
            feed = min(len(draft.feed), draft.n)
            took_ms = self._situation.draft_ms * (draft.n + FEED_SHARE * feed)
            if draft.start == len(draft.feed):  # nothing was read before
                took_ms += self._situation.edge_prompt_ms
            self._course.drafted += draft.n
            self._at(self.now + took_ms / 1000, partial(self._drafted, draft))
        wakes_at = self.edge.wake_at()
        if wakes_at is not None and wakes_at != self._edge_wakes_at:
            self._edge_wakes_at = wakes_at
            self._at(max(wakes_at, self.now), partial(self._tick, wakes_at))

    def _tick(self, wakes_at: float) -> None:
        if self.edge.wake_at() == wakes_at:
            self._edge_wakes_at = inf
            self._enact(self.edge.tick(self.now))

    def _drafted(self, draft: fx.Draft) -> None:
        self._is_drafting = False
        start, log = draft.start - len(PROMPT), self.edge.path.log
        tokens = tuple(self._script.drafts[start : start + draft.n])
        right = 0 if log.tokens(draft.start - 1, draft.start) == (WRONG,) else (*tokens, WRONG).index(WRONG)
        tokens = tokens[:right] + (WRONG,) * (len(tokens) - right)
        confidences = tuple(self._script.confidences[start : start + draft.n])
        self._enact(self.edge.drafted(tokens, confidences, self.now))

    def _lands_at(self, message: EdgeMessage) -> float:
        size = FRAME_BYTES + wire.edge_to_wire(message).ByteSize()
        rate = self._situation.rate
        sent_at = self._uplink_free_at = max(self._uplink_free_at, self.now) + size / rate / 1000
        return sent_at + self._situation.rtt_ms / 2000

    # -- the verifier's driver --------------------------------------------------------------------------------------

    def _cloud_receives(self, message: EdgeMessage) -> None:
        self._cloud_enact(self.table.receive(1, message, self.now))

    def _cloud_enact(self, effects: list[fx.CloudEffect]) -> None:
        for effect in effects:
            if isinstance(effect, fx.Send):
                message = effect.message
                assert isinstance(message, CloudMessage)
                if isinstance(message, Commit):
                    self._committed(message)
                self._course.messages_down += 1
                message = wire.cloud_from_wire(wire.cloud_to_wire(message))  # it rounds durations
                self._at(self.now + self._situation.rtt_ms / 2000, partial(self._edge_receives, message))
        if not self.table.is_stepping:
            batch = self.table.plan(self.now).batch
            if batch:
                (rows,) = batch
                took_ms = self._situation.cost_ms[len(rows.tokens)]
                if not rows.start:
                    took_ms += self._situation.cloud_prompt_ms
                first = rows.start + rows.first_selected + 1 - len(PROMPT)
                selected = tuple(self._script.tokens[first : rows.start + len(rows.tokens) + 1 - len(PROMPT)])
                self._at(self.now + took_ms / 1000, lambda: self._stepped(selected, took_ms))
                return
        wakes_at = self.table.wake_at()
        if wakes_at is not None and wakes_at != self._cloud_wakes_at:
            self._cloud_wakes_at = wakes_at
            self._at(max(wakes_at, self.now), partial(self._cloud_tick, wakes_at))

    def _stepped(self, selected: tuple[int, ...], took_ms: float) -> None:
        self._cloud_enact(self.table.stepped([selected], took_ms, self.now))

    def _cloud_tick(self, wakes_at: float) -> None:
        self._cloud_wakes_at = inf
        if self.table.wake_at() == wakes_at:
            self._cloud_enact(self.table.tick(self.now))

    def _edge_receives(self, message: CloudMessage) -> None:
        self._enact(self.edge.receive(1, message, self.now))

    def _committed(self, commit: Commit) -> None:
        end = commit.start + len(commit.tokens)
        if end >= self._warm_len and not self._course.first_len:
            self._course = _Course(since=self.now, first_len=end)
        self._course.until, self._course.last_len = self.now, end
