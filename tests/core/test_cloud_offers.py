from dataclasses import replace
from math import e, exp

import pytest

from shared.core.errors import LocalProtocolError, RemoteProtocolError
from shared.core.messages import Finish, SessionStatus, Want
from shared.core.policies import Decodes
from shared.core.settings import SelfDecode
from tests.core.cloud import OPEN, SETTINGS, STOP, commit_of, draft_on, offered, planned, session_of, step


def test_chunk_keeps_its_place_in_the_line() -> None:
    session = session_of(cached_len=0)
    planned(session, now=0.2, most=1)
    session.stepped((), 1.0, 8, now=0.3)
    assert offered(session, now=0.4).waited_ms == pytest.approx(400.0)
    planned(session, now=0.4)
    assert commit_of(session.stepped((9,), 1.0, 8, now=0.5)).queue_ms == pytest.approx(400.0)
    assert offered(session, now=0.6).waited_ms == pytest.approx(100.0)


def test_offer_says_what_each_row_is_worth() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6), now=0.0)
    assert offered(session).worth == pytest.approx([0.8, 0.64])
    planned(session)
    step(session, 5, 6, 7)
    session.drafted(draft_on(session, 8), now=0.0)
    overall = (0.8 * 4 + 2) / 6  # two more were accepted,
    assert offered(session).worth == pytest.approx([(overall * 4 + 2) / 6])  # both as sure as this one


def test_drafts_that_are_here_are_judged_by_what_the_first_commits_teach() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6, 7, 8), now=0.0)
    planned(session, most=3)
    step(session, 5, 6, 7)
    overall = (0.8 * 4 + 3) / 7  # three were accepted
    assert offered(session).worth == pytest.approx([(overall * 4 + 3) / 7])


def test_a_session_that_was_opened_again_far_behind_its_prompt_learns_as_fast() -> None:
    opened = replace(OPEN, tokens=tuple(range(1, 91)), max_new_tokens=97)
    session = session_of(opened, cached_len=89)
    session.drafted(draft_on(session, 5, 6, 7, 8), now=0.0)
    planned(session, most=3)
    step(session, 5, 6, 7)
    assert offered(session).worth == pytest.approx([((0.8 * 4 + 3) / 7 * 4 + 3) / 7])


@pytest.mark.parametrize(
    ("self_decode", "want", "decodes"),
    [
        (SelfDecode.ALWAYS, Want.SPECULATE, Decodes.FREELY),
        (SelfDecode.IDLE, Want.SPECULATE, Decodes.SPARE),
        (SelfDecode.OFF, Want.SPECULATE, None),
        (SelfDecode.OFF, Want.STREAM, Decodes.FREELY),
        (SelfDecode.IDLE, Want.STREAM, Decodes.FREELY),
    ],
)
def test_operator_decides_on_steps_without_drafts(self_decode: SelfDecode, want: Want, decodes: Decodes | None) -> None:
    session = session_of(replace(OPEN, want=want), replace(SETTINGS, self_decode=self_decode))
    offer = session.offer(now=0.0)
    assert (offer and offer.decodes) is decodes
    assert offer is None or (offer.prefill_rows, offer.worth) == (0, [])


@pytest.mark.parametrize(
    ("self_decode", "decodes"),
    [
        (SelfDecode.ALWAYS, Decodes.FREELY),
        (SelfDecode.IDLE, Decodes.SPARE),
        (SelfDecode.OFF, Decodes.NEVER),
    ],
)
def test_operators_rule_stands_beside_drafts_and_prompts(self_decode: SelfDecode, decodes: Decodes) -> None:
    session = session_of(settings=replace(SETTINGS, self_decode=self_decode), cached_len=0)
    assert (offered(session).decodes, offered(session).prefill_rows) == (decodes, 2)
    session = session_of(settings=replace(SETTINGS, self_decode=self_decode))
    session.drafted(draft_on(session, 5), now=0.0)
    assert offered(session).decodes is decodes


