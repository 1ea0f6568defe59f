import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from edge_agent.channel import Channel
from shared.core.effects import Confirm, Emit, Finished, Retract
from shared.core.messages import FailureCode, Finish, Sampling, Want
from shared.core.policies import DraftObservation
from shared.core.settings import OnDisconnect, OnReconnect
from shared.engine import EngineError, Proposal
from shared.policy.run_ahead import RunAhead, StopAndWait
from shared.testing.engines import ToyDraft
from shared.vocabulary import Vocabulary
from tests.edge_agent.lab import (
    ACCEPTED,
    CLOUD,
    LOCAL,
    MODEL,
    PROMPT,
    CountingDraft,
    Lab,
    Shown,
    asking,
    collect,
    in_lab,
    quick,
    target_stream,
    until,
)


class BrokenDraft(CountingDraft):
    """Raises `error` in the method `where`, from its `first` call on."""

    def __init__(self, where: str, error: Exception, first: int = 2, acceptance: float = 0.5) -> None:
        super().__init__(acceptance)
        self._where, self._error, self._left = where, error, first
        self.calls_after_failure = 0

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        self._called("reset")
        super().reset(tokens, sampling, prompt_len)

    def extend(self, tokens: Sequence[int]) -> None:
        self._called("extend")
        super().extend(tokens)

    def propose(self, n: int) -> Proposal:
        self._called("propose")
        return super().propose(n)

    def rollback(self, length: int) -> None:
        self._called("rollback")
        super().rollback(length)

    def _called(self, where: str) -> None:
        if self._left <= 0:
            self.calls_after_failure += 1
        elif where == self._where:
            self._left -= 1
            if self._left == 0:
                raise self._error


class TestLinked:
    @pytest.mark.parametrize("acceptance", [1.0, 0.7, 0.0])
    @pytest.mark.parametrize("policy", [RunAhead(message_interval_ms=0), StopAndWait(4)])
    def test_text_is_the_targets_own(self, acceptance: float, policy: RunAhead | StopAndWait) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft(acceptance), policy=policy) as agent:
                shown = await collect(agent, asking())
                report = agent.report()
            assert shown.tokens == target_stream()
            assert shown.finished == Finished(Finish.LENGTH)
            assert set(shown.provenance) == ({ACCEPTED, CLOUD} if acceptance else {CLOUD})
            assert report["accepted_tokens"] == shown.provenance.count(ACCEPTED)
            assert report["num_accepted_tokens"] == report["accepted_tokens"]

        in_lab(test, step_ms=1, speculation__self_decode="off")

    def test_cloud_only_never_drafts(self) -> None:
        async def test(lab: Lab) -> None:
            engine = CountingDraft()
            async with lab.agent(engine) as agent:
                shown = await collect(agent, asking(want=Want.STREAM))
            assert shown.tokens == target_stream()
            assert set(shown.provenance) == {CLOUD}
            assert engine.num_proposals == 0

        in_lab(test)

    def test_next_answer_uses_the_same_connection_and_a_reset_engine(self) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft(0.8)) as agent:
                assert agent.report() == {}
                for key, prompt in (("a", PROMPT), ("b", (9, 8)), ("c", PROMPT)):
                    shown = await collect(agent, asking(prompt=prompt, key=key))
                    assert shown.tokens == target_stream(prompt=prompt)
                    assert LOCAL not in shown.provenance
                    assert agent.report()["tokens"] == 40
            assert lab.proxy.num_connections == 1

        in_lab(test, step_ms=1)

    def test_wrong_vocabulary_is_named_while_the_answer_is_local(self) -> None:
        async def test(lab: Lab) -> None:
            other = Vocabulary((b"0", b"one", b"2"))
            async with lab.agent(CountingDraft(), vocabulary=other) as agent:
                shown = await collect(agent, replace(asking(), vocabulary=other.fingerprint))
            (refused,) = shown.refused
            assert refused.code == FailureCode.VOCABULARY_MISMATCH.name
            assert "id 1" in refused.detail
            assert set(shown.provenance) == {LOCAL}
            assert shown.finished == Finished(Finish.LENGTH)

        in_lab(test)

    def test_a_verifier_that_does_not_tell_its_vocabulary_is_not_waited_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def describe(_: Channel) -> None:
            await asyncio.Event().wait()

        async def test(lab: Lab) -> None:
            other = Vocabulary((b"0", b"one", b"2"))
            async with lab.agent(CountingDraft(), vocabulary=other) as agent:
                shown = await collect(agent, replace(asking(), vocabulary=other.fingerprint))
            (refused,) = shown.refused
            assert refused.code == FailureCode.VOCABULARY_MISMATCH.name
            assert refused.detail
            assert "id 1" not in refused.detail
            assert shown.finished == Finished(Finish.LENGTH)

        monkeypatch.setattr(Channel, "describe", describe)
        monkeypatch.setattr("edge_agent.agent._NAMING_S", 0.05)
        in_lab(test)


