"""What a session expects of its edge, and how a table waits for it."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import pytest

from shared.core.cloud_session import CloudSession
from shared.core.effects import CloudEffect, Send
from shared.core.messages import Commit, Draft, Heartbeat, Want
from shared.core.policies import Allotment, Offer, Outlook, StepPolicy
from shared.core.session_table import SessionTable
from shared.core.settings import SelfDecode
from tests.core import table as tables
from tests.core.cloud import OPEN, SETTINGS, STOP, draft_on, offered, planned, session_of, step

TOLD = {"draft_ms": 5.0, "rtt_ms": 40.0}


def told(session: CloudSession) -> CloudSession:
    session.acknowledged(3, **TOLD, now=0.0)
    return session


def outlook_or_none(session: CloudSession, now: float = 0.0) -> Outlook | None:
    offered(session, now)
    return session.outlook(now)


def outlook(session: CloudSession, now: float = 0.0) -> Outlook:
    found = outlook_or_none(session, now)
    assert found is not None
    return found


def test_outlook_is_what_the_edge_told_and_what_was_seen() -> None:
    session = told(session_of())
    assert outlook(session) == Outlook(0.8, 5.0, 40.0, 0, 5.0, 0.0, 4, left_tokens=10, may_ask=False)
    session.drafted(draft_on(session, 5, 6), now=0.1)
    assert outlook(session, now=0.1).next_ms == pytest.approx(5.0)
    planned(session, now=0.1)
    step(session, 5, 9, now=0.2)  # 6 was wrong
    after = outlook(session, now=0.2)
    assert after.unknown_tokens == 0
    assert [after.next_ms, after.asked_ms] == pytest.approx([45.0, 40.0])


def test_outlook_counts_the_drafts_for_which_a_step_has_no_room() -> None:
    session = told(session_of())
    session.drafted(draft_on(session, *range(5, 12)), now=0.1)  # a step takes four of them
    assert outlook(session, now=0.1).further_tokens == 3


def test_siblings_are_no_part_of_the_path_that_is_to_come() -> None:
    session = told(session_of())
    session.drafted(draft_on(session, 5, 6), now=0.1)
    expected_ms = outlook(session, now=0.1).next_ms
    session = told(session_of())
    session.drafted(replace(draft_on(session, 5, 6, 8), parents=(-1,)), now=0.1)
    assert outlook(session, now=0.1).next_ms == expected_ms


def test_decoded_token_is_unknown_until_a_draft_agrees_or_differs() -> None:
    session = told(session_of())
    planned(session)
    step(session, 9, now=0.001)
    planned(session)
    step(session, 8, now=0.002)
    assert outlook(session, now=0.002).unknown_tokens == 2
    prefix_hash = session.log.hash_at(3)
    session.drafted(Draft(3, prefix_hash, (9,)), now=0.01)
    assert outlook(session, now=0.01).unknown_tokens == 1
    session.drafted(Draft(3, prefix_hash, (9, 7)), now=0.02)  # not 8: the edge drafts on behind that
    after = outlook(session, now=0.02)
    assert after.unknown_tokens == 0
    assert after.next_ms == pytest.approx(2 + 40 - 20 + 5)


@pytest.mark.parametrize("missing", ["draft_ms", "rtt_ms"])
def test_nothing_is_expected_of_an_edge_that_has_not_told(missing: str) -> None:
    session = session_of()
    session.acknowledged(3, **(TOLD | {missing: 0.0}), now=0.0)
    assert outlook_or_none(session) is None


def test_nothing_is_expected_of_an_edge_that_does_not_draft() -> None:
    assert outlook_or_none(told(session_of(replace(OPEN, want=Want.STREAM)))) is None


def test_no_more_drafts_are_expected_than_the_text_has_room_for() -> None:
    assert outlook(told(session_of(replace(OPEN, max_new_tokens=3)))).most_drafts == 2


def test_the_text_ends_at_its_limit_or_behind_a_drafted_stop_token() -> None:
    session = told(session_of())
    session.drafted(draft_on(session, 5, 6), now=0.1)
    assert outlook(session, now=0.1).left_tokens == 10
    session.drafted(draft_on(session, STOP, after=(5, 6)), now=0.1)
    assert outlook(session, now=0.1).left_tokens == 3
    planned(session, now=0.1)
    step(session, 5, 6, 7, now=0.2)  # it does not stop there
    assert outlook(session, now=0.2).left_tokens == 7


def test_hold_keeps_its_end_and_then_is_over_until_there_is_news() -> None:
    session = told(session_of())
    assert session.held_until is None
    session.hold(0.05)
    session.hold(0.09)
    assert [session.held_until, session.wake_at()] == [0.05, 0.05]
    assert outlook_or_none(session, now=0.04) is not None
    assert outlook_or_none(session, now=0.05) is None
    assert [session.held_until, session.wake_at()] == [None, None]
    session.drafted(draft_on(session, 5), now=0.06)
    assert outlook_or_none(session, now=0.06) is not None
    session.hold(0.08)
    planned(session, now=0.07)
    assert session.wake_at() is None  # a step is in flight
    step(session, 5, 6, now=0.1)
    assert session.held_until is None


def test_hold_ends_in_time_though_its_drafts_are_gone() -> None:
    session = told(session_of(settings=replace(SETTINGS, self_decode=SelfDecode.OFF)))
    assert session.offer(0.0) is None
    session.hold(0.05)
    assert session.wake_at() == 0.05
    assert session.offer(0.05) is None
    assert session.wake_at() != 0.05


def test_answer_that_a_hold_waited_for_tells_how_late_answers_are() -> None:
    session = told(session_of())
    session.drafted(draft_on(session, 5), now=0.0)
    planned(session)
    step(session, 9, now=0.1)
    session.hold(0.2)
    session.drafted(draft_on(session, 5), now=0.165)  # 20 ms late
    assert outlook(session, now=0.165).rtt_ms == pytest.approx(45.0)


class Holding:
    """Waits for three drafts, 20 ms at most, wherever something may be expected."""

    def allot(self, offers: Sequence[Offer]) -> Allotment:
        if any(offer.outlook is None or len(offer.worth) >= 3 for offer in offers):
            return Allotment([offer.prefill_rows + 1 + len(offer.worth) for offer in offers])
        return Allotment([0] * len(offers), hold_ms=20.0, asked_tokens=3)


class Scripted:
    """Decides as it is told to for a lone session that is expected to draft, and serves it before that."""

    def __init__(self, *decisions: Allotment) -> None:
        self.decisions = list(decisions)

    def allot(self, offers: Sequence[Offer]) -> Allotment:
        return self.decisions.pop(0) if offers[0].outlook else Allotment([offers[0].prefill_rows + 1])


def holding_table(streams: int = 1, policy: StepPolicy | None = None) -> SessionTable:
    session = replace(tables.CLOUD, self_decode=SelfDecode.ALWAYS)
    table = SessionTable(replace(tables.SETTINGS, session=session), policy or Holding())
    for stream in range(1, streams + 1):
        tables.opened(table, stream, replace(tables.OPEN, session_id=f"s{stream}"))
    tables.step(table, 7)  # what was not there before is not waited for
    return table


def hear(table: SessionTable, stream: int, now: float) -> list[CloudEffect]:
    return table.receive(stream, Heartbeat(1, 3, draft_ms=5.0, rtt_ms=10.0), now)


def test_drafts_are_expected_as_they_were_asked_for() -> None:
    session = told(session_of())
    session.asked(3, now=0.0)
    asking = outlook(session, now=0.01)
    assert asking.asked_tokens == 3
    assert asking.asked_ms == pytest.approx(40.0 - 10.0)
    planned(session, now=0.01)
    step(session, 9, now=0.02)
    session.asked(2, now=0.02)  # the same ones: they are on their way
    asking = outlook(session, now=0.03)
    assert asking.asked_tokens == 2
    assert asking.asked_ms == pytest.approx(40.0 - 30.0)
    session.drafted(draft_on(session, 5), now=0.035)  # sent before the edge heard of it
    assert outlook(session, now=0.035).asked_tokens == 2
    session.drafted(draft_on(session, 6, after=(5,)), now=0.04)
    assert outlook(session, now=0.04).asked_tokens == 0
    session.asked(0, now=0.05)
    assert outlook(session, now=0.05).asked_tokens == 0


def test_more_than_was_asked_for_must_be_asked_for_anew() -> None:
    session = told(session_of())
    session.asked(3, now=0.0)
    session.asked(4, now=0.02)
    assert outlook(session, now=0.03).asked_ms == pytest.approx(40.0 - 10.0)


def test_drafts_that_were_asked_for_in_vain_are_expected_no_more() -> None:
    session = told(session_of())
    session.asked(3, now=0.0)
    assert outlook(session, now=0.04 + 0.012).asked_tokens == 3
    assert outlook(session, now=0.04 + 0.014).asked_tokens == 0
    session.asked(3, now=0.06)  # anew
    assert outlook(session, now=0.07).asked_ms == pytest.approx(30.0)


def test_after_the_answer_nothing_comes_before_the_next() -> None:
    session = told(session_of())
    planned(session)
    step(session, 9, now=0.0)
    assert outlook(session, now=0.01).asked_ms == pytest.approx(30.0)
    session.drafted(draft_on(session, 5), now=0.04)
    assert outlook(session, now=0.05).asked_ms == inf  # only a commit asks again


def test_table_waits_and_goes_on_when_the_wait_is_over() -> None:
    table = holding_table()
    hear(table, 1, now=0.1)
    assert tables.planned(table, now=0.1) == []
    assert table.wake_at() == pytest.approx(0.12)
    assert tables.planned(table, now=0.11) == []
    assert table.wake_at() == pytest.approx(0.12)  # as before
    assert tables.planned(table, now=0.121) == ["me/s1"]


def test_table_goes_on_when_enough_drafts_are_here() -> None:
    table = holding_table()
    hear(table, 1, now=0.1)
    assert tables.planned(table, now=0.1) == []
    (session,) = table.sessions
    table.receive(1, draft_on(session, 4, 5), now=0.11)
    assert tables.planned(table, now=0.11) == []
    assert table.wake_at() == pytest.approx(0.13)
    table.receive(1, draft_on(session, 6, after=(4, 5)), now=0.12)
    (rows,) = table.plan(0.12).batch
    assert rows.tokens == (7, 4, 5, 6)


def commit_of(effects: list[CloudEffect]) -> Commit:
    (message,) = [effect.message for effect in effects if isinstance(effect, Send)]
    assert isinstance(message, Commit)
    return message


def test_edge_is_told_for_how_many_drafts_its_next_step_waits() -> None:
    table = holding_table()
    table.plan(0.0)
    hear(table, 1, now=0.0)
    commit = commit_of(table.stepped([(8,)], 1.0, now=0.1))
    assert (commit.hold_tokens, commit.is_holding) == (3, True)


def test_what_a_commit_says_is_what_the_next_plan_does() -> None:
    table = holding_table(policy=Scripted(Allotment([0], hold_ms=20.0, asked_tokens=3), Allotment([1])))
    table.plan(0.0)
    hear(table, 1, now=0.0)
    assert commit_of(table.stepped([(8,)], 1.0, now=0.1)).is_holding
    assert tables.planned(table, now=0.1) == []  # a choice made anew would have been a step
    assert tables.planned(table, now=0.11) == ["me/s1"]


def test_what_a_commit_says_is_chosen_anew_once_something_arrives() -> None:
    table = holding_table(policy=Scripted(Allotment([0], hold_ms=20.0, asked_tokens=3), Allotment([1])))
    table.plan(0.0)
    hear(table, 1, now=0.0)
    table.stepped([(8,)], 1.0, now=0.1)
    hear(table, 1, now=0.1)
    assert tables.planned(table, now=0.1) == ["me/s1"]


def test_edge_is_told_when_it_is_asked_for_a_later_step() -> None:
    table = holding_table(policy=Scripted(Allotment([1], asked_tokens=3)))
    table.plan(0.0)
    hear(table, 1, now=0.0)
    commit = commit_of(table.stepped([(8,)], 1.0, now=0.1))
    assert (commit.hold_tokens, commit.is_holding) == (3, False)
    assert tables.planned(table, now=0.1) == ["me/s1"]


def test_edge_is_told_of_no_hold_where_another_session_is_ready() -> None:
    table = holding_table(streams=2)
    for stream in (1, 2):
        hear(table, stream, now=0.0)
    table.ledger.live[0].hold(0.0)
    table.plan(0.0)
    commits = [effect.message for effect in table.stepped([(8,), (8,)], 1.0, now=0.1) if isinstance(effect, Send)]
    assert [message.hold_tokens for message in commits if isinstance(message, Commit)] == [0, 0]


def test_siblings_that_are_pending_are_not_told_as_drafts_to_come() -> None:
    table = holding_table()
    table.plan(0.0)
    hear(table, 1, now=0.0)
    (session,) = table.sessions
    drafts = draft_on(session, 8, 4, 5)  # after the commit of 8, 4 is pending and so is 5 beside it
    table.receive(1, replace(drafts, parents=(0,)), now=0.0)
    assert commit_of(table.stepped([(8,)], 1.0, now=0.1)).hold_tokens == 2
