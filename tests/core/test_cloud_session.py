from dataclasses import replace

import pytest

from shared.core.cloud_session import CloudSession, Stepped
from shared.core.draft_tree import Grafted
from shared.core.effects import Rows
from shared.core.errors import LocalProtocolError, RemoteProtocolError
from shared.core.messages import Commit, Draft, Finish, Open, Sampling, Want
from shared.core.settings import CloudSettings, SelfDecode
from shared.core.tokens import TokenLog, next_hash
from shared.testing.engines import TOY_VOCABULARY

STOP = 0
OPEN = Open("s", (1, 2, 3), 3, 10, TOY_VOCABULARY, Sampling(seed=7), frozenset((STOP,)))
SETTINGS = CloudSettings(
    context_length=100,
    self_decode=SelfDecode.ALWAYS,
    max_draft_rows=4,
    max_pending_tokens=8,
    window_tokens=6,
    prefill_chunk_tokens=5,
    starved_after_ms=500.0,
)


class TakeAll:
    """Every draft row pays."""

    def draft_rows(self, base_rows: int, worth: list[float]) -> int:
        return len(worth)


class TakeNone:
    """No draft row pays."""

    def draft_rows(self, base_rows: int, worth: list[float]) -> int:
        return 0


class Recording:
    """Takes all and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[float]]] = []

    def draft_rows(self, base_rows: int, worth: list[float]) -> int:
        self.asked.append((base_rows, worth))
        return len(worth)


def session_of(opened: Open = OPEN, settings: CloudSettings = SETTINGS, cached_len: int = 2) -> CloudSession:
    return CloudSession("me/s", opened, TokenLog(opened.tokens), cached_len, settings, now=0.0)


def draft_on(session: CloudSession, *tokens: int, after: tuple[int, ...] = ()) -> Draft:
    """A draft on the committed end, or on pending tokens after it."""
    prefix_hash = session.log.hash_at(len(session.log))
    for token in after:
        prefix_hash = next_hash(prefix_hash, token)
    return Draft(len(session.log) + len(after), prefix_hash, tokens)


def planned(session: CloudSession, spare: bool = False, now: float = 0.0) -> Rows | None:
    return session.plan(TakeAll(), spare, now)


def commit_of(stepped: Stepped) -> Commit:
    assert stepped.commit is not None
    return stepped.commit


def test_decode_step_commits_one_token() -> None:
    session = session_of()
    assert session.plan(TakeAll(), spare=False, now=0.25) == Rows("me/s", 2, (3,), (-1,), 0, Sampling(seed=7), 3)
    assert session.is_stepping
    assert session.stepped((9,), verify_ms=30.0, now=0.3) == Stepped(
        Commit(3, (9,), num_drafted=0, num_accepted=0, queue_ms=250.0, verify_ms=30.0, max_ahead=8), 2, (0,)
    )
    assert (session.log.tokens(), session.cached_len) == ((1, 2, 3, 9), 3)


def test_prompt_is_evaluated_in_chunks_and_the_last_one_decodes() -> None:
    opened = replace(OPEN, tokens=tuple(range(1, 13)), prompt_len=12)
    session = session_of(opened, replace(SETTINGS, self_decode=SelfDecode.OFF), cached_len=0)
    chunk = planned(session)
    assert chunk == Rows("me/s", 0, (1, 2, 3, 4, 5), (-1, 0, 1, 2, 3), 5, Sampling(seed=7), 12)
    assert session.stepped((), 1.0, now=0.0) == Stepped(None, 0, (0, 1, 2, 3, 4))
    planned(session)
    assert session.stepped((), 1.0, now=0.0) == Stepped(None, 5, (0, 1, 2, 3, 4))
    assert planned(session) == Rows("me/s", 10, (11, 12), (-1, 0), 1, Sampling(seed=7), 12)
    assert session.stepped((9,), 1.0, now=0.0).kept_rows == (0, 1)
    assert session.cached_len == 12


def test_exactly_one_chunk_needs_no_prefill_step() -> None:
    session = session_of(replace(OPEN, tokens=(1, 2, 3, 4, 5)), cached_len=0)
    rows = planned(session)
    assert rows is not None
    assert rows.first_selected == 4


def test_accepted_chain_commits_with_the_token_after_it() -> None:
    session = session_of()
    assert session.drafted(draft_on(session, 5, 6, 7), now=0.0) == Grafted(3, 0, 0)
    rows = planned(session)
    assert rows == Rows("me/s", 2, (3, 5, 6, 7), (-1, 0, 1, 2), 0, Sampling(seed=7), 3)
    stepped = session.stepped((5, 6, 7, 8), 1.0, now=0.0)
    assert stepped == Stepped(Commit(3, (5, 6, 7, 8), 3, 3, Finish.NONE, 0.0, 1.0, 8), 2, (0, 1, 2, 3))
    assert session.cached_len == 6


def test_first_wrong_draft_ends_what_is_accepted() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6, 7), now=0.0)
    planned(session)
    stepped = session.stepped((5, 9, 7, 8), 1.0, now=0.0)
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
    assert (rows.tokens, rows.parents) == ((3, 5, 8, 6, 9), (-1, 0, 0, 1, 2))
    stepped = session.stepped((8, 1, 9, 1, 4), 1.0, now=0.0)
    assert (commit_of(stepped).tokens, commit_of(stepped).num_accepted, stepped.kept_rows) == ((8, 9, 4), 2, (0, 2, 4))


def test_same_token_on_another_branch_is_not_taken_for_a_child() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6), now=0.0)
    session.drafted(draft_on(session, 8), now=0.0)
    planned(session)  # rows 3, 5, 8, 6: after 8 the target selects 6, which was drafted after 5 only
    stepped = session.stepped((8, 1, 6, 1), 1.0, now=0.0)
    assert (commit_of(stepped).tokens, stepped.kept_rows) == ((8, 6), (0, 2))


def test_drafts_that_the_step_left_out_stay_pending() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, 6, 7, 8, 9, 10), now=0.0)
    planned(session)
    assert commit_of(session.stepped((5, 6, 7, 8, 9), 1.0, now=0.0)).num_drafted == 4
    rows = planned(session)
    assert rows is not None
    assert rows.tokens == (9, 10)


def test_prompt_and_drafts_share_a_step() -> None:
    session = session_of(cached_len=0)
    session.drafted(draft_on(session, 5), now=0.0)
    assert planned(session) == Rows("me/s", 0, (1, 2, 3, 5), (-1, 0, 1, 2), 2, Sampling(seed=7), 3)
    assert session.stepped((5, 6), 1.0, now=0.0).kept_rows == (0, 1, 2, 3)


def test_policy_hears_what_each_row_is_worth() -> None:
    session, policy = session_of(), Recording()
    session.drafted(draft_on(session, 5, 6), now=0.0)
    session.plan(policy, spare=False, now=0.0)
    ((base_rows, worth),) = policy.asked
    assert base_rows == 1
    assert worth == pytest.approx([0.8, 0.64])
    session.stepped((5, 6, 7), 1.0, now=0.0)
    session.drafted(draft_on(session, 8), now=0.0)
    session.plan(policy, spare=False, now=0.0)
    assert policy.asked[1][1] == pytest.approx([(0.8 * 4 + 2) / 6])  # two more were accepted


@pytest.mark.parametrize(("self_decode", "rows"), [(SelfDecode.ALWAYS, 1), (SelfDecode.OFF, 2)])
def test_drafts_that_do_not_pay_are_left_out_where_it_may_decode(self_decode: SelfDecode, rows: int) -> None:
    session = session_of(settings=replace(SETTINGS, self_decode=self_decode))
    session.drafted(draft_on(session, 5, 6), now=0.0)
    batch = session.plan(TakeNone(), spare=False, now=0.0)
    assert batch is not None
    assert len(batch.tokens) == rows


@pytest.mark.parametrize(
    ("self_decode", "want", "spare", "decodes"),
    [
        (SelfDecode.ALWAYS, Want.SPECULATE, False, True),
        (SelfDecode.IDLE, Want.SPECULATE, True, True),
        (SelfDecode.IDLE, Want.SPECULATE, False, False),
        (SelfDecode.OFF, Want.SPECULATE, True, False),
        (SelfDecode.OFF, Want.STREAM, False, True),
    ],
)
def test_operator_decides_on_steps_without_drafts(
    self_decode: SelfDecode, want: Want, spare: bool, decodes: bool
) -> None:
    session = session_of(replace(OPEN, want=want), replace(SETTINGS, self_decode=self_decode))
    assert (planned(session, spare) is not None) is decodes


@pytest.mark.parametrize("self_decode", [SelfDecode.OFF, SelfDecode.IDLE])
def test_session_without_drafts_is_served_after_a_while_until_one_comes(self_decode: SelfDecode) -> None:
    session = session_of(settings=replace(SETTINGS, self_decode=self_decode))
    assert session.wake_at() == 0.5
    assert planned(session, now=0.4) is None
    assert planned(session, now=0.5) is not None
    assert session.wake_at() is None  # a step is in flight
    session.stepped((9,), 1.0, now=0.6)
    assert planned(session, now=0.6) is not None  # starved still: it does not wait again
    session.stepped((9,), 1.0, now=0.7)
    session.drafted(draft_on(session, 5), now=0.8)
    assert planned(session, now=0.8) is not None
    session.stepped((5, 6), 1.0, now=0.9)
    assert planned(session, now=0.9) is None
    assert session.wake_at() == pytest.approx(1.4)


def test_waiting_time_counts_from_the_first_draft() -> None:
    session = session_of(settings=replace(SETTINGS, self_decode=SelfDecode.OFF))
    session.drafted(draft_on(session, 5), now=0.1)
    session.drafted(draft_on(session, 6, after=(5,)), now=0.2)
    planned(session, now=0.3)
    assert commit_of(session.stepped((5, 6, 7), 1.0, now=0.4)).queue_ms == pytest.approx(200.0)


def test_reader_that_acknowledges_nothing_costs_no_forwards() -> None:
    session = session_of()
    for _ in range(6):
        planned(session)
        session.stepped((9,), 1.0, now=0.0)
    assert planned(session) is None
    assert session.wake_at() is None  # only a message can help
    session.acknowledged(4, draft_ms=13.0)
    assert session.draft_ms == 13.0
    assert planned(session) is not None


def test_old_acknowledgement_takes_nothing_back() -> None:
    session = session_of()
    planned(session)
    session.stepped((9,), 1.0, now=0.0)
    session.acknowledged(4, 0.0)
    session.acknowledged(3, 0.0)
    assert "4 acknowledged" in repr(session)


def test_acknowledging_what_was_never_committed_is_the_peers_error() -> None:
    with pytest.raises(RemoteProtocolError, match="acknowledged 4 tokens of 3 committed"):
        session_of().acknowledged(4, 0.0)


def test_stop_token_of_the_target_ends_the_text() -> None:
    session = session_of()
    planned(session)
    assert commit_of(session.stepped((STOP,), 1.0, now=0.0)).finish is Finish.STOP
    assert planned(session) is None
    assert session.wake_at() is None
    assert session.drafted(draft_on(session, 5), now=0.0) == Grafted(0, 1, 0)
    assert "STOP: 4 committed" in repr(session)


def test_drafted_stop_token_is_accepted_and_nothing_follows() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5, STOP, 6), now=0.0)
    planned(session)
    stepped = session.stepped((5, STOP, 6, 7), 1.0, now=0.0)
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
    commit = commit_of(session.stepped((5, 6, 7, 8), 1.0, now=0.0))
    assert (commit.tokens, commit.finish) == ((5, 6, 7, 8), Finish.LENGTH)


def test_plain_stream_has_no_use_for_drafts() -> None:
    session = session_of(replace(OPEN, want=Want.STREAM))
    assert session.drafted(draft_on(session, 5, 6), now=0.0) == Grafted(0, 2, 0)
    assert session.stale_tokens == 2


def test_stale_drafts_are_counted() -> None:
    session = session_of()
    session.drafted(Draft(3, 999, (5, 6)), now=0.0)
    assert session.stale_tokens == 2


def test_step_needs_a_plan() -> None:
    with pytest.raises(LocalProtocolError, match="stepped without a plan"):
        session_of().stepped((1,), 1.0, now=0.0)


def test_nothing_is_planned_over_a_step() -> None:
    session = session_of()
    planned(session)
    assert planned(session) is None


def test_repr_is_the_whole_state() -> None:
    session = session_of()
    session.drafted(draft_on(session, 5), now=0.0)
    state = "3 committed, 2 cached, 3 acknowledged, <DraftTree 1 pending, depth 1>, acceptance 0.80 at 0 ms"
    assert repr(session) == f"<CloudSession me/s ready: {state}>"
    planned(session)
    assert repr(session) == f"<CloudSession me/s stepping: {state}>"