class Outage:
    """Cuts the link after `at` tokens; restores it, half open, after `local_tokens` local ones, or never."""

    def __init__(self, lab: Lab, at: int = 10, local_tokens: int | None = 10) -> None:
        self._lab, self._at, self._local_tokens = lab, at, local_tokens
        self.restoring: asyncio.Task[None] | None = None
        self._is_cut = False

    def __call__(self, shown: Shown) -> None:
        if not self._is_cut and len(shown.tokens) >= self._at:
            self._is_cut = True
            self._lab.proxy.cut("blackhole")
        elif self._local_tokens is not None and shown.provenance.count(LOCAL) >= self._local_tokens:
            self._local_tokens = None
            self.restoring = asyncio.create_task(self._lab.proxy.restore(half_open=True))


class TestLinkLost:
    @pytest.mark.parametrize("on_reconnect", OnReconnect)
    def test_a_stall_is_bridged_and_a_fresh_connection_made(self, on_reconnect: OnReconnect) -> None:
        async def test(lab: Lab) -> None:
            engine = CountingDraft(0.8, token_ms=2)
            async with lab.agent(engine, settings=quick(on_reconnect=on_reconnect)) as agent:
                shown = await collect(agent, asking(400), Outage(lab))
                report = agent.report()
            shown.check_verified()
            assert len(shown.tokens) == report["tokens"] == 400
            assert lab.proxy.num_connections >= 2
            assert report["disconnects"] != 0
            assert shown.provenance[-1] is not LOCAL
            kinds = {type(event) for event in shown.events}
            if on_reconnect is OnReconnect.REVISE:
                assert shown.tokens == target_stream(400)
                assert {Confirm, Retract} <= kinds
                assert report["retracted_tokens"] != 0
                assert report["local_tokens"] == shown.provenance.count(LOCAL) == 0
            else:
                assert report["local_tokens"] == shown.provenance.count(LOCAL) >= 10
                assert not {Confirm, Retract} & kinds

        in_lab(test, step_ms=2)

    def test_pause_waits_for_the_link(self) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft(), settings=quick(on_disconnect=OnDisconnect.PAUSE)) as agent:
                answering = asyncio.create_task(collect(agent, asking(200), Outage(lab)))
                await until(lambda: lab.proxy.num_connections >= 2)  # it redials in vain
                assert not answering.done()
                await lab.proxy.restore()
                shown = await answering
            assert shown.tokens == target_stream(200)
            assert LOCAL not in shown.provenance

        in_lab(test, step_ms=2)

    def test_fail_ends_with_the_reason(self) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft(), settings=quick(on_disconnect=OnDisconnect.FAIL)) as agent:
                shown = await collect(agent, asking(1000), Outage(lab))
            assert shown.finished == Finished(Finish.NONE, "the link stalled")
            assert 10 <= len(shown.tokens) < 1000
            assert shown.tokens == target_stream(len(shown.tokens))

        in_lab(test, step_ms=2)

    def test_a_verifier_that_appears_in_the_middle_takes_over(self) -> None:
        async def test(lab: Lab) -> None:
            lab.proxy.cut("reset")
            async with lab.agent(CountingDraft(0.8, token_ms=2)) as agent:
                shown = await collect(agent, asking(200), Outage(lab, at=1000))
            assert shown.provenance[0] is LOCAL
            assert shown.provenance[-1] is not LOCAL
            shown.check_verified()

        in_lab(test, step_ms=1)

    def test_a_connection_that_failed_is_not_asked_again(self) -> None:
        """The verifier came up between two answers: the second one is the cloud's from its first token on."""

        async def test(lab: Lab) -> None:
            lab.proxy.cut("reset")
            async with lab.agent(CountingDraft()) as agent:
                alone = await collect(agent, asking(key="a"))
                await lab.proxy.restore()
                shown = await collect(agent, asking(key="b"))
            assert set(alone.provenance) == {LOCAL}
            assert LOCAL not in shown.provenance
            assert shown.tokens == target_stream()

        in_lab(test)


