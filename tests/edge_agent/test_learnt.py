"""What one answer teaches the agent for the next."""

from shared.core.policies import DraftObservation
from shared.policy.run_ahead import RunAhead
from tests.edge_agent.lab import CountingDraft, Lab, asking, collect, in_lab

SEEN: list[DraftObservation] = []


class Noting(RunAhead):
    """Notes in `SEEN` all that it decides on."""

    def draft_tokens(self, seen: DraftObservation) -> int:
        SEEN.append(seen)
        return super().draft_tokens(seen)


def test_the_next_answer_begins_with_what_is_known_of_the_draft() -> None:
    async def test(lab: Lab) -> None:
        firsts = []
        async with lab.agent(CountingDraft(acceptance=0.05), policy=Noting()) as agent:
            for key in "ab":
                SEEN.clear()
                await collect(agent, asking(80, key=key))
                firsts.append(SEEN[0])
        assert (firsts[0].acceptance, firsts[0].draft_ms) == (0.8, 0.0)
        assert firsts[1].acceptance < 0.4
        assert firsts[1].draft_ms > 0.0

    in_lab(test, step_ms=2)
