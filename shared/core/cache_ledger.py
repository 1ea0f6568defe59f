"""Whose tokens lie in the target's cache: what a session finds there, who must make room, what is kept for a return.

The ledger never touches a tensor. It keeps its own `KvBlocks`, in step with the engine's cache because both get the
same operations in the same order, and says what the engine must do as effects.

A session finds its own parked cache, as far as its tokens are the same, or begins with the longest prefix that another
session of its scope has in the cache: a system prompt, the earlier turns of a chat. Scopes keep identities apart.

When a step is short of blocks, whole caches are evicted, each of them rebuilt from tokens if it is ever needed again:
first parked sessions, the longest parked first; then live ones that have nothing to do, the least recently served
first; then live ones that have been in the cache for the residency time. So sessions that do not fit together take
turns: none is evicted at every step, and none waits for ever.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from shared.core.cloud_session import CloudSession
from shared.core.effects import CloudEffect, Release, Share, Truncate
from shared.core.errors import LocalProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS, KvBlocks, num_blocks
from shared.core.settings import TableSettings
from shared.core.tokens import TokenLog


@dataclass(frozen=True, slots=True)
class Parked:
    """A session without a stream."""

    key: str
    log: TokenLog
    cached_len: int
    since: float


class CacheLedger:
    """Live and parked sessions and their blocks; see the module's theory of operation."""

    def __init__(self, settings: TableSettings) -> None:
        self.num_evicted = 0
        self._settings = settings
        self._blocks = KvBlocks(settings.cache_blocks)
        self._live: dict[str, CloudSession] = {}  # the least recently served first
        self._parked: dict[str, Parked] = {}  # the longest parked first
        self._resident_since: dict[str, float] = {}
        self._scopes: dict[str, str] = {}
        self._beginnings: dict[tuple[str, int], dict[str, None]] = {}  # (scope, hash of the first block) -> keys

    def __repr__(self) -> str:
        return f"<CacheLedger {len(self._live)} live, {len(self._parked)} parked, {self._blocks!r}>"

    @property
    def live(self) -> list[CloudSession]:
        """Sessions that a stream serves, finished ones included; the least recently served first."""
        return list(self._live.values())

    @property
    def num_parked(self) -> int:
        """Sessions that wait for their edge to come back."""
        return len(self._parked)

    @property
    def used_blocks(self) -> int:
        """Blocks that hold somebody's tokens."""
        return self._blocks.num_blocks - self._blocks.num_free

    def session(self, key: str) -> CloudSession | None:
        """The live session with this key."""
        return self._live.get(key)

    def parked_log(self, key: str) -> TokenLog:
        """The tokens of a parked session; empty where there is none."""
        parked = self._parked.get(key)
        return TokenLog() if parked is None else parked.log

    def has_room(self, log_len: int) -> bool:
        """Whether another session of this length fits beside those that have something to do."""
        active = sum(num_blocks(len(session.log)) for session in self._live.values() if session.is_active)
        return active + num_blocks(log_len) <= self._settings.cache_blocks

    def find(self, key: str, identity: str, log: TokenLog, now: float) -> tuple[int, list[CloudEffect]]:
        """A session opens with these tokens: how many of them are cached for it now, at most all but the last.

        The session must not be live; `opened` must follow.
        """
        scope = "" if self._settings.share_across_identities else identity
        own_len, effects = 0, list[CloudEffect]()
        parked = self._parked.pop(key, None)
        if parked is not None:
            self._unlist(key, parked.log)
            own_len = min(parked.cached_len, parked.log.match(0, log.tokens()), len(log) - 1)
        self._scopes[key] = scope
        source, shared_len = self._longest_prefix(scope, log)
        if key in self._blocks and (shared_len >= own_len + BLOCK_TOKENS or not own_len):
            effects.append(self._release(key))
        elif key in self._blocks:
            shared_len = 0
            if own_len < self._blocks.length(key):
                own_len = self._blocks.cut(key, own_len)
                effects.append(Truncate(key, own_len))
        if shared_len and len(self._blocks) < self._settings.cache_sessions:
            own_len = self._blocks.share(key, source, shared_len)
            self._resident_since[key] = now
            effects.append(Share(key, source, own_len))
        return own_len, effects

    def opened(self, session: CloudSession) -> list[CloudEffect]:
        """The session that `find` was for is live."""
        self._live[session.key] = session
        self._list(session.key, session.log)
        return self._trim()

    def park(self, session: CloudSession, now: float) -> list[CloudEffect]:
        """A live session lost its stream: keep its tokens and cache for its return, at the cost of older ones."""
        del self._live[session.key]
        self._unlist(session.key, session.log)
        self._parked[session.key] = Parked(session.key, session.log, session.cached_len, now)
        self._list(session.key, session.log)
        return self._trim()

    def expire(self, now: float) -> list[CloudEffect]:
        """Forget sessions that were parked for too long."""
        effects: list[CloudEffect] = []
        while self._parked:
            oldest = next(iter(self._parked.values()))
            if oldest.since + self._settings.park_timeout_ms / 1000 > now:
                break
            effects += self._forget(oldest.key)
        return effects

    def wake_at(self) -> float | None:
        """When `expire` has something to do."""
        oldest = next(iter(self._parked.values()), None)
        return None if oldest is None else oldest.since + self._settings.park_timeout_ms / 1000

    def make_room(self, session: CloudSession, num_rows: int, now: float, effects: list[CloudEffect]) -> bool:
        """Blocks for a step's rows of a session; what others lose for that is added to `effects`.

        Sessions of the step in the making keep their caches. False where there is no room; then `room_at` tells when
        to ask again.
        """
        key, length = session.key, session.cached_len + num_rows
        if key in self._resident_since and self._blocks.resize(key, length):  # as mostly
            return True
        victims: Iterator[str] | None = None
        while not self._fits(key, length):
            victims = victims or self._victims(key, now)
            victim = next(victims, None)
            if victim is None:
                return False
            effects += self._evict(victim)
        self._resident_since.setdefault(key, now)
        return True

    def served(self, session: CloudSession) -> None:
        """A step of the session is over: its cache holds `cached_len` tokens, and it is the last to be evicted."""
        if self._blocks.cut(session.key, session.cached_len) != session.cached_len:
            raise LocalProtocolError(f"{session!r} wrote into shared blocks")
        self._live[session.key] = self._live.pop(session.key)

    def dropped(self, session: CloudSession) -> list[CloudEffect]:
        """What the engine holds of a live session is of no use any more."""
        return [self._release(session.key)] if session.key in self._blocks else []

    def room_at(self, session: CloudSession) -> float:
        """When the residency of some other session ends; infinity where there is none."""
        since = [self._resident_since[key] for key in self._live if key in self._resident_since and key != session.key]
        return min(since, default=inf) + self._settings.residency_ms / 1000

    def check_integrity(self) -> None:
        """Raise `LocalProtocolError` where the books do not agree. For when there is nothing to do."""
        self._blocks.check_integrity()

    def _fits(self, key: str, length: int) -> bool:
        has_place = key in self._blocks or len(self._blocks) < self._settings.cache_sessions
        return has_place and self._blocks.resize(key, length)

    def _victims(self, key: str, now: float) -> Iterator[str]:
        yield from list(self._parked)
        others = [
            other
            for other in self._live.values()
            if other.key in self._blocks and other.key != key and not other.is_stepping
        ]
        yield from [other.key for other in others if not other.is_active]
        residency_s = self._settings.residency_ms / 1000
        for other in others:
            if other.is_active and self._resident_since[other.key] + residency_s <= now:
                yield other.key

    def _trim(self) -> list[CloudEffect]:
        """Forget the longest parked sessions where there are too many."""
        effects: list[CloudEffect] = []
        while self._parked and len(self._parked) + len(self._live) > self._settings.max_sessions:
            effects += self._forget(next(iter(self._parked)))
        return effects

    def _evict(self, key: str) -> list[CloudEffect]:
        self.num_evicted += 1
        session = self._live.get(key)
        if session is None:
            return self._forget(key)
        session.evicted()
        return [self._release(key)]

    def _forget(self, key: str) -> list[CloudEffect]:
        parked = self._parked.pop(key)
        self._unlist(key, parked.log)
        del self._scopes[key]
        return [self._release(key)] if key in self._blocks else []

    def _release(self, key: str) -> Release:
        self._blocks.release(key)
        self._resident_since.pop(key, None)
        return Release(key)

    # -- prefixes ---------------------------------------------------------------------------------------------------

    def _list(self, key: str, log: TokenLog) -> None:
        if len(log) > BLOCK_TOKENS:
            self._beginnings.setdefault((self._scopes[key], log.hash_at(BLOCK_TOKENS)), {})[key] = None

    def _unlist(self, key: str, log: TokenLog) -> None:
        if len(log) > BLOCK_TOKENS:
            beginning = (self._scopes[key], log.hash_at(BLOCK_TOKENS))
            keys = self._beginnings.get(beginning, {})
            keys.pop(key, None)
            if not keys:
                self._beginnings.pop(beginning, None)

    def _longest_prefix(self, scope: str, log: TokenLog) -> tuple[str, int]:
        """Who has the most whole blocks of this log cached, and how many tokens that is."""
        best, best_len = "", 0
        if len(log) <= BLOCK_TOKENS:
            return best, best_len
        for key in self._beginnings.get((scope, log.hash_at(BLOCK_TOKENS)), ()):
            other = self._live.get(key) or self._parked[key]
            most = min(other.cached_len, len(log) - 1) // BLOCK_TOKENS
            low, high = best_len // BLOCK_TOKENS, most  # the prefix of `low` blocks is no longer than what we have
            while low < high:
                middle = (low + high + 1) // 2
                length = middle * BLOCK_TOKENS
                if other.log.hash_at(length) == log.hash_at(length):
                    low = middle
                else:
                    high = middle - 1
            if low * BLOCK_TOKENS > best_len:
                best, best_len = key, low * BLOCK_TOKENS
        return best, best_len
