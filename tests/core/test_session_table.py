from dataclasses import replace

import pytest

from shared.core.effects import CloudEffect, EndStream, Release, Send, Truncate
from shared.core.messages import (
    Close,
    Commit,
    Draft,
    FailureCode,
    Fingerprint,
    Finish,
    Heartbeat,
    NeedTokens,
    Open,
)
from shared.core.session_table import Plan
from tests.core.table import OPEN, SETTINGS, failure, opened, reopened, step, table_of


def test_heartbeat_is_echoed_with_the_length_committed_here() -> None:
    table = table_of()
    table.opened(1, "me", now=0.0)
    assert table.receive(1, Heartbeat(4, 0), 0.0) == [Send(1, Heartbeat(4, 0))]
    table.receive(1, OPEN, 0.0)
    step(table, 7)
    assert table.receive(1, Heartbeat(5, 4, draft_ms=8.0), 0.0) == [Send(1, Heartbeat(5, 4))]
    assert table.sessions[0].status(0.0, 0.0).draft_ms == 8.0


def test_streams_that_ended_are_not_heard() -> None:
    table = table_of()
    assert table.receive(9, OPEN, 0.0) == []
    assert table.lost(9, 0.0) == []


def test_close_ends_the_stream_and_parks_the_session() -> None:
    table = table_of()
    opened(table, 1)
    step(table, 7)
    assert table.receive(1, Close("stop"), 0.0) == [EndStream(1)]
    assert repr(table) == "<SessionTable 0 streams, 1 parked: >"
    assert opened(table, 2, reopened((1, 2, 3, 7, 8), known_len=4)) == []  # the next turn of the chat
    (rows,) = table.plan(0.0).batch
    assert (rows.start, rows.tokens) == (3, (7, 8))


def test_close_before_any_open_ends_the_stream() -> None:
    table = table_of()
    table.opened(1, "me", now=0.0)
    assert table.receive(1, Close(), 0.0) == [EndStream(1)]


def test_parked_session_is_freed_after_a_while() -> None:
    table = table_of()
    opened(table, 1)
    step(table, 7)
    table.lost(1, 0.0)
    wake_at = table.wake_at()
    assert wake_at == 300.0
    assert table.tick(wake_at - 1) == []
    assert table.tick(wake_at) == [Release("me/s")]
    assert table.wake_at() is None


def test_refused_open_leaves_the_live_session_alone() -> None:
    table = table_of()
    opened(table, 1)
    refused = opened(table, 2, replace(OPEN, protocol=99))
    assert EndStream(1) not in refused
    assert len(table.sessions) == 1


def test_stream_without_a_session_may_go() -> None:
    table = table_of()
    table.opened(1, "me", now=0.0)
    assert table.lost(1, 0.0) == []
    assert repr(table) == "<SessionTable 0 streams, 0 parked: >"


def test_second_open_on_a_stream_is_the_peers_error() -> None:
    table = table_of()
    opened(table, 1)
    assert table.receive(1, OPEN, 0.0) == failure(FailureCode.PROTOCOL, "Open on a stream whose session is open")


def test_draft_before_the_session_is_open_is_stale() -> None:
    table = table_of()
    opened(table, 1, reopened((1, 2, 3), known_len=3))
    assert table.receive(1, Draft(3, 77, (5,)), 0.0) == []


@pytest.mark.parametrize(
    ("message", "effects"),
    [
        (replace(OPEN, protocol=2), failure(FailureCode.INVALID_REQUEST, "protocol 2 is not spoken here, only 1")),
        (
            replace(OPEN, vocabulary=Fingerprint(9, b"x")),
            failure(
                FailureCode.VOCABULARY_MISMATCH,
                "the draft and target vocabularies differ (9 tokens at the edge, 1000 here)",
            ),
        ),
        (
            replace(OPEN, max_new_tokens=21),
            failure(FailureCode.INVALID_REQUEST, "max_new_tokens 21 is above this verifier's 20"),
        ),
        (
            replace(OPEN, tokens=tuple(range(50))),
            failure(FailureCode.CONTEXT_LENGTH, "50 tokens leave no room in a context of 50"),
        ),
    ],
    ids=["protocol", "vocabulary", "max_new_tokens", "context"],
)
def test_open_that_cannot_be_served_is_refused(message: Open, effects: list[CloudEffect]) -> None:
    table = table_of()
    assert opened(table, 1, message) == effects
    assert repr(table) == "<SessionTable 0 streams, 0 parked: >"


def test_finished_text_cannot_be_opened_again() -> None:
    table = table_of()
    effects = opened(table, 1, replace(OPEN, tokens=tuple(range(13)), max_new_tokens=10))
    assert effects == failure(FailureCode.CONTEXT_LENGTH, "13 tokens leave no room in a context of 50")


def test_full_verifier_asks_to_come_back_later() -> None:
    table = table_of()
    opened(table, 2, replace(OPEN, session_id="a"))
    opened(table, 3, replace(OPEN, session_id="b"))
    assert opened(table, 1) == failure(FailureCode.RESOURCE_EXHAUSTED, "all 2 sessions are in use", 300)


def test_session_that_is_open_elsewhere_is_taken_over_even_when_full() -> None:
    table = table_of(replace(SETTINGS, max_sessions=1))
    opened(table, 1)
    step(table, 7)
    assert opened(table, 2, reopened((1, 2, 3, 7), known_len=4)) == [EndStream(1)]
    assert [rows.start for rows in table.plan(0.0).batch] == [3]  # the cache is warm
    assert table.receive(1, Heartbeat(1, 0), 0.0) == []


