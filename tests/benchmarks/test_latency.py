from benchmarks.latency import Run, _sources
from benchmarks.prompts import Prompt

TEXT = list(range(20))


def run(**texts: list[int]) -> Run:
    answers = {
        way: {"tokens": tokens, "statistics": {"tpot_ms": 10.0, "ttft_ms": 5.0}} for way, tokens in texts.items()
    }
    return Run(Prompt("a", "b"), answers, [True] * 20, 5.0, 0.0)


def test_the_draft_models_own_text_may_differ() -> None:
    assert run(cloud_only=TEXT, outrider=TEXT, local=TEXT[::-1]).is_identical
    assert not run(cloud_only=TEXT, outrider=TEXT[::-1], local=TEXT).is_identical


def test_an_answer_too_short_to_have_a_time_per_token_does_not_count() -> None:
    assert run(cloud_only=TEXT, outrider=TEXT).is_long_enough
    assert not run(cloud_only=TEXT, outrider=TEXT[:15]).is_long_enough


def test_acceptance_by_source_is_over_all_runs() -> None:
    def counts(drafted: int, accepted: int) -> dict[str, float]:
        return {"num_draft_tokens": drafted, "num_accepted_tokens": accepted, "acceptance_rate": 0.0}

    runs = [run(outrider=TEXT), run(outrider=TEXT)]
    for one, sources in zip(
        runs, ({"model": counts(10, 9), "ngram": counts(2, 2)}, {"model": counts(30, 21)}), strict=True
    ):
        one.answers["outrider"]["statistics"]["draft_sources"] = sources
    assert _sources(runs) == {
        "model": {"num_draft_tokens": 40, "acceptance_rate": 0.75},
        "ngram": {"num_draft_tokens": 2, "acceptance_rate": 1.0},
    }