class TestEngineFailure:
    @pytest.mark.parametrize("where", ["reset", "extend", "propose", "rollback"])
    def test_the_cloud_goes_on_alone(self, where: str) -> None:
        async def test(lab: Lab) -> None:
            engine = BrokenDraft(where, EngineError("no more memory"), first=1)
            async with lab.agent(engine) as agent:
                with capture_logs() as logs:
                    shown = await collect(agent, asking())
            assert shown.tokens == target_stream()
            assert shown.finished == Finished(Finish.LENGTH)
            assert engine.calls_after_failure == 0
            assert [entry["error"] for entry in logs if entry["log_level"] == "error"] == ["no more memory"]

        in_lab(test, step_ms=1)

    def test_the_next_answer_tries_the_engine_again(self) -> None:
        async def test(lab: Lab) -> None:
            engine = BrokenDraft("propose", EngineError("no more memory"))
            async with lab.agent(engine) as agent:
                for key in "ab":
                    assert (await collect(agent, asking(key=key))).tokens == target_stream()
            assert engine.calls_after_failure != 0

        in_lab(test, step_ms=1)

    @pytest.mark.parametrize("offline", [True, False])
    def test_without_the_cloud_it_is_the_callers(self, offline: bool) -> None:
        async def test(lab: Lab) -> None:
            lab.proxy.cut("reset")
            engine = BrokenDraft("propose", EngineError("no more memory"), first=5)
            async with lab.agent(engine, settings=quick(offline=offline)) as agent:
                with pytest.raises(EngineError, match="no more memory"):
                    await collect(agent, asking())

        in_lab(test)

    def test_a_full_context_without_the_cloud_is_an_ordinary_end(self) -> None:
        async def test(lab: Lab) -> None:
            engine = ToyDraft(MODEL, max_context=20)
            async with lab.agent(engine, settings=quick(offline=True)) as agent:
                shown = await collect(agent, asking())
            assert shown.finished == Finished(Finish.LENGTH)
            assert len(shown.tokens) == 20 - len(PROMPT)

        in_lab(test)

    @pytest.mark.parametrize("error", [ZeroDivisionError("bug"), RuntimeError("bug")])
    @pytest.mark.parametrize("where", ["extend", "propose", "rollback"])
    def test_an_unexpected_exception_is_the_callers(self, where: str, error: Exception) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(BrokenDraft(where, error)) as agent:
                with pytest.raises(type(error), match="bug"):
                    await collect(agent, asking(2000))

        in_lab(test, step_ms=1)

    @pytest.mark.parametrize("first", [1, 2, 20])
    def test_a_bug_in_a_decision_is_the_callers_and_no_hang(self, first: int) -> None:
        class Policy(RunAhead):
            num_calls = 0

            def draft_tokens(self, seen: DraftObservation) -> int:
                type(self).num_calls += 1
                if self.num_calls == first:
                    raise ZeroDivisionError("bug")
                return super().draft_tokens(seen)

        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft(), policy=Policy(message_interval_ms=0)) as agent:
                with pytest.raises(ZeroDivisionError):
                    await collect(agent, asking(2000))

        in_lab(test, step_ms=1)


class TestCaller:
    @pytest.mark.parametrize("after", [1, 20])
    def test_leaving_early_frees_the_session_and_the_agent(self, after: int) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft()) as agent:
                shown, events = Shown(PROMPT), agent.answer(asking(2000, key="a"))
                while len(shown.tokens) < after:
                    shown.take(await anext(events))
                await events.aclose()
                await lab.idle()
                assert (await collect(agent, asking(key="b"))).tokens == target_stream()
            assert shown.tokens == target_stream(len(shown.tokens))
            assert lab.proxy.num_connections == 1

        in_lab(test, step_ms=1)

    def test_breaking_out_of_the_loop_does_not_disturb_the_next_answer(self) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft()) as agent:
                async for event in agent.answer(asking(2000, key="a")):
                    if isinstance(event, Emit):
                        break
                shown = await collect(agent, asking(key="b"))
            assert shown.tokens == target_stream()
            assert LOCAL not in shown.provenance

        in_lab(test, step_ms=1)

    def test_the_next_answer_ends_the_one_that_is_running(self) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft()) as agent:
                first = asyncio.create_task(collect(agent, asking(4000, key="a")))
                await lab.busy()
                shown = await collect(agent, asking(key="b"))
                assert (await first).finished == Finished(Finish.NONE, "another answer was asked for")
            assert shown.tokens == target_stream()

        in_lab(test, step_ms=1)

    def test_closing_ends_the_answer_that_is_running(self) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft()) as agent:
                running = asyncio.create_task(collect(agent, asking(4000)))
                await lab.busy()
            assert (await running).finished == Finished(Finish.NONE, "the agent was closed")

        in_lab(test, step_ms=1)

    @pytest.mark.parametrize("is_reachable", [True, False])
    def test_cancelling_leaves_nothing_behind(self, is_reachable: bool) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft(), settings=quick(on_disconnect=OnDisconnect.PAUSE)) as agent:
                if not is_reachable:
                    lab.proxy.cut("blackhole")
                running = asyncio.create_task(collect(agent, asking(4000)))
                await (lab.busy() if is_reachable else until(lambda: lab.proxy.num_connections == 1))
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
                await lab.idle()

        in_lab(test, step_ms=1)

    def test_cancelling_at_once(self) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft()) as agent:
                for turns in range(6):
                    running = asyncio.create_task(collect(agent, asking(4000, key=str(turns))))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    running.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await running
                assert (await collect(agent, asking())).tokens == target_stream()

        in_lab(test)
