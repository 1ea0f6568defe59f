"""What the worker counts: the reports of a scripted run, number by number, on a clock that moves when told to."""

import asyncio

import pytest
from structlog.testing import capture_logs

from shared.core.messages import Close, Draft, Heartbeat, Want
from shared.core.tokens import TokenLog
from shared.metrics import StepReport
from tests.cloud_verifier.lab import PROMPT, Lab, committed, in_lab, opening, target_stream

FORWARD_MS, OTHER_MS, PLAN_MS = 8.0, 2.0, 0.5


def script(lab: Lab) -> None:
    """A forward takes 8 ms, any other call of the engine 2 ms, planning 0.5 ms, everything else nothing."""
    lab.clock.move(0.0)
    lab.target.forward_ms, lab.target.other_ms, lab.everything.plan_ms = FORWARD_MS, OTHER_MS, PLAN_MS


def report(**counts: int) -> dict[str, int]:
    names = (
        "sessions",
        "prefill_rows",
        "draft_rows",
        "self_decode_rows",
        "num_drafted",
        "num_accepted",
        "num_recycled",
    )
    return {**dict.fromkeys((*names, "num_committed"), 0), **counts}


def counts_of(made: StepReport) -> dict[str, int]:
    return {name: getattr(made, name) for name in report()}


def test_a_step_is_reported_with_its_rows_and_times() -> None:
    right = target_stream(PROMPT, 4)

    async def test(lab: Lab) -> None:
        script(lab)
        drafting, streaming = lab.stream(), lab.stream()
        lab.target.gate.clear()
        drafting.post(opening("drafting", n=6, want=Want.SPECULATE))
        await lab.stop_in_forward()
        drafting.post(Draft(3, TokenLog(PROMPT).hash_at(3), (*right, 999)))
        lab.clock.move(3.0)  # so long before the end of the forward the other one comes
        streaming.post(opening("streaming", n=2))
        lab.target.gate.set()
        assert committed(await drafting.commits()) == target_stream(PROMPT, 6)
        await streaming.commits()
        await lab.until_asleep()
        lab.clock.move(1000.0)
        late = lab.stream()
        late.post(opening("late", n=1))
        await late.commits()
        await lab.until_asleep()

    lab = in_lab(test, everything=True)
    first, second, third, late = lab.metrics.reports
    assert counts_of(first) == report(sessions=1, prefill_rows=2, self_decode_rows=1, num_committed=1)
    assert counts_of(second) == report(
        sessions=2, prefill_rows=2, draft_rows=5, self_decode_rows=1, num_drafted=4, num_accepted=3, num_committed=5
    )
    assert counts_of(third) == report(sessions=2, self_decode_rows=2, num_committed=2)
    assert counts_of(late) == report(sessions=1, prefill_rows=2, self_decode_rows=1, num_committed=1)

    assert [made.schedule_ms for made in lab.metrics.reports] == pytest.approx([PLAN_MS] * 4)
    assert [made.verify_ms for made in lab.metrics.reports] == pytest.approx([FORWARD_MS + 3, *[FORWARD_MS] * 3])
    # Planning, and a Keep for each session of the step before; nothing where the worker slept.
    assert (first.outside_ms, late.outside_ms) == (None, None)
    assert (second.outside_ms, third.outside_ms) == pytest.approx((PLAN_MS + OTHER_MS, PLAN_MS + 2 * OTHER_MS))
    # Ready since the last commit, or since the Open; until planned.
    assert first.queue_ms == late.queue_ms == pytest.approx(0.0)
    assert second.queue_ms == pytest.approx((0.0 + FORWARD_MS) / 2)
    assert third.queue_ms == pytest.approx(0.0)
    assert lab.metric("outrider_outside_seconds_count") == 2
    assert lab.metric("outrider_steps_total") == lab.metric("outrider_schedule_seconds_count") == 4


def test_a_chunk_of_a_prompt_is_prefill_and_commits_nothing() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        inbox.post(opening(n=598, tokens=tuple(range(1, 601))))
        await inbox.commits()
        await lab.until_asleep()

    first, second, third = in_lab(test).metrics.reports
    assert counts_of(first) == counts_of(second) == report(sessions=1, prefill_rows=256)
    assert counts_of(third) == report(sessions=1, prefill_rows=87, self_decode_rows=1, num_committed=1)


def test_a_forward_that_fails_is_neither_reported_nor_taken_for_our_own_time() -> None:
    async def test(lab: Lab) -> None:
        script(lab)
        lab.target.poison["/s"] = 5
        inbox = lab.stream()
        good = lab.stream()
        inbox.post(opening(n=4))
        good.post(opening("good", n=6))
        with capture_logs():
            await inbox.rest()
            await good.commits()
            await lab.until_asleep()

    reports = in_lab(test, everything=True).metrics.reports
    assert [made.sessions for made in reports] == [2, 2, 1, 1, 1, 1]
    assert max(made.outside_ms or 0.0 for made in reports) < FORWARD_MS


def test_stale_drafts_and_sessions_are_counted() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        with capture_logs() as logs:
            inbox.post(opening(n=2))
            await inbox.commits()
            inbox.post(Draft(3, 1, (1, 2, 3)), Heartbeat(0, 5))
            await inbox.next()
            assert lab.metric("outrider_sessions") == 1
            inbox.post(Close())
            assert await inbox.next() is None
            await lab.until_asleep()
        assert [entry["event"] for entry in logs] == ["session opened", "step", "step", "session closed"]

    lab = in_lab(test)
    assert lab.metric("outrider_stale_draft_tokens_total") == 3
    assert lab.metric("outrider_sessions") == 0
    assert lab.metric("outrider_parked_sessions") == 1


def test_refusals_are_counted_by_reason() -> None:
    async def test(lab: Lab) -> None:
        first, second, third = lab.stream(), lab.stream(), lab.stream()
        first.post(opening("first", n=1))
        second.post(opening("second"))
        third.post(opening("third", n=5000))
        for inbox in (second, third):
            await inbox.rest()
        await asyncio.sleep(0)

    lab = in_lab(test, max_sessions=1)
    assert lab.metric("outrider_refusals_total", code="resource_exhausted") == 1
    assert lab.metric("outrider_refusals_total", code="invalid_request") == 1
