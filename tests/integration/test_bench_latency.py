"""The ways to answer that `bench latency` compares, on engines that cost nothing."""

import asyncio
from typing import Any

from benchmarks.latency import PILOT_ROUNDS, Plan, bench
from benchmarks.link import LinkSpec
from benchmarks.prompts import Prompt

PLAN = Plan([LinkSpec(0.0)], ["instant"], "instant", "float32", None, [], 1, 99, 1, 0.0, 0)


def test_stop_and_wait_has_its_longest_round_verified_in_one_step() -> None:
    """With a verifier that took fewer rows at once it would not be compared at its best."""
    most = PILOT_ROUNDS[-1]

    async def answer() -> dict[str, Any]:
        async with bench(PLAN) as running:
            running.change(PLAN.links[0])
            return await running.answer("instant", "stop_and_wait", Prompt("a", "1"), PLAN.max_new_tokens, most)

    statistics = asyncio.run(answer())["statistics"]
    by_position = statistics["num_accepted_tokens_per_pos"]
    assert len(by_position) == most
    assert by_position[-1] > 0
