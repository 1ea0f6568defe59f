from dataclasses import dataclass, replace

import pytest

from shared.core.edge_session import EdgeSession, Phase
from shared.core.effects import (
    Confirm,
    Connect,
    Disconnect,
    Draft,
    EdgeEffect,
    Emit,
    Finished,
    Provenance,
    Refused,
    Retract,
    Rollback,
    Send,
)
from shared.core.errors import RemoteProtocolError
from shared.core.link import LinkSettings
from shared.core.messages import (
    Close,
    Commit,
    Failure,
    FailureCode,
    Finish,
    Heartbeat,
    NeedTokens,
    Open,
    Want,
)
from shared.core.messages import Draft as DraftMessage
from shared.core.policies import DraftObservation
from shared.core.settings import EdgeSettings, OnDisconnect, OnReconnect, Request
from shared.testing.engines import TOY_VOCABULARY

REQUEST = Request("s", (1, 2), max_new_tokens=20, vocabulary=TOY_VOCABULARY, stop_ids=frozenset((0,)))
SETTINGS = EdgeSettings(
    link=LinkSettings(max_stall_ms=600.0, heartbeat_ms=200.0),
    patience_ms=5_000.0,
    connect_timeout_ms=1_000.0,
    backoff_initial_ms=50.0,
    backoff_max_ms=250.0,
)
LOCAL = Provenance.LOCAL


@dataclass
class Ahead:
    """Keeps so many tokens ahead of what is settled."""

    tokens: int
    wait_ms: float = 0.0

    def draft_tokens(self, seen: DraftObservation) -> int:
        return max(0, min(self.tokens, seen.max_ahead) - seen.ahead_tokens)

    def send_in_ms(self, seen: DraftObservation, is_drafting: bool) -> float:
        return self.wait_ms


def session_of(settings: EdgeSettings = SETTINGS, request: Request = REQUEST, ahead: int = 2) -> EdgeSession:
    return EdgeSession(request, settings, Ahead(ahead))


def linked(settings: EdgeSettings = SETTINGS, request: Request = REQUEST) -> EdgeSession:
    """On stream 1 since 0 s, token 5 committed, 6 and 7 drafted and sent, nothing in flight."""
    session = session_of(settings, request)
    session.start(0.0)
    session.drafted((5, 6), (1.0, 1.0), 0.0)
    session.connected(1, 0.0)
    session.receive(1, Commit(2, (5,)), 0.0)
    session.drafted((7,), (1.0,), 0.0)
    return session


