from dataclasses import replace

import pytest

from shared.core.edge_session import Phase
from shared.core.effects import (
    Confirm,
    Connect,
    Disconnect,
    Draft,
    Emit,
    Finished,
    Provenance,
    Refused,
    Retract,
    Rollback,
    Send,
)
from shared.core.messages import (
    Commit,
    Failure,
    FailureCode,
    Finish,
    Heartbeat,
    NeedTokens,
)
from shared.core.messages import Draft as DraftMessage
from shared.core.settings import OnDisconnect
from tests.core.edge import LOCAL, REQUEST, REVISE, SETTINGS, linked, local, of_type, redialled, sent, session_of

# -- the link ----------------------------------------------------------------------------------------------------------


def test_heartbeats_keep_time_and_acknowledge() -> None:
    session = linked()
    assert session.wake_at() == pytest.approx(0.2)
    assert session.tick(0.2) == [Send(1, Heartbeat(2, 3))]
    assert session.receive(1, Heartbeat(2, 3), 0.25) == []
    assert session.link.rtt_ms == pytest.approx(50.0)
    assert session.wake_at() == pytest.approx(0.4)


def test_heartbeats_tell_durations_that_are_news_to_this_stream() -> None:
    session = linked()
    told = list[Heartbeat]()
    for number, (draft_ms, echo_ms) in enumerate([(20.0, 50.0), (21.9, 54.0), (22.1, 90.0), (0.0, 50.0)], start=1):
        session.path.draft_ms = draft_ms
        told += [beat for beat in sent(session.tick(number * 0.2)) if isinstance(beat, Heartbeat)]
        session.receive(1, Heartbeat(number + 1, 3), number * 0.2 + echo_ms / 1000)
    # The round trip is smoothed: 50, 52 and 65 ms when they are told, or not. What is not known is no news.
    assert [(beat.draft_ms, round(beat.rtt_ms)) for beat in told] == [(20.0, 0), (0.0, 50), (22.1, 0), (0.0, 65)]
    session.disconnected(1, 1.0)
    session.path.draft_ms = 22.1
    stream = redialled(session, 1.0)
    (again,) = of_type(session.connected(stream, 2.1), Send)[1:]
    assert again == Send(stream, Heartbeat(6, 3, 22.1, session.link.rtt_ms))


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


def test_patience_with_a_verifier_that_reads_the_prompt_counts_from_its_progress() -> None:
    session = session_of(replace(SETTINGS, patience_ms=700.0))
    session.start(0.0)
    session.drafted((5, 6), (1.0, 1.0), 0.0)
    session.connected(1, 0.0)
    for now, read_tokens in ((0.3, 0), (0.5, 256), (0.8, 256), (1.1, 512), (1.4, 512), (1.7, 512)):
        session.receive(1, Heartbeat(0, 2, read_tokens=read_tokens), now)
        assert of_type(session.tick(now), Emit, Disconnect) == []
    assert of_type(session.tick(1.8), Emit, Disconnect) == [Emit(2, (5, 6), (LOCAL, LOCAL)), Disconnect(1)]


def test_local_text_goes_on_while_the_verifier_reads_it() -> None:
    session = local(replace(SETTINGS, patience_ms=900.0))
    stream = redialled(session, 1.0)
    session.connected(stream, 2.0)
    session.drafted((8,), (1.0,), 2.1)
    shown_at = []
    for now, read_tokens in ((2.2, 22), (2.4, 24), (2.6, 24), (2.8, 24), (3.0, 24), (3.2, 24)):
        session.receive(stream, Heartbeat(0, 0, read_tokens=read_tokens), now)
        effects = session.tick(now)
        assert of_type(effects, Disconnect) == []
        shown_at += [now] * len(of_type(effects, Emit))
    assert shown_at == [2.6], "the pause is max_stall_ms, and no longer for it"
    assert of_type(session.tick(3.3), Disconnect) == [Disconnect(stream)]


def test_amid_an_answer_patience_counts_from_the_last_commit() -> None:
    session = linked(replace(SETTINGS, patience_ms=700.0))
    session.receive(1, Heartbeat(0, 3, read_tokens=2), 0.4)
    assert of_type(session.tick(0.7), Disconnect) == [Disconnect(1)]


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


def test_drafting_goes_on_from_what_was_shown_during_the_return() -> None:
    session = local()
    session.connected(redialled(session, 1.0), 2.1)
    assert of_type(session.drafted((8,), (1.0,), 2.2), Draft) == [Draft(6, session.path.log.hash_at(6), (), 1)]


def test_drafts_after_a_long_time_alone_are_sent() -> None:
    session = session_of(request=replace(REQUEST, max_new_tokens=200))
    session.start(0.0)
    session.disconnected(1, 0.0)
    for token in range(100, 200):
        session.drafted((token,), (1.0,), 0.0)
    stream = redialled(session, 0.0)
    session.connected(stream, 1.1)
    assert sent(session.drafted((5,), (1.0,), 1.2)) == [DraftMessage(102, session.path.log.hash_at(102), (5,), b"\xff")]


def test_commit_makes_the_next_backoff_short_again() -> None:
    session, now = local(), 1.0
    for _ in range(5):  # dials that fail
        now += 1.0
        (connect,) = of_type(session.tick(now), Connect)
        assert isinstance(connect, Connect)
        session.disconnected(connect.stream, now)
    stream = redialled(session, now)
    session.connected(stream, now + 1)
    session.receive(stream, Commit(5, (8,)), now + 1)
    session.disconnected(stream, now + 1)
    wakes_at = session.wake_at()
    assert wakes_at is not None
    assert wakes_at - (now + 1) <= SETTINGS.backoff_initial_ms / 1000


def test_verifier_without_the_prefix_gets_all_tokens() -> None:
    session = local()
    stream = redialled(session, 1.0)
    session.connected(stream, 2.1)
    again = Send(stream, REQUEST.open(session.path.log, known_len=0, opened_len=5))
    assert session.receive(stream, NeedTokens(), 2.2)[0] == again
    assert again not in session.receive(stream, NeedTokens(), 2.2)  # repeated


def test_need_for_tokens_on_a_linked_stream_is_nonsense() -> None:
    assert linked().receive(1, NeedTokens(), 0.1) == []


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
    wake_at = session.wake_at()
    assert wake_at is not None
    assert 3.1 < wake_at <= 3.1 + 0.05
    assert of_type(session.tick(wake_at), Connect) == [Connect(3, fresh=True)]


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


def test_slow_verifier_is_rejoined_all_the_same() -> None:
    """Its first commit comes after the pause; on the second Open the pause is as long as its patience."""
    session = local()
    stream = redialled(session, 1.0)
    session.connected(stream, 2.0)
    opened_len = session.path.sent_len  # not drafted beyond what is shown
    session.receive(stream, Heartbeat(1, 0), 2.5)
    session.tick(2.7)  # the pause is over: local tokens are shown
    session.drafted((8,), (1.0,), 2.71)
    effects = session.receive(stream, Commit(opened_len, (9,)), 2.72)
    again = next(effect for effect in effects if isinstance(effect, Connect))
    session.connected(again.stream, 3.0)
    session.receive(again.stream, Heartbeat(2, 0), 3.5)
    assert [effect for effect in session.tick(3.7) if isinstance(effect, Emit)] == []
    assert session.phase is Phase.OPENING
