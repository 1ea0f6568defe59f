from dataclasses import replace

import pytest

from shared.core.acceptance import Acceptance
from shared.core.cloud_session import Stepped
from shared.core.draft_tree import Grafted
from shared.core.effects import Rows
from shared.core.errors import LocalProtocolError
from shared.core.messages import Commit, Draft, Finish, Sampling, Want
from shared.core.policies import Decodes, Offer
from shared.core.settings import CloudSettings, SelfDecode
from tests.core.cloud import OPEN, SETTINGS, STOP, commit_of, draft_on, offered, planned, session_of, step


def test_it_tells_how_much_of_a_prompt_it_has_read() -> None:
    session = session_of(cached_len=0)
    assert session.read_tokens == 0
    planned(session, most=1)
    step(session)
    assert session.read_tokens == 1
    planned(session)
    step(session, 5)
    assert session.read_tokens == 0, "all of it"
    session.evicted()
    planned(session, most=2)
    step(session)
    assert session.read_tokens == 2, "it reads the text again"


def test_decode_step_commits_one_token() -> None:
    session = session_of()
    assert planned(session, now=0.25) == Rows("me/s", 2, (3,), (-1,), 0, Sampling(seed=7), 3)
    assert session.is_stepping
    assert session.stepped((9,), verify_ms=30.0, max_ahead=8, now=0.3) == Stepped(
        Commit(3, (9,), num_drafted=0, num_accepted=0, queue_ms=250.0, verify_ms=30.0, max_ahead=8), 2, (0,)
    )
    assert (session.log.tokens(), session.cached_len) == ((1, 2, 3, 9), 3)


def test_prompt_is_evaluated_in_chunks_and_the_last_one_decodes() -> None:
    opened = replace(OPEN, tokens=tuple(range(1, 13)), prompt_len=12)
    session = session_of(opened, replace(SETTINGS, self_decode=SelfDecode.OFF), cached_len=0)
    assert offered(session).prefill_rows == 11
    assert planned(session, most=5) == Rows("me/s", 0, (1, 2, 3, 4, 5), (-1, 0, 1, 2, 3), 5, Sampling(seed=7), 12)
    assert step(session) == Stepped(None, 0, (0, 1, 2, 3, 4))
    planned(session, most=5)
    assert step(session) == Stepped(None, 5, (0, 1, 2, 3, 4))
    assert offered(session).prefill_rows == 1
    assert planned(session) == Rows("me/s", 10, (11, 12), (-1, 0), 1, Sampling(seed=7), 12)
    assert step(session, 9).kept_rows == (0, 1)
    assert session.cached_len == 12


def test_all_but_the_last_row_of_a_prompt_is_a_chunk_still() -> None:
    session = session_of(cached_len=0)
    assert planned(session, most=2) == Rows("me/s", 0, (1, 2), (-1, 0), 2, Sampling(seed=7), 3)
    assert step(session) == Stepped(None, 0, (0, 1))
    assert offered(session).prefill_rows == 0


def test_chunk_takes_no_drafts_along() -> None:
    session = session_of(cached_len=0)
    session.drafted(draft_on(session, 5), now=0.0)
    rows = planned(session, most=2)
    assert rows is not None
    assert rows.tokens == (1, 2)
    step(session)
    assert session.pending_tokens == 1


def test_whole_prompt_in_one_step_decodes_at_once() -> None:
    session = session_of(replace(OPEN, tokens=(1, 2, 3, 4, 5)), cached_len=0)
    rows = planned(session)
    assert rows is not None
    assert rows.first_selected == 4


def test_accepted_chain_commits_with_the_token_after_it() -> None:
    session = session_of()
    assert session.drafted(draft_on(session, 5, 6, 7), now=0.0) == Grafted(3, 0, 0)
    rows = planned(session)
    assert rows == Rows("me/s", 2, (3, 5, 6, 7), (-1, 0, 1, 2), 0, Sampling(seed=7), 3)
    stepped = session.stepped((5, 6, 7, 8), 1.0, 8, now=0.0)
    assert stepped == Stepped(Commit(3, (5, 6, 7, 8), 3, 3, Finish.NONE, 0.0, 1.0, 8), 2, (0, 1, 2, 3))
    assert session.cached_len == 6


def test_first_wrong_draft_ends_what_is_accepted() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6, 7), now=0.0)
    planned(session)
    stepped = session.stepped((5, 9, 7, 8), 1.0, 8, now=0.0)
    assert (commit_of(stepped).tokens, commit_of(stepped).num_accepted, stepped.kept_rows) == ((5, 9), 1, (0, 1))
    assert session.log.tokens() == (1, 2, 3, 5, 9)
    assert "0 pending" in repr(session)


