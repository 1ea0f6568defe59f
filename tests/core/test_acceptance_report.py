from hypothesis import given
from hypothesis import strategies as st

from shared.core.acceptance_report import RequestAcceptance
from shared.core.messages import Commit


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    num_drafted = draw(st.integers(0, 12))
    num_accepted = draw(st.integers(0, num_drafted))
    return Commit(0, (7,) * (num_accepted + 1), num_drafted, num_accepted)


def counted(*seen: Commit) -> RequestAcceptance:
    acceptance = RequestAcceptance()
    for commit in seen:
        acceptance.count(commit)
    return acceptance


def test_a_request_by_hand() -> None:
    all_right = Commit(3, (1, 2, 3), num_drafted=2, num_accepted=2)
    none_right = Commit(6, (4,), num_drafted=3, num_accepted=0)
    first_right = Commit(7, (5, 6), num_drafted=3, num_accepted=1)
    self_decoded = Commit(9, (7, 8), num_recycled=1)
    assert counted(all_right, none_right, first_right, self_decoded).report() == {
        "num_steps": 4,
        "num_drafts": 3,
        "num_draft_tokens": 8,
        "num_accepted_tokens": 3,
        "num_recycled_tokens": 1,
        "num_accepted_tokens_per_pos": [2, 1],
        "acceptance_rate": 0.375,
        "mean_acceptance_length": 2.0,
    }


def test_nothing_happened() -> None:
    report = RequestAcceptance().report()
    assert (report["acceptance_rate"], report["mean_acceptance_length"]) == (None, None)
    assert report["num_accepted_tokens_per_pos"] == []
    assert counted(Commit(3, (1,))).report()["acceptance_rate"] is None


@given(st.lists(commits(), max_size=30))
def test_positions_add_up_to_the_accepted_tokens_and_never_rise(seen: list[Commit]) -> None:
    acceptance = counted(*seen)
    per_position = acceptance.num_accepted_tokens_per_pos
    assert sum(per_position) == acceptance.num_accepted_tokens == sum(commit.num_accepted for commit in seen)
    assert per_position == sorted(per_position, reverse=True)
    assert 0 not in per_position
    assert acceptance.num_committed_tokens == acceptance.num_accepted_tokens + acceptance.num_steps


def test_a_report_does_not_change_when_counting_goes_on() -> None:
    acceptance = counted(Commit(3, (1, 2), 1, 1))
    before = acceptance.report()
    acceptance.count(Commit(5, (3, 4), 1, 1))
    assert before["num_accepted_tokens_per_pos"] == [1]