def test_weight_is_one_by_the_smoothed_goodput() -> None:
    session = session_of()
    assert offered(session).weight == 1.0  # no goodput yet counts as one token a second
    session.drafted(draft_on(session, 5, 6, 7), now=0.0)
    planned(session)
    session.stepped((5, 6, 7, 8), 1.0, 8, now=0.0)
    assert session.goodput(0.0) == pytest.approx(4 / 2)  # over a window of two seconds
    assert offered(session).weight == pytest.approx(1 / 2)
    assert session.goodput(2.0) == pytest.approx(2 / e)
    assert offered(session, now=2.0).weight == 1.0
    planned(session, now=1.0)
    session.stepped((9,), 1.0, 8, now=1.0)
    assert session.goodput(1.0) == pytest.approx((4 * exp(-0.5) + 1) / 2)


def test_steady_goodput_is_what_it_is() -> None:
    session = session_of(replace(OPEN, max_new_tokens=90))
    for count in range(1, 81):
        session.acknowledged(len(session.log), 0.0, rtt_ms=0.0, now=count / 20)
        planned(session, now=count / 20)
        session.stepped((9,), 1.0, 8, now=count / 20)
    assert session.goodput(4.0) == pytest.approx(20 * (1 - exp(-2)), rel=0.03)


def test_session_without_drafts_is_served_after_a_while_until_one_comes() -> None:
    session = session_of(settings=replace(SETTINGS, self_decode=SelfDecode.OFF))
    assert session.wake_at() == 0.5
    assert planned(session, now=0.4) is None
    assert planned(session, now=0.5) is not None
    assert session.wake_at() is None  # a step is in flight
    session.stepped((9,), 1.0, 8, now=0.6)
    assert planned(session, now=0.6) is not None  # starved still: it does not wait again
    session.stepped((9,), 1.0, 8, now=0.7)
    session.drafted(draft_on(session, 5), now=0.8)
    assert planned(session, now=0.8) is not None
    session.stepped((5, 6), 1.0, 8, now=0.9)
    assert planned(session, now=0.9) is None
    assert session.wake_at() == pytest.approx(1.4)


def test_the_last_token_waits_for_no_draft() -> None:
    """None is of use: where drafts are waited for, each answer would end with a pause."""
    session = session_of(replace(OPEN, max_new_tokens=3), replace(SETTINGS, self_decode=SelfDecode.OFF))
    session.drafted(draft_on(session, 5), now=0.0)
    assert offered(session).decodes is Decodes.NEVER
    planned(session)
    step(session, 5, 6)
    assert offered(session).decodes is Decodes.FREELY
    planned(session)
    assert commit_of(step(session, 7)).finish is Finish.LENGTH


def test_session_that_no_step_had_room_for_is_served_after_a_while_until_a_draft_comes() -> None:
    session = session_of(settings=replace(SETTINGS, self_decode=SelfDecode.IDLE))
    assert session.wake_at() is None  # it is asked at every step, and has the next one if there is no other
    assert offered(session, now=0.4).decodes is Decodes.SPARE
    assert offered(session, now=0.5).decodes is Decodes.FREELY
    planned(session, now=0.5)
    session.stepped((9,), 1.0, 8, now=0.6)
    assert offered(session, now=0.6).decodes is Decodes.FREELY  # starved still
    session.drafted(draft_on(session, 5), now=0.8)
    assert offered(session, now=0.8).decodes is Decodes.SPARE


def test_waiting_time_counts_from_the_first_draft() -> None:
    session = session_of(settings=replace(SETTINGS, self_decode=SelfDecode.OFF))
    session.drafted(draft_on(session, 5), now=0.1)
    session.drafted(draft_on(session, 6, after=(5,)), now=0.2)
    planned(session, now=0.3)
    assert commit_of(session.stepped((5, 6, 7), 1.0, 8, now=0.4)).queue_ms == pytest.approx(200.0)


def test_reader_that_acknowledges_nothing_costs_no_forwards() -> None:
    session = session_of()
    for _ in range(6):
        planned(session)
        session.stepped((9,), 1.0, 8, now=0.0)
    assert planned(session) is None
    assert session.wake_at() is None  # only a message can help
    session.acknowledged(4, draft_ms=13.0, rtt_ms=0.0, now=0.0)
    assert session.status(0.0, 0.0).draft_ms == 13.0
    assert planned(session) is not None


def test_old_acknowledgement_takes_nothing_back() -> None:
    session = session_of()
    planned(session)
    session.stepped((9,), 1.0, 8, now=0.0)
    session.acknowledged(4, 0.0, 0.0, 0.0)
    session.acknowledged(3, 0.0, 0.0, 0.0)
    assert "4 acknowledged" in repr(session)


