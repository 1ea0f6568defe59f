"""What commits tell edges of the steps to come."""

from dataclasses import replace

from shared.core.effects import CloudEffect, Send
from shared.core.messages import Commit, Draft, Heartbeat, Want
from shared.core.settings import SelfDecode
from shared.core.tokens import TokenLog
from tests.core.table import OPEN, SETTINGS, opened, reopened, step, table_of


def sent(effects: list[CloudEffect]) -> list[Commit]:
    messages = [effect.message for effect in effects if isinstance(effect, Send)]
    return [message for message in messages if isinstance(message, Commit)]


def test_each_stream_is_told_once_what_steps_cost() -> None:
    table = table_of(replace(SETTINGS, step_ms=(30.0, 31.0)))
    opened(table, 1)
    opened(table, 2, replace(OPEN, session_id="t", want=Want.STREAM))  # has no use for it
    assert [commit.step_ms for commit in sent(step(table, 7))] == [(30.0, 31.0), ()]
    assert [commit.step_ms for commit in sent(step(table, 8))] == [(), ()]
    table.lost(1, now=0.0)
    opened(table, 3, reopened((1, 2, 3, 7, 8), 5))
    assert [commit.step_ms for commit in sent(step(table, 9))] == [(), (30.0, 31.0)]


def test_an_edge_alone_is_told_how_many_drafts_the_next_step_takes() -> None:
    table = table_of(replace(SETTINGS, session=replace(SETTINGS.session, self_decode=SelfDecode.IDLE)))
    opened(table, 1)
    table.plan(0.0)
    table.receive(1, Heartbeat(1, 3, draft_ms=5.0, rtt_ms=10.0), now=0.0)
    table.receive(1, Draft(3, TokenLog(OPEN.tokens).hash_at(3), (7, 8, 9)), now=0.0)
    assert [commit.next_rows for commit in sent(table.stepped([(7,)], 1.0, now=0.0))] == [2]
    assert [commit.next_rows for commit in sent(step(table, 8, 9, 5))] == [0]
    opened(table, 2, replace(OPEN, session_id="t"))
    assert [commit.next_rows for commit in sent(step(table, 6))] == [None, None]  # who else is in it is not known yet
