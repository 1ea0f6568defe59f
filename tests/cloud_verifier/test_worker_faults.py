"""Where the target fails: one of the sessions is to blame, or nobody knows what the caches hold."""

import pytest
from structlog.testing import capture_logs

from shared.core.messages import Commit, Failure, FailureCode, Open
from shared.testing.engines import TOY_VOCABULARY
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


def test_a_session_that_fails_the_forward_is_found_and_the_others_finish() -> None:
    async def test(lab: Lab) -> None:
        lab.target.poison["/b"] = 6
        with capture_logs() as logs:
            first, guilty, last = open_all(lab)
            assert committed(await first.commits()) == text_of("a")
            assert committed(await last.commits()) == text_of("c")
            *commits, failure = await guilty.rest()
        assert failure == Failure(FailureCode.INTERNAL, "the target failed on this session", 1000)
        assert committed([commit for commit in commits if isinstance(commit, Commit)]) == text_of("b")[: len(commits)]
        assert len(commits) == 3  # forwards with 3, 4 and 5 tokens of it went well
        assert first.messages.empty()
        assert last.messages.empty()
        reasons = [entry["reason"] for entry in logs if entry["log_level"] == "error"]
        assert reasons == ["/b is poison"] * 2  # in company, and alone
        lab.target.poison.clear()
        again = lab.stream()
        again.post(opening("b", n=12, tokens=(1, 2, ord("b"))))
        assert committed(await again.commits()) == text_of("b")
        await lab.until_asleep()

    lab = in_lab(test)
    served = [sorted(rows.session_id for rows in batch) for batch in lab.target.batches]
    assert served[:4] == [["/a", "/b", "/c"]] * 4
    assert sorted(served[4:7]) == [["/a"], ["/b"], ["/c"]]
    assert lab.metric("outrider_refusals_total", code="internal") == 1
    assert lab.metric("outrider_sessions") == 3


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


@pytest.mark.parametrize("broken", ["keep", "truncate", "share", "release"])
def test_an_engine_that_fails_elsewhere_starts_over(broken: str) -> None:
    """Each of these is called for `/s` or `/t`; a release that fails as well does not stop what follows."""

    async def test(lab: Lab) -> None:
        first, idle = lab.stream(), lab.stream()
        first.post(long_opening("s"))
        await first.commits()
        lab.worker.lost(first.number)
        await lab.until_asleep()
        lab.target.faults = [broken, "release"]
        second = lab.stream()
        with capture_logs() as logs:
            if broken == "truncate":
                second.post(opening("s", tokens=LONG_PROMPT[:3]))
            elif broken == "release":
                second.post(opening("s"))  # nothing in common with what is cached
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


def test_starting_over_releases_a_shared_cache_that_no_forward_has_used() -> None:
    async def test(lab: Lab) -> None:
        first, second, third = lab.stream(), lab.stream(), lab.stream()
        first.post(long_opening("s"))
        await first.commits()
        await lab.until_asleep()
        lab.target.faults = ["keep"]
        for name, inbox in (("second", second), ("third", third)):  # both share; a step reads the prompt of one
            inbox.post(Open(name, (*LONG_PROMPT, *[5] * 600), 640, 8, TOY_VOCABULARY))
        with capture_logs():
            await third.rest()
        assert ("forward", "/third") not in lab.target.calls

    check_empty(in_lab(test), ("share", "/third"))


def test_starting_over_releases_what_was_to_be_released_anyway() -> None:
    async def test(lab: Lab) -> None:
        parked, running = lab.stream(), lab.stream()
        parked.post(opening("parked"))
        await parked.commits()
        lab.worker.lost(parked.number)
        await lab.until_asleep()
        lab.target.faults = ["keep 15"]  # then the running one takes the last block, which is the other's
        running.post(opening("running", n=40))
        with capture_logs():
            assert isinstance((await running.rest())[-1], Failure)

    check_empty(in_lab(test, cache_blocks=2), ("forward", "/parked"))


def check_empty(lab: Lab, reached: tuple[str, str]) -> None:
    assert reached in lab.target.calls
    assert lab.target.caches == {}
    assert lab.target.blocks.num_free == lab.target.blocks.num_blocks
