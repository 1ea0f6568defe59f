from dataclasses import replace

import pytest

from shared.core.effects import CloudEffect, EndStream, Keep, Release, Send
from shared.core.errors import LocalProtocolError
from shared.core.messages import Close, Commit, Draft, Failure, FailureCode, Heartbeat, NeedTokens, Open, Want
from shared.core.session_table import _MAX_WAITING, Plan
from shared.core.settings import SelfDecode
from shared.core.tokens import TokenLog
from tests.core.table import CLOUD, OPEN, SETTINGS, failure, opened, planned, reopened, step, table_of

OTHER = replace(OPEN, session_id="t")
NEXT_DRAFT = Draft(4, TokenLog((1, 2, 3, 7)).hash_at(4), (9,))  # on what the step in flight is about to commit
PROMPT_DRAFT = Draft(3, TokenLog((1, 2, 3)).hash_at(3), (7, 9))


def commits(effects: list[CloudEffect]) -> list[tuple[int, tuple[int, ...]]]:
    """(stream, tokens) of each commit that was sent."""
    return [
        (effect.stream, effect.message.tokens)
        for effect in effects
        if isinstance(effect, Send) and isinstance(effect.message, Commit)
    ]


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


def test_idle_decode_waits_for_the_sessions_with_drafts_where_rows_are_short() -> None:
    table = table_of(replace(SETTINGS, session=replace(CLOUD, self_decode=SelfDecode.IDLE)), max_rows=2, chunk_tokens=2)
    opened(table, 1, replace(OPEN, tokens=(3,), prompt_len=1))
    opened(table, 2, replace(OTHER, tokens=(3,), prompt_len=1))
    table.receive(2, Draft(1, TokenLog((3,)).hash_at(1), (9,)), 0.0)
    assert planned(table) == ["me/t"]
    table.stepped([(9, 5)], 1.0, now=0.0)
    assert planned(table) == ["me/s", "me/t"]  # nobody has drafts: all are spare


def test_idle_decode_of_a_single_session_waits_for_nothing() -> None:
    table = table_of(replace(SETTINGS, session=replace(CLOUD, self_decode=SelfDecode.IDLE)))
    opened(table, 1)
    step(table, 7)
    assert planned(table) == ["me/s"]


def test_session_served_the_longest_ago_comes_first() -> None:
    table = table_of(replace(SETTINGS, max_sessions=3))
    for stream, name in enumerate("abc", start=1):
        opened(table, stream, replace(OPEN, session_id=name))
    table.receive(1, Heartbeat(1, 3), 0.0)
    step(table, 7)
    table.lost(2, 0.0)
    opened(table, 4, reopened((1, 2, 3, 7), 4, "b"))
    assert [session.key for session in table.sessions] == ["me/a", "me/c", "me/b"]
    assert planned(table) == ["me/a", "me/c", "me/b"]


# -- what arrives during a step --------------------------------------------------------------------------------------


def test_drafts_heartbeats_and_new_sessions_are_taken_in_during_a_step() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    assert table.receive(1, Heartbeat(1, 3), 0.0) == [Send(1, Heartbeat(1, 3))]
    assert table.receive(1, PROMPT_DRAFT, 0.0) == []
    assert table.sessions[0].pending_tokens == 2
    assert opened(table, 2, OTHER) == []
    assert [session.key for session in table.sessions] == ["me/s", "me/t"]
    assert opened(table, 3, replace(OPEN, session_id="u", protocol=9)) != []
    assert commits(table.stepped([(7,)], 1.0, now=0.0)) == [(1, (7,))]
    assert table.sessions[1].pending_tokens == 1  # 9 hangs on what was committed; me/t was not served yet
    assert planned(table) == ["me/t", "me/s"]


def test_draft_on_what_a_step_in_flight_commits_comes_too_early() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    table.receive(1, NEXT_DRAFT, 0.0)
    assert table.sessions[0].stale_tokens == 1


def test_taking_over_a_session_waits_for_its_step() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    assert opened(table, 2, reopened((1, 2, 3, 8), known_len=3)) == []
    assert table.receive(2, Draft(4, TokenLog((1, 2, 3, 8)).hash_at(4), (5, 6)), 0.0) == []  # behind its Open
    assert table.receive(2, Heartbeat(3, 0), 0.0) == [Send(2, Heartbeat(3, 0))]  # the link is judged by these
    assert table.stepped([(7,)], 1.0, now=0.0) == [
        Keep("me/s", 0, (0, 1, 2)),
        Send(1, Commit(3, (7,), verify_ms=1.0, max_ahead=8)),
        EndStream(1),
    ]
    (session,) = table.sessions
    assert (session.log.tokens(), session.cached_len, session.pending_tokens) == ((1, 2, 3, 8), 3, 2)
    assert table.receive(1, Heartbeat(1, 0), 0.0) == []


def test_close_during_a_step_waits_and_the_last_commit_is_sent() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    assert table.receive(1, Close(), 0.0) == []
    assert table.receive(1, PROMPT_DRAFT, 0.0) == []  # behind the Close: never heard
    effects = table.stepped([(7,)], 1.0, now=0.0)
    assert commits(effects) == [(1, (7,))]
    assert effects[-1] == EndStream(1)
    assert repr(table) == "<SessionTable 0 streams, 1 parked: >"


