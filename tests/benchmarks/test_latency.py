from benchmarks.latency import Run
from benchmarks.prompts import Prompt

TEXT = list(range(20))


def run(**texts: list[int]) -> Run:
    answers = {
        way: {"tokens": tokens, "statistics": {"tpot_ms": 10.0, "ttft_ms": 5.0}} for way, tokens in texts.items()
    }
    return Run(Prompt("a", "b"), answers, [True] * 20, 5.0)


def test_the_draft_models_own_text_may_differ() -> None:
    assert run(cloud_only=TEXT, outrider=TEXT, local=TEXT[::-1]).is_identical
    assert not run(cloud_only=TEXT, outrider=TEXT[::-1], local=TEXT).is_identical


def test_an_answer_too_short_to_have_a_time_per_token_does_not_count() -> None:
    assert run(cloud_only=TEXT, outrider=TEXT).is_long_enough
    assert not run(cloud_only=TEXT, outrider=TEXT[:15]).is_long_enough