def sent(effects: list[EdgeEffect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def of_type(effects: list[EdgeEffect], *types: type[object]) -> list[EdgeEffect]:
    return [effect for effect in effects if isinstance(effect, types)]


def redialled(session: EdgeSession, now: float) -> int:
    """Let the backoff pass; the number of the new attempt."""
    connects = of_type(session.tick(now + 1.0), Connect)
    assert len(connects) == 1
    assert isinstance(connects[0], Connect)
    assert connects[0].fresh
    return connects[0].stream


# -- the first dial ----------------------------------------------------------------------------------------------------


def test_start_dials_and_drafts_meanwhile() -> None:
    session = session_of()
    prompt_hash = session.path.log.hash_at(2)
    assert session.start(10.0) == [Connect(1, fresh=True), Draft(2, prompt_hash, (1, 2), 2)]
    assert session.phase is Phase.CONNECTING
    assert session.wake_at() == pytest.approx(10.6)


def test_connection_opens_the_session_and_sends_the_drafts_at_hand() -> None:
    session = session_of()
    session.start(0.0)
    assert session.drafted((5, 6), (1.0, 1.0), 0.1) == []
    prompt_hash = session.path.log.hash_at(2)
    assert session.connected(1, 0.2) == [
        Send(1, Open("s", (1, 2), 2, 20, TOY_VOCABULARY, stop_ids=frozenset((0,)))),
        Send(1, Heartbeat(1, 2, draft_ms=50.0)),
        Send(1, DraftMessage(2, prompt_hash, (5, 6), b"\xff\xff")),
    ]
    assert session.phase is Phase.OPENING


def test_slow_dial_shows_local_tokens_after_the_longest_stall_and_goes_on_dialling() -> None:
    session = session_of()
    session.start(0.0)
    session.drafted((5,), (1.0,), 0.1)
    assert of_type(session.tick(0.6), Emit) == [Emit(2, (5,), (LOCAL,))]
    assert session.phase is Phase.LOCAL
    assert of_type(session.connected(1, 0.7), Send)[0] == Send(1, REQUEST.open(session.path.log, 0, 3))


def test_dial_without_an_answer_is_given_up() -> None:
    session = session_of()
    session.start(0.0)
    session.tick(0.6)
    assert session.wake_at() == pytest.approx(1.0)
    assert of_type(session.tick(1.0), Disconnect) == [Disconnect(1)]
    assert session.connected(1, 1.1) == []
    assert redialled(session, 1.0) == 3


def test_failed_dial_goes_local_at_once() -> None:
    session = session_of()
    session.start(0.0)
    assert session.disconnected(1, 0.1) == [Disconnect(1)]  # nothing to show: the draft is in flight
    assert session.phase is Phase.LOCAL
    assert of_type(session.drafted((5,), (1.0,), 0.2), Emit) == [Emit(2, (5,), (LOCAL,))]


def test_offline_never_dials_and_shows_what_it_drafts() -> None:
    session = session_of(replace(SETTINGS, offline=True, on_disconnect=OnDisconnect.PAUSE))
    assert session.start(0.0) == [Draft(2, session.path.log.hash_at(2), (1, 2), 1)]
    assert session.wake_at() is None
    assert session.drafted((5,), (1.0,), 0.1) == [
        Emit(2, (5,), (LOCAL,)),
        Draft(3, session.path.log.hash_at(3), (), 1),
    ]
    assert session.drafted((0,), (1.0,), 0.2) == [Emit(3, (0,), (LOCAL,)), Disconnect(0), Finished(Finish.STOP)]


# -- commits -----------------------------------------------------------------------------------------------------------


def test_commit_that_agrees_is_shown_and_drafting_goes_on() -> None:
    session = linked()
    log_hash = session.path.log.hash_at(5)
    assert session.phase is Phase.LINKED
    assert session.receive(1, Commit(3, (6, 7), num_drafted=2, num_accepted=2), 0.1) == [
        Emit(3, (6, 7), (Provenance.ACCEPTED, Provenance.ACCEPTED)),
        Draft(5, log_hash, (), 2),
    ]
    assert session.committed_len == 5


def test_commit_that_differs_cuts_the_path_and_rolls_back() -> None:
    session = linked()
    effects = session.receive(1, Commit(3, (6, 9), num_drafted=2, num_accepted=1), 0.1)
    assert effects == [
        Rollback(4),
        Emit(3, (6, 9), (Provenance.ACCEPTED, Provenance.CLOUD)),
        Draft(5, session.path.log.hash_at(5), (9,), 2),
    ]


def test_repeated_commit_changes_nothing() -> None:
    session = linked()
    assert session.receive(1, Commit(2, (5,)), 0.1) == []
    assert session.committed_len == 3


def test_commit_that_repeats_in_part_is_taken_from_there() -> None:
    session = linked()
    assert of_type(session.receive(1, Commit(2, (5, 6)), 0.1), Emit) == [Emit(3, (6,), (Provenance.CLOUD,))]


@pytest.mark.parametrize("commit", [Commit(4, (7,)), Commit(2, (9, 6)), Commit(1, (2, 9))])
def test_commit_with_a_gap_or_a_contradiction_is_the_peers_error(commit: Commit) -> None:
    session = linked()
    with pytest.raises(RemoteProtocolError, match=f"commit at {commit.start} does not follow the 3 committed tokens"):
        session.receive(1, commit, 0.1)


def test_first_commit_must_begin_where_the_session_was_opened() -> None:
    session = session_of()
    session.start(0.0)
    session.connected(1, 0.0)
    with pytest.raises(RemoteProtocolError, match="opened at 2, first commit at 3"):
        session.receive(1, Commit(3, (5,)), 0.1)


def test_finish_closes_the_stream_and_nothing_follows() -> None:
    session = linked()
    assert session.receive(1, Commit(3, (0,), finish=Finish.STOP), 0.1) == [
        Rollback(3),
        Emit(3, (0,), (Provenance.CLOUD,)),
        Send(1, Close("STOP")),
        Finished(Finish.STOP),
    ]
    assert session.phase is Phase.DONE
    assert session.wake_at() is None
    assert session.tick(9.0) == []
    assert session.connected(1, 9.0) == []
    assert session.disconnected(1, 9.0) == []
    assert session.receive(1, Commit(4, (5,)), 9.0) == []


def test_draft_that_comes_after_the_end_is_put_away() -> None:
    session = linked()
    session.receive(1, Commit(3, (6, 7)), 0.1)
    session.receive(1, Commit(5, (0,), finish=Finish.STOP), 0.1)
    assert of_type(session.drafted((8, 9), (1.0, 1.0), 0.2), Draft, Emit, Send) == []


def test_path_is_not_drafted_beyond_the_texts_limit() -> None:
    session = session_of(request=replace(REQUEST, max_new_tokens=3), ahead=5)
    (_, draft) = session.start(0.0)
    assert isinstance(draft, Draft)
    assert draft.n == 3
    assert session.drafted((5, 6, 7), (1.0, 1.0, 1.0), 0.0) == []


def test_path_is_not_drafted_beyond_a_stop_token() -> None:
    session = session_of(ahead=5)
    session.start(0.0)
    assert of_type(session.drafted((5, 0), (1.0, 1.0), 0.0), Draft) == []


def test_verifier_says_how_much_it_will_hold() -> None:
    session = session_of(ahead=9)
    session.start(0.0)
    session.connected(1, 0.0)
    session.drafted((4,) * 9, (1.0,) * 9, 0.0)
    hashed = session.path.log.hash_at
    assert session.receive(1, Commit(2, (5,), max_ahead=3), 0.0)[-1] == Draft(3, hashed(3), (5,), 3)
    session.drafted((6, 7, 8), (1.0,) * 3, 0.0)
    assert session.receive(1, Commit(3, (9,)), 0.0)[-1] == Draft(4, hashed(4), (9,), 3)  # still


def test_engine_without_room_is_left_alone() -> None:
    session = session_of()
    session.start(0.0)
    assert session.drafted((), (), 0.0) == []
    session.connected(1, 0.0)
    assert of_type(session.receive(1, Commit(2, (5,)), 0.0), Draft) == []


def test_plain_stream_drafts_nothing_while_the_cloud_is_there() -> None:
    session = session_of(request=replace(REQUEST, want=Want.STREAM))
    assert session.start(0.0) == [Connect(1, fresh=True)]
    effects = session.connected(1, 0.1)
    assert [type(message) for message in sent(effects)] == [Open, Heartbeat]
    assert session.receive(1, Commit(2, (5,)), 0.2) == [Emit(2, (5,), (Provenance.CLOUD,))]
    assert of_type(session.disconnected(1, 0.3), Draft) == [Draft(3, session.path.log.hash_at(3), (1, 2, 5), 1)]


# -- the link ----------------------------------------------------------------------------------------------------------


def test_heartbeats_keep_time_and_acknowledge() -> None:
    session = linked()
    assert session.wake_at() == pytest.approx(0.2)
    assert session.tick(0.2) == [Send(1, Heartbeat(2, 3))]
    assert session.receive(1, Heartbeat(2, 3), 0.25) == []
    assert session.link.rtt_ms == pytest.approx(50.0)
    assert session.wake_at() == pytest.approx(0.4)


def test_stall_shows_the_path_first_and_then_drops_the_stream() -> None:
    session = linked()
    session.tick(0.2)
    log_hash = session.path.log.hash_at(5)
    assert session.tick(0.6) == [Emit(3, (6, 7), (LOCAL, LOCAL)), Draft(5, log_hash, (), 1), Disconnect(1)]
    assert session.phase is Phase.LOCAL
    wakes_at = session.wake_at()
    assert wakes_at is not None
    assert 0.625 <= wakes_at <= 0.65  # the first backoff
    assert session.receive(1, Commit(3, (9,)), 0.61) == []  # a dead stream still delivers


def test_live_link_without_commits_is_left_when_patience_ends() -> None:
    session = linked(replace(SETTINGS, patience_ms=700.0))
    for milliseconds in range(100, 700, 100):
        session.receive(1, Heartbeat(0, 3), milliseconds / 1000)
        assert of_type(session.tick(milliseconds / 1000), Disconnect) == []
    assert of_type(session.tick(0.7), Emit, Disconnect) == [Emit(3, (6, 7), (LOCAL, LOCAL)), Disconnect(1)]


def test_commit_renews_patience() -> None:
    session = linked(replace(SETTINGS, patience_ms=700.0))
    session.receive(1, Commit(3, (6,)), 0.5)
    session.receive(1, Heartbeat(0, 3), 1.0)
    assert of_type(session.tick(1.1), Disconnect) == []
    assert of_type(session.tick(1.2), Disconnect) == [Disconnect(1)]


def test_repeated_news_of_a_dead_stream_is_not_news() -> None:
    session = linked()
    session.disconnected(1, 0.1)
    assert session.disconnected(1, 0.2) == []
    assert session.receive(1, Failure(FailureCode.INTERNAL, "late"), 0.2) == []


def test_pause_shows_nothing_until_the_cloud_is_back() -> None:
    session = linked(replace(SETTINGS, on_disconnect=OnDisconnect.PAUSE))
    assert of_type(session.disconnected(1, 0.1), Emit) == []
    stream = redialled(session, 0.1)
    opened = session.connected(stream, 1.2)
    assert sent(opened)[0] == REQUEST.open(session.path.log, known_len=3, opened_len=3)
    assert of_type(session.tick(1.7), Emit) == []
    assert of_type(session.receive(stream, Commit(3, (6,), 1, 1), 1.75), Emit) == [
        Emit(3, (6,), (Provenance.ACCEPTED,))
    ]


def test_fail_ends_the_text_with_the_reason() -> None:
    session = linked(replace(SETTINGS, on_disconnect=OnDisconnect.FAIL))
    assert session.tick(0.6) == [Disconnect(1), Finished(Finish.NONE, "the link stalled")]
    assert session.phase is Phase.DONE


@pytest.mark.parametrize(
    ("silence", "why"), [("dial", "the verifier does not answer"), ("commits", "the verifier is too slow")]
)
def test_fail_names_what_was_missing(silence: str, why: str) -> None:
    session = session_of(replace(SETTINGS, on_disconnect=OnDisconnect.FAIL, patience_ms=1_000.0))
    session.start(0.0)
    if silence == "commits":
        session.connected(1, 0.0)
        session.receive(1, Heartbeat(0, 0), 0.9)
    assert session.tick(1.0)[-1] == Finished(Finish.NONE, why)


# -- the way back ------------------------------------------------------------------------------------------------------


def local(settings: EdgeSettings = SETTINGS) -> EdgeSession:
    """The stream broke at 1 s; 6 and 7 are shown as local, a draft is in flight."""
    session = linked(settings)
    session.receive(1, Heartbeat(0, 3), 0.9)
    session.disconnected(1, 1.0)
    return session


def test_continue_opens_with_what_was_shown() -> None:
    session = local()
    stream = redialled(session, 1.0)
    assert stream == 3
    effects = session.connected(stream, 2.1)
    assert sent(effects)[0] == REQUEST.open(session.path.log, known_len=3, opened_len=5)
    assert of_type(session.receive(stream, Commit(5, (8,)), 2.2), Emit, Confirm, Retract) == [
        Emit(5, (8,), (Provenance.CLOUD,))
    ]
    assert session.phase is Phase.LINKED


def test_tokens_drafted_during_the_return_are_held_back_for_a_while() -> None:
    session = local()
    stream = redialled(session, 1.0)
    session.connected(stream, 2.1)
    assert of_type(session.drafted((8,), (1.0,), 2.2), Emit) == []
    session.receive(stream, Heartbeat(0, 3), 2.6)
    assert of_type(session.tick(2.7), Emit) == [Emit(5, (8,), (LOCAL,))]
    assert session.phase is Phase.OPENING


def test_late_first_commit_is_answered_by_opening_once_more() -> None:
    session = local()
    stream = redialled(session, 1.0)
    session.connected(stream, 2.1)
    session.drafted((8,), (1.0,), 2.2)
    session.receive(stream, Heartbeat(0, 3), 2.6)
    session.tick(2.7)
    effects = session.receive(stream, Commit(5, (9,)), 2.8)
    assert of_type(effects, Disconnect, Connect, Emit) == [Disconnect(stream), Connect(stream + 1, fresh=False)]
    assert sent(session.connected(stream + 1, 2.9))[0] == REQUEST.open(session.path.log, known_len=5, opened_len=6)


def test_verifier_without_the_prefix_gets_all_tokens() -> None:
    session = local()
    stream = redialled(session, 1.0)
    session.connected(stream, 2.1)
    again = Send(stream, REQUEST.open(session.path.log, known_len=0, opened_len=5))
    assert session.receive(stream, NeedTokens(), 2.2)[0] == again
    assert again not in session.receive(stream, NeedTokens(), 2.2)  # repeated


def test_need_for_tokens_on_a_linked_stream_is_nonsense() -> None:
    assert linked().receive(1, NeedTokens(), 0.1) == []


REVISE = replace(SETTINGS, on_reconnect=OnReconnect.REVISE)


def test_revise_opens_at_what_is_committed_and_sends_the_local_tail_as_drafts() -> None:
    session = local(REVISE)
    stream = redialled(session, 1.0)
    session.drafted((8,), (1.0,), 2.0)
    effects = session.connected(stream, 2.1)
    opened, _, draft = sent(effects)[:3]
    assert opened == REQUEST.open(session.path.log, known_len=3, opened_len=3)
    assert draft == DraftMessage(3, session.path.log.hash_at(3), (6, 7, 8), b"\xff\xff\xff")
    assert session.drafted((4,), (1.0,), 2.2)[0] == Emit(6, (4,), (LOCAL,))  # showing goes on meanwhile


def test_revise_confirms_what_was_right_and_takes_back_the_rest() -> None:
    session = local(REVISE)
    stream = redialled(session, 1.0)
    session.connected(stream, 2.1)
    effects = session.receive(stream, Commit(3, (6, 9), 2, 1), 2.2)
    assert of_type(effects, Rollback, Confirm, Retract, Emit) == [
        Rollback(4),
        Confirm(4),
        Retract(4),
        Emit(4, (9,), (Provenance.CLOUD,)),
    ]


def test_revise_holds_before_the_first_commit_like_any_other() -> None:
    session = session_of(REVISE)
    session.start(0.0)
    session.connected(1, 0.1)
    assert of_type(session.drafted((5, 6), (1.0, 1.0), 0.2), Emit) == []


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_busy_verifier_is_dialled_again_when_it_says() -> None:
    session = linked()
    effects = session.receive(1, Failure(FailureCode.RESOURCE_EXHAUSTED, "full", retry_after_ms=3_000), 0.1)
    assert of_type(effects, Refused) == []
    assert session.wake_at() == pytest.approx(3.1)
    assert of_type(session.tick(3.1), Connect) == [Connect(3, fresh=True)]


def test_final_refusal_is_reported_and_the_session_goes_on_alone() -> None:
    session = linked()
    effects = session.receive(1, Failure(FailureCode.VOCABULARY_MISMATCH, "differ"), 0.1)
    assert of_type(effects, Refused, Emit, Disconnect) == [
        Refused("VOCABULARY_MISMATCH", "differ"),
        Emit(3, (6, 7), (LOCAL, LOCAL)),
        Disconnect(1),
    ]
    assert session.wake_at() is None  # never dialled again


def test_final_refusal_of_a_session_that_would_pause_ends_it() -> None:
    session = linked(replace(SETTINGS, on_disconnect=OnDisconnect.PAUSE))
    assert session.receive(1, Failure(FailureCode.UNAUTHENTICATED, "who?"), 0.1) == [
        Refused("UNAUTHENTICATED", "who?"),
        Disconnect(1),
        Finished(Finish.NONE, "who?"),
    ]


# -- the end without the cloud -----------------------------------------------------------------------------------------


def test_local_text_ends_at_the_limit() -> None:
    session = session_of(replace(SETTINGS, offline=True), replace(REQUEST, max_new_tokens=1))
    session.start(0.0)
    assert session.drafted((5,), (1.0,), 0.1) == [Emit(2, (5,), (LOCAL,)), Disconnect(0), Finished(Finish.LENGTH)]


def test_local_text_ends_where_the_draft_context_does() -> None:
    session = local()
    assert session.drafted((), (), 1.1)[-1] == Finished(Finish.LENGTH)


def test_text_that_ends_while_the_session_opens_closes_the_stream() -> None:
    session = local(REVISE)
    stream = redialled(session, 1.0)
    session.connected(stream, 2.1)
    assert session.drafted((0,), (1.0,), 2.2) == [
        Emit(5, (0,), (LOCAL,)),
        Send(stream, Close("STOP")),
        Finished(Finish.STOP),
    ]


def test_full_draft_context_is_no_end_while_the_cloud_may_answer() -> None:
    session = local(REVISE)
    stream = redialled(session, 1.0)
    session.connected(stream, 2.1)
    assert of_type(session.drafted((), (), 2.2), Finished) == []


# -- sending -----------------------------------------------------------------------------------------------------------


def test_drafts_gather_until_they_are_due() -> None:
    policy = Ahead(1, wait_ms=100.0)
    session = EdgeSession(REQUEST, SETTINGS, policy)
    session.start(0.0)
    session.connected(1, 0.0)
    assert sent(session.drafted((5,), (1.0,), 0.05)) == []
    assert session.wake_at() == pytest.approx(0.15)
    policy.wait_ms = 0.05  # less than any timer can wait
    assert sent(session.tick(0.15)) == [DraftMessage(2, session.path.log.hash_at(2), (5,), b"\xff")]


def test_nothing_is_sent_while_no_stream_is_up() -> None:
    session = local()
    assert sent(session.drafted((8,), (1.0,), 1.1)) == []
    assert session.wake_at() is not None


def test_repr_is_the_whole_state() -> None:
    assert repr(linked()) == (
        "<EdgeSession s linked on stream 1: 3 committed, 3 shown, <DraftPath 5 tokens, 5 sent, 5 in the engine, "
        "acceptance 0.84>, <Link rtt 0+-0 ms, patience 600 ms>>"
    )
