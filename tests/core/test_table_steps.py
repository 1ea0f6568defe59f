from dataclasses import replace

import pytest

from shared.core.effects import EndStream, Keep, Send
from shared.core.errors import LocalProtocolError
from shared.core.messages import (
    Commit,
    FailureCode,
    Heartbeat,
    Want,
)
from shared.core.session_table import Plan
from shared.core.settings import SelfDecode
from tests.core.table import CLOUD, OPEN, SETTINGS, failure, opened, planned, step, table_of


def test_step_commits_to_every_sessions_own_stream() -> None:
    table = table_of()
    assert opened(table, 1) == []
    assert opened(table, 2, replace(OPEN, session_id="t")) == []
    assert planned(table) == ["me/s", "me/t"]
    assert table.is_stepping
    assert table.stepped([(7,), (8,)], 5.0, now=0.0) == [
        Keep("me/s", 0, (0, 1, 2)),
        Send(1, Commit(3, (7,), verify_ms=5.0, max_ahead=8)),
        Keep("me/t", 0, (0, 1, 2)),
        Send(2, Commit(3, (8,), verify_ms=5.0, max_ahead=8)),
    ]
    assert not table.is_stepping


def test_prefill_chunk_sends_nothing() -> None:
    table = table_of(chunk_tokens=2)
    opened(table, 1)
    assert step(table) == [Keep("me/s", 0, (0, 1))]


def test_nothing_to_do_is_an_empty_plan_and_no_step() -> None:
    table = table_of()
    assert table.plan(0.0) == Plan([], [])
    assert not table.is_stepping
    assert table.wake_at() is None
    assert repr(table) == "<SessionTable 0 streams, 0 parked: >"


def test_two_plans_in_a_row_are_our_bug() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    with pytest.raises(LocalProtocolError, match="planned a step while one is in flight"):
        table.plan(0.0)


def test_stream_lost_during_a_step_is_dropped_after_it() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    assert table.lost(1, 0.0) == []
    assert len(table.sessions) == 1
    assert len(table.stepped([(7,)], 1.0, now=0.0)) == 2
    assert repr(table) == "<SessionTable 0 streams, 1 parked: >"


def test_impossible_acknowledgement_during_a_step_ends_that_stream_only() -> None:
    table = table_of()
    opened(table, 1)
    opened(table, 2, replace(OPEN, session_id="t"))
    batch = table.plan(0.0).batch
    detail = "acknowledged 9 tokens of 3 committed"
    assert table.receive(1, Heartbeat(1, 9), 0.0) == failure(FailureCode.PROTOCOL, detail)
    table.stepped([(7,)] * len(batch), 1.0, now=0.0)
    assert [session.key for session in table.sessions] == ["me/t"]


def test_during_a_step_no_timer_is_due() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    assert table.wake_at() is None
    assert table.tick(now=9.0) == []
    table.stepped([(7,)], 1.0, now=9.0)
    assert table.wake_at() == pytest.approx(1.0)
    assert table.tick(now=9.0) == [EndStream(1)]


def test_table_wakes_for_a_session_that_starves() -> None:
    table = table_of(replace(SETTINGS, session=replace(CLOUD, self_decode=SelfDecode.OFF)))
    opened(table, 1, replace(OPEN, want=Want.SPECULATE))
    step(table, 7)
    assert table.wake_at() == pytest.approx(0.5)
    assert planned(table, 0.4) == []
    assert len(planned(table, 0.5)) == 1
