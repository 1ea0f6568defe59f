"""A decode step guesses on from the path that was rejected; what it tells is the verifier's own."""

from dataclasses import replace

import pytest

from shared.core.cloud_session import CloudSession
from shared.core.effects import CloudEffect, Rows, Send
from shared.core.messages import Commit, Draft, Finish, Heartbeat, Want
from shared.core.session_table import SessionTable
from shared.core.settings import SelfDecode
from shared.core.tokens import TokenLog
from shared.policy.scheduler import BestRate
from tests.core import table as tables
from tests.core.cloud import OPEN, SETTINGS, STOP, commit_of, draft_on, offered, planned, session_of, step


def rejecting(*drafts: int, selected: int = 9) -> CloudSession:
    """A session whose drafts were rejected at the first one, for `selected`."""
    session = session_of(settings=replace(SETTINGS, window_tokens=50))
    session.drafted(draft_on(session, *drafts), now=0.0)
    planned(session)
    step(session, selected, *[99] * len(drafts))
    return session


def recycling(session: CloudSession, most: int = 99) -> Rows:
    assert offered(session).worth == []
    return session.take(1 + min(len(session.recycle(0.0)), most), 0.0)


def commits(effects: list[CloudEffect]) -> list[Commit]:
    sent = [effect.message for effect in effects if isinstance(effect, Send)]
    return [message for message in sent if isinstance(message, Commit)]


def test_tokens_behind_the_rejected_one_are_guessed_again() -> None:
    session = rejecting(5, 6, 7, 8)
    rows = recycling(session)
    assert (rows.tokens, rows.parents) == ((9, 6, 7, 8), (-1, 0, 1, 2))
    commit = commit_of(step(session, 6, 7, 1, 99))
    assert (commit.tokens, commit.num_recycled) == ((6, 7, 1), 2)
    assert (commit.num_drafted, commit.num_accepted) == (0, 0), "they are no drafts of the edge"
    assert session.log.tokens(3) == (9, 6, 7, 1)


def test_kept_rows_are_those_that_were_right() -> None:
    session = rejecting(5, 6, 7, 8)
    recycling(session)
    stepped = step(session, 6, 1, 99, 99)
    assert (stepped.start, stepped.kept_rows, session.cached_len) == (3, (0, 1), len(session.log) - 1)