def test_known_prefix_is_enough_to_open_again() -> None:
    table = table_of()
    opened(table, 1)
    step(table, 7)
    table.lost(1, 0.0)
    assert opened(table, 2, reopened((1, 2, 3, 7, 8, 9), known_len=4)) == []  # 8 and 9 are local tokens
    (rows,) = table.plan(0.0).batch
    assert (rows.start, rows.tokens) == (3, (7, 8, 9))
    assert table.sessions[0].log.tokens() == (1, 2, 3, 7, 8, 9)


def test_shorter_prefix_truncates_the_cache() -> None:
    table = table_of()
    opened(table, 1)
    step(table, 7)
    step(table, 8)
    table.lost(1, 0.0)
    assert opened(table, 2, reopened((1, 2, 3), known_len=3)) == [Truncate("me/s", 2)]
    assert [rows.tokens for rows in table.plan(0.0).batch] == [(3,)]


def test_other_tokens_truncate_the_cache_where_they_differ() -> None:
    table = table_of()
    opened(table, 1)
    step(table, 7)
    step(table, 8)
    table.lost(1, 0.0)
    assert opened(table, 2, replace(OPEN, tokens=(1, 2, 3, 9, 8))) == [Truncate("me/s", 3)]


@pytest.mark.parametrize("known_len", [3, 4])
def test_unknown_prefix_is_asked_for_in_full(known_len: int) -> None:
    table = table_of()
    opened(table, 2)
    table.lost(2, 0.0)
    assert opened(table, 1, reopened((1, 2, 9, 9), known_len)) == [Send(1, NeedTokens())]
    assert table.receive(1, replace(OPEN, tokens=(1, 2, 9)), 0.0) == []
    assert table.sessions[0].log.tokens() == (1, 2, 9)


def test_prefix_is_known_within_one_identity_only() -> None:
    table = table_of()
    opened(table, 1)
    table.lost(1, 0.0)
    assert opened(table, 2, reopened((1, 2, 3), known_len=3), identity="you") == [Send(2, NeedTokens())]


def test_session_of_the_same_name_but_another_identity_is_left_alone() -> None:
    table = table_of()
    opened(table, 1)
    assert opened(table, 2, identity="you") == []
    assert [session.key for session in table.sessions] == ["me/s", "you/s"]


def test_hash_of_no_known_prefix_means_nothing() -> None:
    assert opened(table_of(), 1, replace(OPEN, known_hash=5)) == []


def test_oldest_parked_sessions_make_room() -> None:
    table = table_of()
    for stream, name in enumerate("abc", start=1):
        opened(table, stream, replace(OPEN, session_id=name))
        effects = table.lost(stream, 0.0)
        assert effects == []
    assert repr(table) == "<SessionTable 0 streams, 2 parked: >"
    assert opened(table, 4, reopened((1, 2, 3), 3, "a")) == [Send(4, NeedTokens())]
    assert opened(table, 5, replace(OPEN, session_id="b")) == []


def test_room_is_made_when_a_session_opens() -> None:
    table = table_of()
    for stream, name in enumerate("ab", start=1):
        opened(table, stream, replace(OPEN, session_id=name))
        step(table, 7)
        table.lost(stream, 0.0)
    assert opened(table, 3, replace(OPEN, session_id="c")) == [Release("me/a")]
    assert opened(table, 4, replace(OPEN, session_id="b")) == [Truncate("me/b", 2)]  # its own place, and cache


def test_room_is_made_when_a_stream_goes_under_overload() -> None:
    table = table_of(replace(SETTINGS, max_sessions=1))
    opened(table, 1)
    step(table, 7)
    table.lost(1, 0.0)
    assert opened(table, 2, replace(OPEN, session_id="t")) == [Release("me/s")]


def test_silent_stream_ends_after_its_timeout() -> None:
    table = table_of()
    opened(table, 1)
    step(table, 7)
    table.receive(1, Heartbeat(1, 3), now=0.5)
    table.opened(2, "me", now=0.8)
    assert table.tick(now=1.4) == []
    assert table.tick(now=1.5) == [EndStream(1)]
    assert repr(table) == "<SessionTable 1 streams, 1 parked: >"
    assert table.wake_at() == pytest.approx(1.8)


def test_finished_session_keeps_its_stream_until_the_edge_closes_it() -> None:
    table = table_of()
    opened(table, 1, replace(OPEN, max_new_tokens=1))
    _, commit = step(table, 7)
    assert commit == Send(1, Commit(3, (7,), finish=Finish.LENGTH, verify_ms=1.0, max_ahead=8))
    assert table.plan(0.0) == Plan([], [])
    assert table.receive(1, Close(), 0.0) == [EndStream(1)]
    assert table.ledger.num_parked == 1


@pytest.mark.parametrize("tokens", [(1, 2, 1_000), (1_000, 2, 3)])
def test_id_that_the_target_has_no_row_for_ends_the_stream(tokens: tuple[int, ...]) -> None:
    table = table_of()
    detail = "token 1000 is outside of the vocabulary of 1000"
    assert opened(table, 1, replace(OPEN, tokens=tokens)) == failure(FailureCode.PROTOCOL, detail)
    opened(table, 1)
    assert table.receive(1, Draft(3, 77, tokens), 0.0) == failure(FailureCode.PROTOCOL, detail)
    assert opened(table, 1, replace(OPEN, tokens=(1, 2, 999))) == []