def test_tree_is_one_step_and_the_right_branch_is_kept() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6), now=0.0)
    session.drafted(draft_on(session, 8), now=0.0)
    session.drafted(draft_on(session, 9, after=(8,)), now=0.0)
    rows = planned(session)
    assert rows is not None
    assert (rows.tokens, rows.parents) == ((3, 5, 6, 8, 9), (-1, 0, 1, 0, 3))
    stepped = session.stepped((8, 1, 1, 9, 4), 1.0, 8, now=0.0)
    assert (commit_of(stepped).tokens, commit_of(stepped).num_accepted, stepped.kept_rows) == ((8, 9, 4), 2, (0, 3, 4))


def test_same_token_on_another_branch_is_not_taken_for_a_child() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6), now=0.0)
    session.drafted(draft_on(session, 8), now=0.0)
    planned(session)  # rows 3, 5, 6, 8: after 8 the target selects 6, which was drafted after 5 only
    stepped = session.stepped((8, 1, 1, 6), 1.0, 8, now=0.0)
    assert (commit_of(stepped).tokens, stepped.kept_rows) == ((8, 6), (0, 3))


def test_drafts_that_the_step_left_out_stay_pending() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6, 7, 8, 9, 10), now=0.0)
    planned(session)
    assert commit_of(session.stepped((5, 6, 7, 8, 9), 1.0, 8, now=0.0)).num_drafted == 4
    rows = planned(session)
    assert rows is not None
    assert rows.tokens == (9, 10)


def test_prompt_and_drafts_share_a_step() -> None:
    session = session_of(cached_len=0)
    session.drafted(draft_on(session, 5), now=0.0)
    assert planned(session) == Rows("me/s", 0, (1, 2, 3, 5), (-1, 0, 1, 2), 2, Sampling(seed=7), 3)
    assert session.stepped((5, 6), 1.0, 8, now=0.0).kept_rows == (0, 1, 2, 3)


def test_grant_takes_the_surest_drafts() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6), now=0.0)
    session.drafted(draft_on(session, 8), now=0.0)
    rows = planned(session, most=3)
    assert rows is not None
    assert (rows.tokens, rows.parents) == ((3, 5, 6), (-1, 0, 1))  # 8 is worth 0.2 * 0.3 at first
    assert commit_of(step(session, 8, 1, 4)).num_drafted == 2
    assert session.pending_tokens == 0


def test_tree_in_one_draft_is_taken_by_the_chances_of_each_rank() -> None:
    session = session_of()
    tree = replace(draft_on(session, 5, 6, 8), parents=(-1,))
    assert session.drafted(tree, now=0.0) == Grafted(3, 0, 0)
    assert (session.pending_tokens, session.pending_siblings) == (3, 1)
    rows = planned(session)
    assert rows is not None
    assert (rows.tokens, rows.parents) == ((3, 5, 6, 8), (-1, 0, 1, 0))
    stepped = session.stepped((8, 1, 1, 4), 1.0, 8, now=0.0)
    assert (commit_of(stepped).tokens, commit_of(stepped).num_accepted, stepped.kept_rows) == ((8, 4), 1, (0, 3))
    assert session.drafted(tree, now=0.1).stale == 2  # 8 is what was committed


def test_grant_of_one_row_leaves_drafts_out() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6), now=0.0)
    rows = planned(session, most=1)
    assert rows is not None
    assert rows.tokens == (3,)
    assert commit_of(step(session, 5)) == Commit(3, (5,), 0, 0, Finish.NONE, 0.0, 1.0, 8)
    assert session.pending_tokens == 1  # 6 stands: what was committed is what it was drafted on


def test_stop_token_of_the_target_ends_the_text() -> None:
    session = session_of()
    planned(session)
    assert commit_of(session.stepped((STOP,), 1.0, 8, now=0.0)).finish is Finish.STOP
    assert planned(session) is None
    assert session.wake_at() is None
    assert session.drafted(draft_on(session, 5), now=0.0) == Grafted(0, 1, 0)
    assert "finished: 4 committed" in repr(session)


def test_drafted_stop_token_is_accepted_and_nothing_follows() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, STOP, 6), now=0.0)
    planned(session)
    stepped = session.stepped((5, STOP, 6, 7), 1.0, 8, now=0.0)
    assert commit_of(stepped) == Commit(3, (5, STOP), 3, 2, Finish.STOP, 0.0, 1.0, 8)
    assert stepped.kept_rows == (0, 1)  # the last committed token stays uncached
    assert session.cached_len == 4


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, context_length=7)], ids=["request", "context"])
def test_text_ends_at_the_limit_whatever_was_drafted(settings: CloudSettings) -> None:
    session = session_of(replace(OPEN, max_new_tokens=4 if settings is SETTINGS else 10), settings)
    session.drafted(draft_on(session, 5, 6, 7, 8, 9), now=0.0)
    rows = planned(session)
    assert rows is not None
    assert rows.tokens == (3, 5, 6, 7)  # the last place is for next_token
    commit = commit_of(session.stepped((5, 6, 7, 8), 1.0, 8, now=0.0))
    assert (commit.tokens, commit.finish) == ((5, 6, 7, 8), Finish.LENGTH)