def test_acknowledging_what_was_never_committed_is_the_peers_error() -> None:
    with pytest.raises(RemoteProtocolError, match="acknowledged 4 tokens of 3 committed"):
        session_of().acknowledged(4, 0.0, 0.0, 0.0)


def test_nothing_is_offered_or_taken_over_a_step() -> None:
    session = session_of()
    planned(session)
    assert session.offer(now=0.0) is None
    with pytest.raises(LocalProtocolError, match="me/s: took 1 rows, <CloudSession me/s stepping"):
        session.take(1, now=0.0)


def test_taking_no_rows_is_our_bug() -> None:
    session = session_of()
    offered(session)
    with pytest.raises(LocalProtocolError, match="took 0 rows"):
        session.take(0, now=0.0)
    assert not session.is_stepping


def test_offer_that_was_not_taken_is_made_anew() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5), now=0.0)
    assert len(offered(session).worth) == 1
    session.drafted(draft_on(session, 6, after=(5,)), now=0.0)
    rows = planned(session)
    assert rows is not None
    assert rows.tokens == (3, 5, 6)


def test_waiting_for_an_acknowledgement_is_no_waiting_for_the_verifier() -> None:
    session = session_of()
    for _ in range(6):
        planned(session)
        session.stepped((9,), 1.0, 8, now=0.0)
    session.acknowledged(5, 0.0, rtt_ms=0.0, now=3.0)
    assert offered(session, now=3.5).waited_ms == pytest.approx(500.0)
    session.acknowledged(6, 0.0, rtt_ms=0.0, now=3.6)  # it was ready before
    assert offered(session, now=3.7).waited_ms == pytest.approx(700.0)


def test_session_is_active_while_its_text_goes_on_and_its_edge_keeps_up() -> None:
    session = session_of(replace(OPEN, max_new_tokens=7))
    assert (session.is_active, session.is_ready) == (True, True)
    planned(session)
    assert (session.is_active, session.is_ready) == (True, False)
    step(session, 9)
    for _ in range(5):
        planned(session)
        step(session, 9)
    assert (session.is_active, session.is_ready) == (False, False)
    session.acknowledged(9, 0.0, 0.0, 0.0)
    assert (session.is_active, session.is_ready) == (True, True)
    planned(session)
    assert commit_of(step(session, 9)).finish is Finish.LENGTH
    assert (session.is_active, session.is_ready) == (False, False)


def test_status_is_what_an_operator_is_shown() -> None:
    session = session_of(cached_len=1)
    assert session.status(heard_at=0.0, now=0.0).state == "prefill"
    session.drafted(draft_on(session, 5, 6, 7), now=0.0)
    planned(session)
    assert session.status(heard_at=0.0, now=0.0).state == "stepping"
    session.stepped((5, 6, 9, 1), 1.0, 8, now=1.0)
    session.acknowledged(5, draft_ms=13.0, rtt_ms=0.0, now=1.0)
    assert session.status(heard_at=0.5, now=1.0) == SessionStatus(
        session="me/s",
        state="ready",
        want=Want.SPECULATE,
        prompt_len=3,
        committed_len=6,
        cached_len=5,
        pending_tokens=0,
        num_steps=1,
        num_drafted=3,
        num_accepted=2,
        goodput=1.5,
        draft_ms=13.0,
        silent_ms=500.0,
    )


def test_status_tells_a_session_that_waits_for_its_edge_from_one_that_has_ended() -> None:
    session = session_of()
    for _ in range(6):
        planned(session)
        step(session, 9)
    assert session.status(0.0, 0.0).state == "waiting"
    session.acknowledged(9, 0.0, 0.0, 0.0)
    planned(session)
    step(session, STOP)
    assert session.status(0.0, 0.0).state == "finished"


def test_repr_is_the_whole_state() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5), now=0.0)
    drafts = "<DraftTree 1 pending, depth 1>, acceptance 0.80, <Forecast 4 known, 0.0 ms each, 0 ms to answer>"
    state = f"3 committed, 2 cached, 3 acknowledged, {drafts}"
    assert repr(session) == f"<CloudSession me/s ready: {state}>"
    planned(session)
    assert repr(session) == f"<CloudSession me/s stepping: {state}>"