def test_stream_lost_while_its_open_waits_opens_nothing_for_long() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    opened(table, 2, reopened((1, 2, 3), known_len=3))
    assert table.lost(2, 0.0) == []
    assert commits(table.stepped([(7,)], 1.0, now=0.0)) == [(1, (7,))]
    assert [session.key for session in table.sessions] == ["me/s"]


@pytest.mark.parametrize("ends", ["close", "lost"])
def test_session_is_taken_over_while_its_own_stream_is_about_to_end(ends: str) -> None:
    """An edge that dials twice: the stream that was there first opens the session of the other one."""
    table = table_of()
    table.opened(1, "me", 0.0)
    opened(table, 2)
    table.plan(0.0)
    assert table.receive(1, OPEN, 0.0) == []
    assert (table.receive(2, Close(), 0.0) if ends == "close" else table.lost(2, 0.0)) == []
    assert EndStream(2) in table.stepped([(7,)], 1.0, now=0.0)
    assert [session.key for session in table.sessions] == ["me/s"]
    assert table.receive(1, Heartbeat(1, 3), 0.0) == [Send(1, Heartbeat(1, 3))]


def test_what_waits_is_bounded() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    opened(table, 2, reopened((1, 2, 3), known_len=3))
    for token in range(10, 10 + 2 * _MAX_WAITING):
        assert table.receive(2, Draft(3, TokenLog((1, 2, 3)).hash_at(3), (token,)), 0.0) == []
    table.stepped([(7,)], 1.0, now=0.0)
    assert table.sessions[0].pending_tokens + table.sessions[0].stale_tokens == 8
    assert len(table._streams[2].waiting) == 0


def test_number_of_messages_that_wait() -> None:
    table = table_of(replace(SETTINGS, session=replace(CLOUD, max_pending_tokens=1_000)))
    opened(table, 1)
    table.plan(0.0)
    opened(table, 2, reopened((1, 2, 3), known_len=3))
    for token in range(10, 10 + 2 * _MAX_WAITING):
        table.receive(2, Draft(3, TokenLog((1, 2, 3)).hash_at(3), (token,)), 0.0)
    table.stepped([(7,)], 1.0, now=0.0)
    assert table.sessions[0].pending_tokens == _MAX_WAITING - 1  # the Open waited too


def test_stream_that_failed_during_a_step_is_dropped_after_it() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    assert table.receive(1, OTHER, 0.0) == failure(FailureCode.PROTOCOL, "Open on a stream whose session is open")
    assert table.receive(1, PROMPT_DRAFT, 0.0) == []
    table.stepped([(7,)], 1.0, now=0.0)
    assert repr(table) == "<SessionTable 0 streams, 1 parked: >"


def test_open_that_waited_is_asked_for_all_tokens_like_any_other() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    opened(table, 2, reopened((1, 2, 9), known_len=3))
    assert table.stepped([(7,)], 1.0, now=0.0)[-2:] == [EndStream(1), Send(2, NeedTokens())]
    assert table.sessions == []


# -- failed steps ----------------------------------------------------------------------------------------------------


def test_failed_step_sends_nothing_and_drops_the_caches() -> None:
    table = table_of()
    opened(table, 1)
    opened(table, 2, OTHER)
    step(table, 7)
    assert planned(table) == ["me/s", "me/t"]
    assert table.failed(0.0) == [Release("me/s"), Release("me/t")]
    assert not table.is_stepping
    assert [session.cached_len for session in table.sessions] == [0, 0]


def test_suspects_are_tried_one_by_one_before_anybody_else() -> None:
    table = table_of(replace(SETTINGS, max_sessions=3))
    for stream, name in enumerate("abc", start=1):
        opened(table, stream, replace(OPEN, session_id=name))
    table.plan(0.0)
    opened(table, 4, replace(OPEN, session_id="a"), identity="you")  # refused: full
    table.failed(0.0)
    assert planned(table) == ["me/a"]
    assert commits(table.stepped([(7,)], 1.0, now=0.0)) == [(1, (7,))]
    assert planned(table) == ["me/b"]
    failed = Failure(FailureCode.INTERNAL, "the target failed on this session", retry_after_ms=300)
    assert table.failed(0.0) == [
        Release("me/b"),
        Send(2, failed),
        EndStream(2),
    ]
    assert planned(table) == ["me/c"]
    assert commits(table.stepped([(8,)], 1.0, now=0.0)) == [(3, (8,))]
    assert planned(table) == ["me/a", "me/c"]  # nobody is suspect any more
    assert table.ledger.num_parked == 1


def test_chunk_that_succeeds_clears_a_suspect() -> None:
    table = table_of(chunk_tokens=4)
    opened(table, 1)
    opened(table, 2, replace(OTHER, tokens=(1, 2, 3, 4, 5, 6), prompt_len=6))
    assert planned(table) == ["me/s", "me/t"]
    table.failed(0.0)
    assert planned(table) == ["me/s"]
    table.stepped([(7,)], 1.0, now=0.0)
    assert planned(table) == ["me/t"]
    table.stepped([()], 1.0, now=0.0)
    assert len(planned(table)) == 2