class AskedLog(TokenLog):
    """Remembers which of its tokens were asked for."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        super().__init__(tokens)
        self.asked: list[tuple[int, int | None]] = []

    def tokens(self, start: int = 0, stop: int | None = None) -> tuple[int, ...]:
        self.asked.append((start, stop))
        return super().tokens(start, stop)


@pytest.mark.parametrize(
    ("want", "cached_len", "asked"), [(Want.SPECULATE, 0, [(0, 3)]), (Want.SPECULATE, 2, []), (Want.STREAM, 0, [])]
)
def test_what_a_step_reads_is_looked_over_while_it_runs(
    want: Want, cached_len: int, asked: list[tuple[int, int | None]]
) -> None:
    """A prompt, that is: a decode step reads one token, and a plain stream has no use for guesses."""
    log = AskedLog(OPEN.tokens)
    session = CloudSession("me/s", replace(OPEN, want=want), log, cached_len, SETTINGS, now=0.0)
    planned(session)
    log.asked.clear()
    session.read_along()
    assert log.asked == asked
    step(session, 9)
    session.read_along()
    assert log.asked == asked, "no step is in flight"


def test_guess_that_was_not_granted_or_is_all_wrong_costs_nothing() -> None:
    session = rejecting(5, 6, 7, 8)
    assert recycling(session, most=0).tokens == (9,)
    commit = commit_of(step(session, 6))
    assert (commit.tokens, commit.num_recycled) == ((6,), 0)
    assert recycling(session).tokens == (6, 7, 8)
    commit = commit_of(step(session, 1, 99, 99))
    assert (commit.tokens, commit.num_recycled) == ((1,), 0)


def test_next_guess_knows_what_became_of_the_last() -> None:
    session = rejecting(5, 6, 7, 8)
    offered(session)
    before = session.recycle(0.0)
    session.take(1, 0.0)  # none of it: the text tells all the same
    step(session, 6)
    session.drafted(draft_on(session, 5, 6, 7), now=0.0)
    planned(session)
    step(session, 9, 99, 99, 99)
    offered(session)
    assert session.recycle(0.0)[0] > before[0]


def test_guess_says_nothing_of_the_edges_drafts() -> None:
    session = rejecting(5, 6, 7, 8)
    session.acknowledged(3, draft_ms=5.0, rtt_ms=40.0, now=0.0)
    offered(session)
    before = session.outlook(0.0)
    recycling(session)
    step(session, 1, 99, 99, 99)
    after = session.outlook(0.0)
    assert before is not None
    assert after is not None
    assert after.acceptance == before.acceptance


def test_drafts_go_before_a_guess() -> None:
    session = rejecting(5, 6, 7, 8)
    session.drafted(draft_on(session, 6), now=0.0)
    assert offered(session).worth != []
    assert session.recycle(0.0) == []
    planned(session)
    assert commit_of(step(session, 6, 1)).num_recycled == 0


def test_guess_that_drafts_overtake_is_forgotten() -> None:
    session = rejecting(5, 6, 7, 8)
    offered(session)
    session.recycle(0.0)
    session.drafted(draft_on(session, 6), now=0.0)
    assert planned(session) is not None
    commit = commit_of(step(session, 6, 1))
    assert (commit.num_drafted, commit.num_accepted, commit.num_recycled) == (1, 1, 0)


def test_drafts_that_arrive_during_the_step_stand_or_fall_as_ever() -> None:
    session = rejecting(5, 6, 7, 8)
    recycling(session)
    session.drafted(draft_on(session, 6, 7, 4), now=0.0)
    step(session, 6, 7, 4, 99)
    assert len(session.log) == 7
    assert session.pending_tokens == 0
    planned(session)
    assert step(session, 1).commit is not None


def test_rest_of_the_path_that_arrives_later_is_guessed_too() -> None:
    session = session_of()
    on_its_way = draft_on(session, 7, 8, after=(5, 6))
    session.drafted(draft_on(session, 5, 6), now=0.0)
    planned(session)
    step(session, 9, 99, 99)
    assert session.drafted(on_its_way, now=0.0).stale == 2
    assert recycling(session).tokens == (9, 6, 7, 8)


def test_path_that_arrives_after_the_text_has_left_it_is_guessed_too() -> None:
    session = session_of()
    late, later = draft_on(session, 9, 5, 6, 7), draft_on(session, 8, after=(9, 5, 6, 7))
    for token in (9, 4):
        planned(session)
        step(session, token)
    for draft in (late, later, late):  # the last one is a copy
        session.drafted(draft, now=0.0)
    assert recycling(session).tokens == (4, 6, 7, 8)


def test_no_guess_reaches_beyond_the_text() -> None:
    session = session_of(replace(OPEN, max_new_tokens=4), replace(SETTINGS, window_tokens=50))
    session.drafted(draft_on(session, 5, 6, 7), now=0.0)
    planned(session)
    step(session, 9, 99, 99, 99)
    assert recycling(session).tokens == (9, 6, 7)  # and next_token is the last
    commit = commit_of(step(session, 6, 7, 1))
    assert (commit.tokens, commit.finish) == ((6, 7, 1), Finish.LENGTH)


def test_guessed_stop_token_ends_the_text() -> None:
    session = rejecting(5, 6, STOP, 8)
    recycling(session)
    commit = commit_of(step(session, 6, STOP, 99, 99))
    assert (commit.tokens, commit.num_recycled, commit.finish) == ((6, STOP), 2, Finish.STOP)


def repeating(*tokens: int, want: Want = Want.SPECULATE) -> CloudSession:
    """A session without drafts whose text repeats itself."""
    opened = replace(OPEN, tokens=tokens, prompt_len=len(tokens), max_new_tokens=90, want=want)
    return session_of(opened, replace(SETTINGS, window_tokens=50), cached_len=len(tokens) - 1)


def test_text_that_repeats_itself_is_guessed_from_the_first_step_on() -> None:
    session = repeating(1, 2, 3, 4, 5, 6, 1, 2)
    rows = recycling(session)
    assert (rows.tokens, rows.parents) == ((2, 3, 4, 5, 6), (-1, 0, 1, 2, 3)), "as many as a step takes"
    commit = commit_of(step(session, 3, 4, 9, 99, 99))
    assert (commit.tokens, commit.num_recycled, commit.num_drafted) == ((3, 4, 9), 2, 0)


def test_plain_stream_is_decoded_a_token_a_step() -> None:
    assert recycling(repeating(1, 2, 3, 4, 1, 2, want=Want.STREAM)).tokens == (2,)


def test_better_guess_of_the_two_is_taken() -> None:
    session = repeating(7, 8, 20, 30, 40, 1)
    session.drafted(draft_on(session, 5, 7, 8, 50, 60), now=0.0)
    planned(session)
    step(session, 7, *[99] * 4)  # it has been followed by 8 in the text and in the path
    assert recycling(session).tokens == (7, 8, 50, 60), "what the draft has just thought of is likelier"
    for token in (8, 20):
        step(session, token, *[99] * 3)
        rows = recycling(session)
    assert rows.tokens == (20, 30, 40, 1, 7), "three tokens of the text match, none of the path does any more"


def worth_after_a_break(draft_ms: float) -> list[float]:
    """Of a guess 100 ms after the commit before, where the edge's answer takes 40 ms and a draft."""
    session = repeating(1, 2, 3, 4, 5, 6, 1, 2)
    session.acknowledged(8, draft_ms, 40.0, 0.0)
    offered(session)
    session.take(1, 0.0)
    step(session, 3)
    session.drafted(draft_on(session, 9), 0.0)
    planned(session)
    step(session, 4, 99, now=0.1)
    offered(session, 0.1)
    return session.recycle(0.1)


