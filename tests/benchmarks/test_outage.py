import pytest
from benchmarks.outage import KINDS, LONGEST_S, SHORTEST_S, judge, percentile, plan

from shared.testing.recorded import Recording


def test_the_plan_has_every_kind_and_both_ends() -> None:
    planned = plan(30, seed=1)
    assert planned == plan(30, seed=1) != plan(30, seed=2)
    durations = sorted(for_s for _, for_s in planned)
    assert (durations[0], durations[-1]) == pytest.approx((SHORTEST_S, LONGEST_S))
    assert {kind: [one for one, _ in planned].count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 10)


def test_an_answer_is_judged_from_the_users_chair() -> None:
    """Cut at 1 s, back at 2 s; 0.4 s of silence, then local text, then the cloud's at 2.3 s and a longer pause."""
    recording = Recording.load()
    shown_at = [0.9, 1.0, 1.4, 1.5, 2.1, 2.3, 3.3]
    provenance = ["accepted", "cloud", "local", "local", "local", "cloud", "accepted"]
    tokens = list(recording.text(recording.prompt(4, 64), 7))
    tokens[3] += 1  # local text may be anything
    answer = {"shown_at": shown_at, "provenance": provenance, "tokens": tokens, "lost_tokens": 0, "doubled_tokens": 0}
    judged = judge(answer, recording, 4, ("blackhole", 1.0), 1.05, 2.0)
    assert judged.stall_ms == pytest.approx(600.0), "up to the first verified token, not after it"
    assert judged.rejoin_ms == pytest.approx(300.0)
    assert (judged.local_tokens, judged.wrong_tokens) == (3, 0)
    tokens[5] += 1
    assert judge(answer, recording, 4, ("blackhole", 1.0), 1.05, 2.0).wrong_tokens == 1
    assert judge(answer, recording, 4, ("blackhole", 1.0), 1.05, 9.0).rejoin_ms is None


def test_percentile_is_one_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0], 0.95) == 3.0
