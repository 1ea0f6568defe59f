import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from benchmarks.latency import Bench, Run, _sources
from benchmarks.processes import BenchError, Child
from benchmarks.prompts import Prompt

from shared.testing.link_proxy import LinkProxy

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


class Edge(Child):
    """Gives these answers, without a process."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)

    async def ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        assert question["address"] == "127.0.0.1:7"
        return self.answers.pop(0)


LOST = {"error": "", "provenance": ["cloud", "local"]}
WHOLE = {"error": "", "provenance": ["cloud", "accepted"]}


def bench(*answers: dict[str, Any]) -> tuple[Bench, Edge]:
    edge, link = Edge(*answers), LinkProxy("127.0.0.1", 1, port=7)  # nothing goes over it
    return Bench({"onnx": edge}, link, link, [1.0]), edge


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_an_answer_during_which_the_cloud_was_lost_is_asked_for_again_and_counted(lost: int) -> None:
    running, edge = bench(*[LOST] * lost, WHOLE)
    assert asyncio.run(running.answer("onnx", "outrider", Prompt("a", "b"), 16)) == WHOLE
    assert running.num_repeated == lost
    assert not edge.answers


def test_a_cloud_that_is_lost_each_time_and_a_refusal_are_told() -> None:
    running, _ = bench(*[LOST] * 3)
    with pytest.raises(BenchError, match="during each of 3 answers"):
        asyncio.run(running.answer("onnx", "outrider", Prompt("a", "b"), 16))
    running, edge = bench({"error": "too long", "provenance": []}, WHOLE)
    with pytest.raises(BenchError, match="outrider: too long"):
        asyncio.run(running.answer("onnx", "outrider", Prompt("a", "b"), 16))
    assert edge.answers == [WHOLE]


def test_local_answers_are_local() -> None:
    running, _ = bench(LOST)
    assert asyncio.run(running.answer("onnx", "local", Prompt("a", "b"), 16)) == LOST
    assert running.num_repeated == 0