@pytest.mark.parametrize(("draft_ms", "foretold"), [(5.0, 4), (19.0, 2), (60.0, 0), (200.0, 0)])
def test_guess_is_worth_less_where_drafts_will_have_said_the_same(draft_ms: float, foretold: int) -> None:
    unknown, worth = worth_after_a_break(0.0), worth_after_a_break(draft_ms)
    assert len(unknown) == 4
    assert all(ours < 0.5 * theirs for ours, theirs in zip(worth[:foretold], unknown, strict=False))
    least = worth[foretold - 1] if foretold else 1.0
    assert worth[foretold:] == [min(one, least) for one in unknown[foretold:]], "none is worth more than one before it"


@pytest.mark.parametrize(("sessions", "row_ms", "guess"), [(2, 0.0, (4, 5, 6, 1)), (2, 30.0, ()), (33, 0.0, ())])
def test_table_grants_a_few_sessions_the_rows_that_pay(sessions: int, row_ms: float, guess: tuple[int, ...]) -> None:
    cloud = replace(tables.CLOUD, self_decode=SelfDecode.IDLE, max_draft_rows=4)
    settings = replace(tables.SETTINGS, session=cloud, max_sessions=sessions)
    table = SessionTable(settings, BestRate(lambda rows: 30.0 + row_ms * (rows - 1), 512, prefill_chunk_tokens=512))
    prompt = (1, 2, 3, 4, 5, 6, 1, 2)
    for stream in range(sessions):
        opening = replace(tables.OPEN, session_id=f"s{stream}", tokens=prompt, prompt_len=len(prompt))
        tables.opened(table, stream, opening)
    tables.step(table, 3)
    batch = table.plan(0.0).batch
    assert [rows.tokens for rows in batch] == [(3, *guess)] * sessions
    sent = commits(table.stepped([(4, 5, 9, 9, 9)[: len(rows.tokens)] for rows in batch], 30.0, now=0.0))
    committed = ((4, 5, 9), 2) if guess else ((4,), 0)
    assert [(commit.tokens, commit.num_recycled) for commit in sent] == [committed] * sessions


@pytest.mark.parametrize(("row_ms", "expected"), [(0.0, (9, 6, 7, 8)), (30.0, (9,))])
@pytest.mark.parametrize("others", [0, 1])
def test_table_grants_a_lone_session_the_rows_that_pay(row_ms: float, expected: tuple[int, ...], others: int) -> None:
    settings = replace(tables.SETTINGS, session=replace(tables.CLOUD, self_decode=SelfDecode.IDLE))
    table = SessionTable(settings, BestRate(lambda rows: 30.0 + row_ms * (rows - 1), 64))
    tables.opened(table, 1)
    if others:  # whose text ends with the first step
        tables.opened(table, 2, replace(tables.OPEN, session_id="other", max_new_tokens=1))
    tables.step(table, 4)
    table.receive(1, Heartbeat(0, 4, draft_ms=20.0, rtt_ms=150.0), now=0.0)
    table.receive(1, Draft(4, TokenLog((1, 2, 3, 4)).hash_at(4), (5, 6, 7, 8)), now=0.0)
    (rows,) = table.plan(0.0).batch
    assert commits(table.stepped([(9, *[99] * 4)[: len(rows.tokens)]], 30.0, now=0.0))[0].tokens == (9,)
    (rows,) = table.plan(0.0).batch  # as it was decided at the commit
    assert rows.tokens == expected
    (commit,) = commits(table.stepped([(6, 7, 1, 99)[: len(rows.tokens)]], 30.0, now=0.0))
    assert commit.num_recycled == (2 if row_ms == 0.0 else 0)
