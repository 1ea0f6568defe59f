"""A session table brought to a state, and ways to step it by hand."""

from dataclasses import replace

from shared.core.effects import CloudEffect, EndStream, Send
from shared.core.messages import (
    Failure,
    FailureCode,
    Open,
)
from shared.core.session_table import SessionTable
from shared.core.settings import CloudSettings, SelfDecode, TableSettings
from shared.core.tokens import TokenLog
from shared.policy.scheduler import BestRate
from shared.testing.engines import TOY_VOCABULARY

CLOUD = CloudSettings(context_length=50, self_decode=SelfDecode.ALWAYS, max_pending_tokens=8)
SETTINGS = TableSettings(
    CLOUD,
    TOY_VOCABULARY,
    cache_blocks=64,
    max_sessions=2,
    max_new_tokens=20,
    idle_timeout_ms=1_000.0,
    retry_after_ms=300,
)
OPEN = Open("s", (1, 2, 3), 3, 10, TOY_VOCABULARY)


def table_of(settings: TableSettings = SETTINGS, max_rows: int = 64, chunk_tokens: int = 64) -> SessionTable:
    return SessionTable(settings, BestRate(lambda rows: 30.0 + rows, max_rows, prefill_chunk_tokens=chunk_tokens))


def opened(table: SessionTable, stream: int, message: Open = OPEN, identity: str = "me") -> list[CloudEffect]:
    table.opened(stream, identity, now=0.0)
    return table.receive(stream, message, now=0.0)


def step(table: SessionTable, *tokens: int) -> list[CloudEffect]:
    """One step over all planned sessions that selects these tokens in each, one after another."""
    plan = table.plan(0.0)
    results = [tokens[: len(rows.tokens) - rows.first_selected] for rows in plan.batch]
    return plan.effects + table.stepped(results, 1.0, now=0.0)


def planned(table: SessionTable, now: float = 0.0) -> list[str]:
    """Plan a step; the sessions that are in it."""
    return [rows.session_id for rows in table.plan(now).batch]


def reopened(log: tuple[int, ...], known_len: int, session_id: str = "s") -> Open:
    known_hash = TokenLog(log).hash_at(known_len)
    return replace(OPEN, session_id=session_id, tokens=log[known_len:], known_len=known_len, known_hash=known_hash)


def failure(code: FailureCode, detail: str, retry_after_ms: int = 0) -> list[CloudEffect]:
    return [Send(1, Failure(code, detail, retry_after_ms)), EndStream(1)]
