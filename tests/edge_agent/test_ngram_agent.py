"""The agent on n-grams alone: right where the past repeats itself, silent elsewhere, and never busy with nothing."""

import asyncio

from structlog.testing import capture_logs

from edge_agent.engines.ngram import NgramDraft
from shared.core.effects import Finished
from shared.core.messages import Finish
from shared.core.settings import OnDisconnect
from shared.engine import Proposal
from shared.testing.engines import TOY_VOCABULARY
from tests.edge_agent.lab import CLOUD, LOCAL, PROMPT, Lab, asking, collect, in_lab, quick, target_stream, until


class CountingNgrams(NgramDraft):
    """N-grams that count how often they were asked."""

    num_proposals = 0

    def propose(self, n: int) -> Proposal:
        self.num_proposals += 1
        return super().propose(n)


def test_a_text_of_the_past_is_accepted_and_counted_as_a_copy() -> None:
    async def test(lab: Lab) -> None:
        engine = NgramDraft(TOY_VOCABULARY, 1000, [*PROMPT, *target_stream(100)])
        async with lab.agent(engine) as agent:
            shown = await collect(agent, asking(100))
            report = agent.report()
        assert shown.tokens == target_stream(100)
        assert report["mean_acceptance_length"] > 2  # type: ignore[operator]  # a report's values are objects
        sources = report["draft_sources"]
        assert isinstance(sources, dict)
        assert list(sources) == ["ngram"]
        assert sources["ngram"]["acceptance_rate"] == 1.0

    in_lab(test, step_ms=5)


def test_a_text_like_no_other_is_the_clouds_and_a_lost_link_is_waited_for() -> None:
    async def test(lab: Lab) -> None:
        engine = CountingNgrams(TOY_VOCABULARY, 1000)
        async with lab.agent(engine, settings=quick(on_disconnect=OnDisconnect.PAUSE)) as agent:
            with capture_logs() as logs:
                answering = asyncio.create_task(collect(agent, asking(60)))
                await until(lambda: engine.num_proposals >= 10)
                lab.proxy.cut("blackhole")
                await until(lambda: lab.proxy.num_connections >= 3)
                asked = engine.num_proposals
                await until(lambda: lab.proxy.num_connections >= 6)
                assert engine.num_proposals == asked, "nothing has changed since"
                await lab.proxy.restore()
                shown = await answering
            report = agent.report()
        assert shown.tokens == target_stream(60)
        assert set(shown.provenance) == {CLOUD}
        assert LOCAL not in shown.provenance
        assert shown.finished == Finished(Finish.LENGTH)
        assert engine.num_proposals <= 60 + 1
        assert report["draft_sources"] == {}
        warnings = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
        assert warnings == ["the verifier cannot be reached; the answer waits for it"]

    in_lab(test, step_ms=5)
