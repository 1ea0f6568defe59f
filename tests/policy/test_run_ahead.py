import math
from dataclasses import replace

import pytest

from shared.core.policies import DraftObservation
from shared.policy.run_ahead import RunAhead, StopAndWait

SEEN = DraftObservation(
    acceptance=0.9,
    draft_ms=8.0,
    rtt_ms=50.0,
    ahead_tokens=0,
    unsent_tokens=0,
    max_ahead=64,
    since_sent_ms=1_000.0,
    until_step_ms=0.0,
)


@pytest.mark.parametrize(("draft_ms", "tokens"), [(0.0, 1), (8.0, 1), (2.0, 2), (0.1, 8)])
def test_fast_drafts_come_in_chunks_that_no_commit_waits_long_for(draft_ms: float, tokens: int) -> None:
    assert RunAhead().draft_tokens(replace(SEEN, draft_ms=draft_ms)) == tokens


@pytest.mark.parametrize(
    ("acceptance", "depth"), [(0.0, 1), (0.2, 1), (0.5, 3), (0.9, 21), (0.98, 48), (0.999, 48), (1.0, 48)]
)
def test_depth_ends_where_a_token_is_hardly_worth_drafting(acceptance: float, depth: int) -> None:
    seen = replace(SEEN, acceptance=acceptance, draft_ms=0.1)
    drafted = 0
    while tokens := RunAhead().draft_tokens(replace(seen, ahead_tokens=drafted)):
        drafted += tokens
    assert drafted == depth


def test_verifier_bounds_the_depth() -> None:
    seen = replace(SEEN, acceptance=1.0, draft_ms=0.1, max_ahead=12)
    assert RunAhead().draft_tokens(replace(seen, ahead_tokens=9)) == 3
    assert RunAhead().draft_tokens(replace(seen, ahead_tokens=15)) == 0


@pytest.mark.parametrize(
    ("since_sent_ms", "until_step_ms", "wait_ms"),
    [(1_000.0, 0.0, 0.0), (30.0, 0.0, 12.0), (30.0, 10.0, 12.0), (30.0, 40.0, 35.0), (1_000.0, 4.0, 0.0)],
)
def test_message_waits_for_its_interval_and_for_the_next_step(
    since_sent_ms: float, until_step_ms: float, wait_ms: float
) -> None:
    seen = replace(SEEN, since_sent_ms=since_sent_ms, until_step_ms=until_step_ms)
    assert RunAhead(message_interval_ms=42.0).send_in_ms(seen, is_drafting=True) == wait_ms


def test_stop_and_wait_drafts_one_round_and_then_waits() -> None:
    policy = StopAndWait(draft_tokens_per_round=5)
    assert policy.draft_tokens(SEEN) == 5
    assert policy.draft_tokens(replace(SEEN, ahead_tokens=2, unsent_tokens=2)) == 3
    assert policy.draft_tokens(replace(SEEN, ahead_tokens=5, unsent_tokens=5)) == 0
    assert policy.draft_tokens(replace(SEEN, ahead_tokens=3, unsent_tokens=0)) == 0
    assert policy.draft_tokens(replace(SEEN, max_ahead=2)) == 2


def test_stop_and_wait_sends_a_whole_round() -> None:
    assert StopAndWait().send_in_ms(SEEN, is_drafting=True) == math.inf
    assert StopAndWait().send_in_ms(SEEN, is_drafting=False) == 0.0
