from dataclasses import replace

import pytest

from shared.core.edge_session import EdgeSession, Phase
from shared.core.effects import (
    Connect,
    Disconnect,
    Draft,
    Emit,
    Finished,
    Provenance,
    Rollback,
    Send,
)
from shared.core.errors import RemoteProtocolError
from shared.core.messages import (
    Close,
    Commit,
    Finish,
    Heartbeat,
    Open,
    Want,
)
from shared.core.messages import Draft as DraftMessage
from shared.core.policies import DraftObservation
from shared.core.settings import OnDisconnect
from shared.testing.engines import TOY_VOCABULARY
from tests.core.edge import LOCAL, REQUEST, REVISE, SETTINGS, Ahead, linked, local, of_type, redialled, sent, session_of

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


def test_engine_with_nothing_to_say_is_asked_again_when_the_text_is_another() -> None:
    session = session_of()
    session.start(0.0)
    assert session.drafted((), (), 0.0) == []
    assert of_type(session.connected(1, 0.0), Draft) == []
    assert len(of_type(session.receive(1, Commit(2, (5,)), 0.0), Draft)) == 1
    assert of_type(session.drafted((), (), 0.0), Draft) == []


def test_plain_stream_drafts_nothing_while_the_cloud_is_there() -> None:
    session = session_of(request=replace(REQUEST, want=Want.STREAM))
    assert session.start(0.0) == [Connect(1, fresh=True)]
    effects = session.connected(1, 0.1)
    assert [type(message) for message in sent(effects)] == [Open, Heartbeat]
    assert session.receive(1, Commit(2, (5,)), 0.2) == [Emit(2, (5,), (Provenance.CLOUD,))]
    assert of_type(session.disconnected(1, 0.3), Draft) == [Draft(3, session.path.log.hash_at(3), (1, 2, 5), 1)]


# -- the end without the cloud -----------------------------------------------------------------------------------------


def test_local_text_ends_at_the_limit() -> None:
    session = session_of(replace(SETTINGS, offline=True), replace(REQUEST, max_new_tokens=1))
    session.start(0.0)
    assert session.drafted((5,), (1.0,), 0.1) == [Emit(2, (5,), (LOCAL,)), Disconnect(0), Finished(Finish.LENGTH)]


def test_local_text_ends_where_the_draft_context_does() -> None:
    """Not at once, for the cloud may return and go on; but not for ever either."""
    session = local()
    assert of_type(session.drafted((), (), 1.1), Finished) == []
    ends_at = 1.1
    while session.phase is not Phase.DONE:
        wake_at = session.wake_at()
        assert wake_at is not None
        ends_at = wake_at
        effects = session.tick(ends_at)
    assert effects[-1] == Finished(Finish.LENGTH)
    assert ends_at <= 1.1 + SETTINGS.patience_ms / 1000


def test_offline_text_ends_at_once_where_the_draft_context_does() -> None:
    session = EdgeSession(REQUEST, replace(SETTINGS, offline=True), Ahead(2))
    session.start(0.0)
    assert session.drafted((), (), 0.1)[-1] == Finished(Finish.LENGTH)


def test_token_outside_of_the_vocabulary_is_the_peers_error() -> None:
    session = linked()
    with pytest.raises(RemoteProtocolError, match="outside of the vocabulary"):
        session.receive(1, Commit(session.committed_len, (1_000,)), 0.1)


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


@pytest.mark.parametrize(("first", "last"), [((5, 6), 7), ((5,), 0)], ids=["limit", "stop token"])
def test_policy_is_told_once_all_that_ends_the_text_is_drafted(first: tuple[int, ...], last: int) -> None:
    """The fourth token is the verifier's own; a stop token is not."""

    class OnceWhole(Ahead):
        def send_in_ms(self, seen: DraftObservation, is_drafting: bool) -> float:
            return 0.0 if seen.is_whole else 100.0

    session = EdgeSession(replace(REQUEST, max_new_tokens=4), SETTINGS, OnceWhole(3))
    session.start(0.0)
    session.connected(1, 0.0)
    assert sent(session.drafted(first, (1.0,) * len(first), 0.05)) == []
    (message,) = sent(session.drafted((last,), (1.0,), 0.06))
    assert isinstance(message, DraftMessage)
    assert message.tokens == (*first, last)


def test_nothing_is_sent_while_no_stream_is_up() -> None:
    session = local()
    assert sent(session.drafted((8,), (1.0,), 1.1)) == []
    assert session.wake_at() is not None


def test_repr_is_the_whole_state() -> None:
    assert repr(linked()) == (
        "<EdgeSession s linked on stream 1: 3 committed, 3 shown, <DraftPath 5 tokens, 5 sent, 5 in the engine, "
        "acceptance 0.84>, <Link rtt 0+-0 ms, patience 600 ms>>"
    )


def test_tail_that_the_verifier_cannot_hold_is_sent_in_parts() -> None:
    session = session_of(REVISE)
    session.start(0.0)
    session.disconnected(1, 0.0)
    tail = tuple(range(10, 18))
    for token in tail:
        session.drafted((token,), (1.0,), 0.0)
    stream = redialled(session, 0.0)
    session.connected(stream, 1.1)  # all of it is sent: how much is held is not known yet
    hashed = session.path.log.hash_at
    effects = session.receive(stream, Commit(2, tail[:2], 1, 1, max_ahead=3), 1.2)
    assert sent(effects) == [DraftMessage(5, hashed(5), tail[3:5], b"\xff\xff")]
    effects = session.receive(stream, Commit(4, tail[2:4], 1, 1, max_ahead=3), 1.3)
    assert sent(effects) == [Heartbeat(2, 6, draft_ms=0.0), DraftMessage(7, hashed(7), tail[5:7], b"\xff\xff")]


def test_what_the_prompts_step_took_is_expected_of_no_other() -> None:
    session = session_of()
    session.start(0.0)
    session.drafted((5, 6), (1.0, 1.0), 0.0)
    session.connected(1, 0.0)
    session.receive(1, Commit(2, (5,), verify_ms=755.0), 0.8)
    assert session.path.clock.next_step(3, 4, 0.8).step_ms == 0.0
    session.receive(1, Commit(3, (6, 7), num_drafted=1, num_accepted=1, verify_ms=40.0), 0.9)
    assert session.path.clock.next_step(5, 5, 0.9).step_ms == 40.0