def test_what_waited_goes_on_after_a_failed_step() -> None:
    table = table_of()
    opened(table, 1)
    opened(table, 2, OTHER)
    table.plan(0.0)
    table.receive(1, Close(), 0.0)
    assert table.failed(0.0) == [Release("me/s"), Release("me/t"), EndStream(1)]
    assert [session.key for session in table.sessions] == ["me/t"]


def test_session_that_is_given_up_while_its_close_waits_ends_once() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    table.receive(1, Close(), 0.0)
    assert table.failed(0.0).count(EndStream(1)) == 1
    assert repr(table) == "<SessionTable 0 streams, 1 parked: >"


# -- how much is taken on --------------------------------------------------------------------------------------------


def test_share_of_pending_tokens_shrinks_with_the_number_of_sessions() -> None:
    settings = replace(SETTINGS, session=replace(CLOUD, max_pending_tokens=32), max_sessions=9, max_pending_in_all=48)
    for sessions, max_ahead in ((1, 32), (2, 24), (3, 16), (8, 8), (9, 8)):
        table = table_of(settings)
        for stream in range(sessions):
            opened(table, stream, replace(OPEN, session_id=f"s{stream}"))
        effects = step(table, 7)
        sent = [effect.message for effect in effects if isinstance(effect, Send)]
        assert [message.max_ahead for message in sent if isinstance(message, Commit)] == [max_ahead] * sessions
        table.receive(0, Draft(4, TokenLog((1, 2, 3, 7)).hash_at(4), tuple(range(40))), 0.0)
        session = table.ledger.session("me/s0")
        assert session is not None
        assert session.pending_tokens == max_ahead  # told, and held to it


def test_busy_verifier_takes_no_more_active_sessions() -> None:
    table = table_of(replace(SETTINGS, max_active_sessions=1))
    opened(table, 2, replace(OPEN, max_new_tokens=1))
    detail = "1 sessions are being served; one more would slow all of them down"
    assert opened(table, 1, OTHER) == failure(FailureCode.RESOURCE_EXHAUSTED, detail, 300)
    step(table, 7)  # the text of the first one has ended: it is not active
    assert opened(table, 1, OTHER) == []


def test_sessions_beyond_the_cache_are_refused() -> None:
    table = table_of(replace(SETTINGS, cache_blocks=3))
    opened(table, 2, replace(OPEN, tokens=tuple(range(1, 34)), prompt_len=33, max_new_tokens=1))
    assert opened(table, 1, OTHER) == failure(FailureCode.RESOURCE_EXHAUSTED, "the cache of 48 tokens is in use", 300)
    step(table, 7)
    assert opened(table, 1, OTHER) == []


def test_session_that_is_open_is_reopened_although_all_is_in_use() -> None:
    table = table_of(replace(SETTINGS, max_sessions=1, max_active_sessions=1, cache_blocks=1))
    opened(table, 1)
    step(table, 7)
    assert opened(table, 2, reopened((1, 2, 3, 7), known_len=4)) == [EndStream(1)]


def test_what_heartbeats_tell_holds_until_they_tell_otherwise_and_before_the_open_is_taken_in() -> None:
    table = table_of()
    opened(table, 1)
    table.plan(0.0)
    opened(table, 2, reopened((1, 2, 3, 8), known_len=3))  # waits for the step
    table.receive(2, Heartbeat(1, 0, draft_ms=9.0, rtt_ms=50.0), 0.0)
    table.stepped([(7,)], 1.0, now=0.0)
    known = []
    for nonce, draft_ms in enumerate((0.0, 4.0, 0.0), start=2):
        outlook = table.sessions[0].outlook(0.0)
        assert outlook is not None
        known.append((outlook.draft_ms, outlook.rtt_ms))
        table.receive(2, Heartbeat(nonce, 4, draft_ms=draft_ms), 0.0)
    assert known == [(9.0, 50.0), (9.0, 50.0), (4.0, 50.0)]


@pytest.mark.parametrize(("tokens", "limit"), [(13, 10), (14, 10)])
def test_text_that_has_ended_has_no_place(tokens: int, limit: int) -> None:
    opening = Open("s", tuple(range(tokens)), 3, limit, OPEN.vocabulary)
    detail = f"{tokens} tokens leave no room in a context of 50"
    assert opened(table_of(), 1, opening) == failure(FailureCode.CONTEXT_LENGTH, detail)


def test_statuses_say_how_long_each_session_was_silent() -> None:
    table = table_of()
    opened(table, 1)
    opened(table, 2, OTHER)
    table.receive(2, Heartbeat(1, 3, draft_ms=9.0), now=0.5)
    assert [(status.session, status.silent_ms, status.draft_ms) for status in table.statuses(now=1.0)] == [
        ("me/s", 1_000.0, 0.0),
        ("me/t", 500.0, 9.0),
    ]
