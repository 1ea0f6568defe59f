from edge_agent.channel import Traffic
from edge_agent.statistics import Statistics
from shared.core.effects import Confirm, Emit, Provenance, Retract
from shared.core.messages import Commit

LOCAL, ACCEPTED, CLOUD = Provenance.LOCAL, Provenance.ACCEPTED, Provenance.CLOUD
QUIET = Traffic()


def test_nothing_happened() -> None:
    report = Statistics(begun_at=5.0).report(QUIET, draft_ms=0.0, rtt_ms=0.0, wasted_tokens=0)
    rates = {name for name, value in report.items() if value is None}
    assert rates == {
        "acceptance_rate",
        "mean_acceptance_length",
        "mean_verify_ms",
        "bytes_up_per_token",
        "bytes_down_per_token",
    }
    assert report.pop("num_accepted_tokens_per_pos") == []
    assert report.pop("draft_sources") == {}
    assert {value for value in report.values() if value is not None} == {0}


def test_one_token_has_no_time_per_token() -> None:
    statistics = Statistics(begun_at=1.0)
    statistics.saw(Emit(3, (7,), (CLOUD,)), now=1.25)
    assert (statistics.ttft_ms, statistics.tpot_ms, statistics.max_itl_ms) == (250.0, 0.0, 0.0)


def test_a_sequence_by_hand() -> None:
    statistics = Statistics(begun_at=10.0)
    statistics.saw_commit(Commit(3, (7, 8, 9), num_drafted=4, num_accepted=2, verify_ms=30.0))
    statistics.saw(Emit(3, (7, 8, 9), (ACCEPTED, ACCEPTED, CLOUD)), now=10.5)
    statistics.saw_commit(Commit(6, (4,), verify_ms=20.0))
    statistics.saw(Emit(6, (4,), (CLOUD,)), now=10.75)
    statistics.saw(Emit(7, (5,), (LOCAL,)), now=11.5)
    statistics.disconnects += 1
    traffic = Traffic(open_bytes=50, bytes_up=40, bytes_down=60, messages_up=3, messages_down=4)
    assert statistics.report(traffic, draft_ms=5.004, rtt_ms=50.126, wasted_tokens=6) == {
        "tokens": 5,
        "ttft_ms": 500.0,
        "tpot_ms": 250.0,
        "max_itl_ms": 750.0,
        "accepted_tokens": 2,
        "cloud_tokens": 2,
        "local_tokens": 1,
        "retracted_tokens": 0,
        "num_steps": 2,
        "num_drafts": 1,
        "num_draft_tokens": 4,
        "num_accepted_tokens": 2,
        "num_recycled_tokens": 0,
        "num_accepted_tokens_per_pos": [1, 1],
        "acceptance_rate": 0.5,
        "mean_acceptance_length": 2.0,
        "draft_sources": {},
        "mean_verify_ms": 25.0,
        "wasted_draft_tokens": 6,
        "draft_ms": 5.0,
        "rtt_ms": 50.13,
        "open_bytes": 50,
        "bytes_up_per_token": 10.0,
        "bytes_down_per_token": 15.0,
        "messages_up": 3,
        "messages_down": 4,
        "disconnects": 1,
    }


def test_what_is_confirmed_counts_as_accepted_and_what_is_retracted_not_at_all() -> None:
    statistics = Statistics(begun_at=0.0)
    statistics.saw(Emit(3, (7,), (CLOUD,)), now=1.0)
    statistics.saw(Emit(4, (1, 2, 3), (LOCAL,) * 3), now=2.0)
    statistics.saw(Confirm(5), now=8.0)
    statistics.saw(Retract(5), now=8.0)
    statistics.saw(Emit(5, (9,), (CLOUD,)), now=9.0)
    report = statistics.report(QUIET, draft_ms=0.0, rtt_ms=0.0, wasted_tokens=0)
    counts = ("tokens", "accepted_tokens", "cloud_tokens", "local_tokens", "retracted_tokens")
    assert [report[name] for name in counts] == [3, 1, 2, 0, 2]
    assert statistics.tpot_ms == 4000.0
    assert statistics.max_itl_ms == 7000.0


def test_everything_retracted_begins_anew() -> None:
    statistics = Statistics(begun_at=0.0)
    statistics.saw(Emit(3, (7, 8), (LOCAL, LOCAL)), now=1.0)
    statistics.saw(Retract(3), now=2.0)
    assert (statistics.ttft_ms, statistics.retracted_tokens) == (0.0, 2)
    statistics.saw(Emit(3, (9,), (CLOUD,)), now=3.0)
    assert statistics.ttft_ms == 3000.0


def test_sources_are_judged_in_the_order_of_what_happened() -> None:
    """Commits are counted some at a time, but never behind drafts that came after them."""
    statistics = Statistics(begun_at=0.0)
    statistics.saw_drafts(10, (1, 2, 3), ("ngram",) * 3)
    statistics.saw_commit(Commit(10, (9,)))  # so 2 and 3 were drafted on a path that the text did not take
    statistics.saw_drafts(11, (5,), ("model",))
    statistics.saw_commit(Commit(11, (5,)))
    assert statistics.report(QUIET, draft_ms=0.0, rtt_ms=0.0, wasted_tokens=0)["draft_sources"] == {
        "model": {"num_draft_tokens": 1, "num_accepted_tokens": 1, "acceptance_rate": 1.0},
        "ngram": {"num_draft_tokens": 1, "num_accepted_tokens": 0, "acceptance_rate": 0.0},
    }


def test_every_commit_is_counted_however_many_there_are() -> None:
    statistics = Statistics(begun_at=0.0)
    for position in range(100):
        statistics.saw_commit(Commit(position, (7,), verify_ms=2.0))
    report = statistics.report(QUIET, draft_ms=0.0, rtt_ms=0.0, wasted_tokens=0)
    assert (report["num_steps"], report["mean_verify_ms"]) == (100, 2.0)