def test_plain_stream_has_no_use_for_drafts() -> None:
    session = session_of(replace(OPEN, want=Want.STREAM))
    assert session.drafted(draft_on(session, 5, 6), now=0.0) == Grafted(0, 2, 0)
    assert session.stale_tokens == 2


def test_stale_drafts_are_counted() -> None:
    session = session_of()
    session.drafted(Draft(3, 999, (5, 6)), now=0.0)
    assert session.stale_tokens == 2


def test_drafts_that_came_too_late_are_judged_all_the_same() -> None:
    session, chance = session_of(), Acceptance()
    late = replace(draft_on(session, 5, 6, 7, 8), confidence=bytes((200, 200, 10, 10)))
    for token in (5, 6, 9):
        planned(session)
        step(session, token)
    session.drafted(late, now=0.0)
    chance.observe(2, 1)  # what follows a wrong token says nothing
    assert session.outlook(0.0) is None
    session.acknowledged(6, 5.0, 20.0, now=0.0)
    known = session.outlook(0.0)
    assert known is not None
    assert known.acceptance == chance.rate


def test_of_a_draft_that_was_overtaken_what_is_known_is_judged() -> None:
    session, chance = session_of(), Acceptance()
    late = replace(draft_on(session, 5, 6, 7), confidence=bytes((200, 200, 200)))
    planned(session)
    step(session, 5)
    assert session.drafted(late, now=0.0) == Grafted(2, 0, 0)
    chance.observe(1, 0)
    session.acknowledged(4, 5.0, 20.0, now=0.0)
    known = session.outlook(0.0)
    assert known is not None
    assert known.acceptance == chance.rate


def test_step_must_have_been_taken() -> None:
    with pytest.raises(LocalProtocolError, match="stepped without a step in flight"):
        session_of().stepped((1,), 1.0, 8, now=0.0)


def test_drafts_may_arrive_during_a_step() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6), now=0.0)
    planned(session)
    assert session.drafted(draft_on(session, 7, 8, after=(5, 6)), now=0.1) == Grafted(2, 0, 0)
    assert session.drafted(draft_on(session, 9), now=0.1) == Grafted(1, 0, 0)
    assert commit_of(step(session, 5, 6, 7)).tokens == (5, 6, 7)
    assert session.pending_tokens == 1  # 8 hangs on what was committed, 9 does not
    rows = planned(session)
    assert rows is not None
    assert rows.tokens == (7, 8)


def test_draft_that_a_step_in_flight_will_contradict_is_pruned() -> None:
    session = session_of()
    planned(session)
    assert session.drafted(draft_on(session, 5, 6), now=0.1) == Grafted(2, 0, 0)
    assert commit_of(step(session, 4)).tokens == (4,)
    assert session.pending_tokens == 0


def test_step_says_how_many_drafts_may_be_pending() -> None:
    session = session_of()
    planned(session)
    assert commit_of(session.stepped((9,), 1.0, max_ahead=2, now=0.0)).max_ahead == 2
    assert session.drafted(draft_on(session, 5, 6, 7), now=0.0) == Grafted(2, 0, 1)


def test_ten_thousand_pending_tokens_are_held_to_the_limit() -> None:
    session = session_of()
    assert session.drafted(draft_on(session, *range(1, 10_001)), now=0.0) == Grafted(8, 0, 9_992)
    assert session.pending_tokens == 8


def test_evicted_cache_is_rebuilt_like_a_prompt() -> None:
    session = session_of()
    planned(session)
    step(session, 9)
    session.evicted()
    assert offered(session).prefill_rows == 3
    assert planned(session) == Rows("me/s", 0, (1, 2, 3, 9), (-1, 0, 1, 2), 3, Sampling(seed=7), 3)
    assert step(session, 8) == Stepped(Commit(4, (8,), 0, 0, Finish.NONE, 0.0, 1.0, 8), 0, (0, 1, 2, 3))


def test_cache_is_never_evicted_under_a_forward() -> None:
    session = session_of()
    planned(session)
    with pytest.raises(LocalProtocolError, match="me/s: its cache was evicted under a running forward"):
        session.evicted()


def test_failed_step_commits_nothing_and_trusts_no_cache() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5), now=0.0)
    planned(session, now=0.25)
    assert (session.is_suspect, session.is_stepping) == (False, True)
    session.failed()
    assert (session.is_suspect, session.is_stepping) == (True, False)
    assert (session.cached_len, session.log.tokens()) == (0, (1, 2, 3))
    assert offered(session, now=0.5) == Offer(2, [0.8], Decodes.FREELY, 1.0, 500.0)  # its drafts and its place stand
    planned(session)
    assert commit_of(step(session, 5, 6)).tokens == (5, 6)
    assert (session.is_suspect, session.is_stepping) == (False, False)
