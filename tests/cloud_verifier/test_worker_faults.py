"""What becomes of the sessions where the target fails: one is to blame, or nobody knows what the cache holds."""

import pytest
from structlog.testing import capture_logs

from shared.core.messages import Close, Failure, FailureCode
from tests.cloud_verifier.lab import (
    LONG_PROMPT,
    PROMPT,
    Inbox,
    Lab,
    committed,
    in_lab,
    long_opening,
    opening,
    target_stream,
)

NAMES = ("a", "b", "c")


def open_all(lab: Lab) -> list[Inbox]:
    inboxes = [lab.stream() for _ in NAMES]
    for name, inbox in zip(NAMES, inboxes, strict=True):
        inbox.post(opening(name, n=12, tokens=(1, 2, ord(name))))
    return inboxes


def text_of(name: str) -> tuple[int, ...]:
    return target_stream((1, 2, ord(name)), 12)


def test_a_forward_that_fails_once_costs_nobody_the_session() -> None:
    async def test(lab: Lab) -> None:
        lab.target.faults = ["forward"]
        for name, inbox in zip(NAMES, open_all(lab), strict=True):
            assert committed(await inbox.commits()) == text_of(name)
        await lab.until_asleep()

    lab = in_lab(test)
    assert lab.metric("outrider_refusals_total", code="internal") is None
    # What a failed forward left in the cache is not trusted: each session is fed from its first token again.
    assert [rows.start for batch in lab.target.batches[1:4] for rows in batch] == [0, 0, 0]


def test_a_session_alone_in_a_failing_forward_is_given_up() -> None:
    async def test(lab: Lab) -> None:
        inbox, idle = lab.stream(), lab.stream()
        lab.target.faults = ["forward"]
        with capture_logs() as logs:
            inbox.post(opening())
            (failure,) = await inbox.rest()
        assert isinstance(failure, Failure)
        assert (failure.code, failure.retry_after_ms) == (FailureCode.INTERNAL, 1000)
        assert [entry["reason"] for entry in logs if entry["log_level"] == "error"] == ["forward is broken\nbadly"]
        idle.post(opening("idle"))
        assert committed(await idle.commits()) == target_stream(PROMPT, 8)

    in_lab(test)


def cause_keep(lab: Lab) -> None:
    """Every step ends with one."""


def cause_truncate(lab: Lab) -> None:
    first = lab.stream()
    first.post(opening("s", n=2))


@pytest.mark.parametrize("broken", ["keep", "truncate", "share", "release"])
def test_an_engine_that_fails_elsewhere_starts_over(broken: str) -> None:
    """Each of these is called for the session `/s` or `/t`; a release that fails again does not stop the others."""

    async def test(lab: Lab) -> None:
        first, idle = lab.stream(), lab.stream()
        first.post(long_opening("s"))
        await first.commits()
        await lab.until_asleep()
        lab.target.faults = [broken, "release"]
        with capture_logs() as logs:
            second = lab.stream()
            if broken == "truncate":
                first.post(Close())
                assert await first.next() is None
                second.post(opening("s", tokens=LONG_PROMPT[:3]))
            elif broken == "release":
                first.post(Close())
                assert await first.next() is None
                second.post(opening("s"))  # nothing in common
            else:
                second.post(long_opening("t"))
            last = (await second.rest())[-1]
            assert isinstance(last, Failure)
            assert (last.code, last.retry_after_ms) == (FailureCode.INTERNAL, 1000)
            assert last.detail == "the verifier's engine failed (RuntimeError); open again"
            assert await idle.rest() == [last]
            again = lab.stream()
            again.post(opening("again"))
            assert committed(await again.commits()) == target_stream(PROMPT, 8)
            await lab.until_asleep()
        reasons = [entry["reason"] for entry in logs if entry["log_level"] == "error" and "reason" in entry]
        assert reasons == [f"{broken} is broken\nbadly"]
        assert any(entry["event"] == "a cache cannot be released" for entry in logs)

    lab = in_lab(test)
    assert lab.metric("outrider_sessions") == 1
