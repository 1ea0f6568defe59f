from typing import Any

import pytest
from benchmarks.processes import BenchError
from benchmarks.versions import Pair, compare

TEXT = list(range(20))


def answer(tpot_ms: float, tokens: list[int] = TEXT) -> dict[str, Any]:
    counts = dict.fromkeys(("num_steps", "num_draft_tokens", "num_accepted_tokens", "num_recycled_tokens"), 3)
    times = {"tpot_ms": tpot_ms, "draft_ms": 2.0, "mean_verify_ms": 5.0, "wasted_draft_tokens": 1}
    return {"tokens": tokens, "statistics": counts | times}


def test_what_counts_is_the_ratio_of_each_pair() -> None:
    """Half as long and just as long: the geometric mean is 0.7071; its logarithm varies by 0.4901 in two pairs."""
    found = compare([Pair("a", answer(10.0), answer(20.0)), Pair("b", answer(30.0), answer(30.0, TEXT[::-1]))])
    assert (found["ratio"], found["ratio_standard_error"]) == (0.7071, 0.2451)
    assert (found["pairs"], found["identical_pairs"]) == (2, 1)
    assert (found["median_ratio"], found["faster_pairs"]) == (0.75, 1)
    assert found["tpot_ms"] == [20.0, 25.0]


def test_one_pair_says_nothing() -> None:
    with pytest.raises(BenchError, match=r"^1 pair\(s\) of answers with 16 tokens and more; give more prompts$"):
        compare([Pair("a", answer(10.0), answer(20.0))])


def test_an_answer_without_a_time_per_token_makes_no_pair() -> None:
    assert not Pair("a", answer(10.0), answer(20.0, TEXT[:15])).is_long_enough
    assert Pair("a", answer(10.0), answer(20.0, TEXT[:16])).is_long_enough


def test_what_an_older_version_does_not_report_is_left_out() -> None:
    older = answer(20.0)
    del older["statistics"]["num_recycled_tokens"]
    found = compare([Pair("a", answer(10.0), older)] * 2)
    assert "num_recycled_tokens" not in found
    assert found["num_steps"] == [3.0, 3.0]
