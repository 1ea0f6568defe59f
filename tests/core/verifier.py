"""A session table and a toy target driven by hand, as the worker drives them, with checks after every move."""

from collections import defaultdict
from collections.abc import Container

from shared.core import effects as fx
from shared.core.kv_blocks import BLOCK_TOKENS
from shared.core.messages import CloudMessage, Commit, Draft, EdgeMessage, Failure, Open, Sampling
from shared.core.session_table import SessionTable
from shared.core.settings import CloudSettings, SelfDecode, TableSettings
from shared.core.tokens import TokenLog, next_hash
from shared.policy.scheduler import BestRate
from shared.testing.engines import TOY_VOCABULARY, HashModel, ToyTarget

MODEL = HashModel(salt=11)
SETTINGS = TableSettings(
    CloudSettings(context_length=200, self_decode=SelfDecode.ALWAYS, max_pending_tokens=32),
    TOY_VOCABULARY,
    cache_blocks=64,
    retry_after_ms=300,
)


def target_token(log: TokenLog, position: int) -> int:
    """The target's own token after this prefix of a log."""
    return MODEL.token(log.hash_at(position), log[position - 1], position, Sampling())


def target_text(prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    """What the target alone makes of a prompt, up to a length in all."""
    log = TokenLog(prompt)
    while len(log) < length:
        log.extend((target_token(log, len(log)),))
    return log.tokens()


def open_of(session_id: str, tokens: tuple[int, ...], max_new_tokens: int = 40) -> Open:
    return Open(session_id, tokens, len(tokens), max_new_tokens, TOY_VOCABULARY)


def draft_after(tokens: tuple[int, ...], drafted: tuple[int, ...], confidence: bytes = b"") -> Draft:
    prefix_hash = 0
    for token in tokens:
        prefix_hash = next_hash(prefix_hash, token)
    return Draft(len(tokens), prefix_hash, drafted, confidence)


class Verifier:
    """Carries effects out in the order in which the worker does: engine effects wait for the next forward."""

    def __init__(self, settings: TableSettings = SETTINGS, chunk_tokens: int = 64, max_rows: int = 256) -> None:
        self.now = 0.0
        self.target = ToyTarget(MODEL, cache_tokens=settings.cache_blocks * BLOCK_TOKENS)
        self.table = SessionTable(settings, BestRate(self.target.cost_ms, max_rows, chunk_tokens))
        self.sent: defaultdict[int, list[CloudMessage]] = defaultdict(list)
        self.live: set[int] = set()  # streams that neither side has ended
        self.effects: list[fx.CloudEffect] = []  # the engine's, since the beginning
        self.batch: list[fx.Rows] = []  # in flight
        self._settings = settings
        self._results: list[tuple[int, ...]] = []
        self._waiting: list[fx.CloudEffect] = []

    def open(self, stream: int, message: Open, identity: str = "me") -> None:
        """A new stream, and its Open."""
        self.connect(stream, identity)
        self.receive(stream, message)

    def connect(self, stream: int, identity: str = "me") -> None:
        self.live.add(stream)
        self.table.opened(stream, identity, self.now)

    def receive(self, stream: int, message: EdgeMessage) -> None:
        if stream in self.live:  # the worker does not listen to a stream that it has ended
            self._enact(self.table.receive(stream, message, self.now))

    def lost(self, stream: int) -> None:
        if stream in self.live:
            self.live.remove(stream)
            self._enact(self.table.lost(stream, self.now))

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self._enact(self.table.tick(self.now))

    def begin(self) -> list[str]:
        """Plan a step and run its forward; the sessions in it."""
        plan = self.table.plan(self.now)
        self._enact(plan.effects)
        self._carry_out()
        self.batch = plan.batch
        assert self.table.is_stepping == bool(plan.batch)
        self._results = self.target.forward(plan.batch)
        return [rows.session_id for rows in plan.batch]

    def end(self, fails: bool = False) -> None:
        """The forward of the step in flight is over."""
        results, served, self.batch = self._results, {rows.session_id for rows in self.batch}, []
        self._enact(self.table.failed(self.now) if fails else self.table.stepped(results, 1.0, self.now))
        self._carry_out()
        self.check(served)

    def step(self, fails: bool = False) -> list[str]:
        """A whole step, if there is anything to do."""
        served = self.begin()
        if served:
            self.end(fails)
        return served

    def commits(self, stream: int) -> list[Commit]:
        return [message for message in self.sent[stream] if isinstance(message, Commit)]

    def failure(self, stream: int) -> Failure:
        """Why the stream was given up."""
        (failure,) = [message for message in self.sent[stream] if isinstance(message, Failure)]
        return failure

    def text(self, stream: int, begun_with: tuple[int, ...]) -> tuple[int, ...]:
        """All tokens of a session as its edge knows them, commits being without a gap."""
        tokens = begun_with
        for commit in self.commits(stream):
            assert commit.start == len(tokens)
            tokens += commit.tokens
        return tokens

    def cached(self, key: str) -> int:
        """Tokens of a session in the target's cache."""
        return len(self.target.caches.get(key, ()))

    def check(self, keys: Container[str] | None = None) -> None:
        """The books agree with the target, caches are prefixes of the logs, and no peer can fill the memory.

        With `keys` only these sessions are looked at.
        """
        settings, ledger, blocks = self._settings, self.table.ledger, self.target.blocks
        ledger.check_integrity()
        blocks.check_integrity()
        assert ledger.num_parked + len(self.table.sessions) <= max(settings.max_sessions, len(self.table.sessions))
        sessions = [session for session in self.table.sessions if keys is None or session.key in keys]
        for session in sessions:
            assert session.pending_tokens <= settings.session.max_pending_tokens
        if self.table.is_stepping:
            return
        self._carry_out()
        assert ledger.used_blocks == blocks.num_blocks - blocks.num_free
        assert len(blocks) <= settings.cache_sessions
        for session in sessions:
            cache = self.target.caches.get(session.key, TokenLog())
            assert len(cache) == session.cached_len < len(session.log)
            assert session.log.has_prefix(len(cache), cache.hash_at(len(cache)))
            for position in range(session.opened.known_len + len(session.opened.tokens), len(session.log)):
                assert session.log[position] == target_token(session.log, position)

    def _enact(self, effects: list[fx.CloudEffect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(stream=stream, message=message):
                    if stream in self.live:
                        assert isinstance(message, CloudMessage)
                        self.sent[stream].append(message)
                case fx.EndStream(stream=stream):
                    self.live.discard(stream)
                case _:
                    self.effects.append(effect)
                    self._waiting.append(effect)

    def _carry_out(self) -> None:
        waiting, self._waiting = self._waiting, []
        for effect in waiting:
            match effect:
                case fx.Keep(session_id=key, start=start, rows=rows):
                    self.target.keep(key, start, rows)
                case fx.Truncate(session_id=key, length=length):
                    self.target.truncate(key, length)
                case fx.Share(session_id=key, source_id=source, length=length):
                    self.target.share(key, source, length)
                case fx.Release(session_id=key):
                    self.target.release(key)
