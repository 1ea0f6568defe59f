import asyncio
import threading

import pytest

from shared.core.messages import Close, Commit, Draft, Finish, Heartbeat, NeedTokens, Open, Want
from shared.core.settings import SelfDecode
from shared.core.tokens import TokenLog
from shared.testing.engines import TOY_VOCABULARY
from tests.cloud_verifier.lab import LONG_PROMPT, PROMPT, Lab, committed, in_lab, long_opening, opening, target_stream


def test_a_session_gets_the_targets_stream() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        inbox.post(opening(n=20))
        commits = await inbox.commits()
        assert committed(commits) == target_stream(PROMPT, 20)
        assert [commit.start for commit in commits] == list(range(3, 23))
        assert commits[-1].finish is Finish.LENGTH

    lab = in_lab(test)
    assert lab.target.threads.isdisjoint({threading.get_ident()})
    assert len(lab.target.threads) == 1


def test_many_sessions_share_the_steps() -> None:
    async def test(lab: Lab) -> None:
        inboxes = [lab.stream() for _ in range(20)]
        for index, inbox in enumerate(inboxes):
            inbox.post(opening(f"s{index}", n=10, tokens=(1, 2, index)))
        for index, inbox in enumerate(inboxes):
            assert committed(await inbox.commits()) == target_stream((1, 2, index), 10)

    batches = in_lab(test).target.batches
    assert [len(batch) for batch in batches] == [20] * 10


def test_drafts_are_accepted_as_far_as_they_are_right() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        right = target_stream(PROMPT, 4)
        lab.target.gate.clear()
        inbox.post(opening(n=9, want=Want.SPECULATE))
        await lab.stop_in_forward()  # the prompt with the first next_token
        log = TokenLog(PROMPT)
        inbox.post(Draft(3, log.hash_at(3), (*right, 999)))
        lab.target.gate.set()
        commits = await inbox.commits()
        assert committed(commits) == target_stream(PROMPT, 9)
        assert (commits[1].num_drafted, commits[1].num_accepted) == (4, 3)
        assert len(commits) < 9
        await lab.until_asleep()

    lab = in_lab(test)
    assert lab.metric("outrider_drafted_tokens_total") == 4
    assert lab.metric("outrider_accepted_tokens_total") == 3
    assert lab.metric("outrider_committed_tokens_total") == 9
    assert lab.metric("outrider_rows_total", kind="prefill") == 2
    assert lab.metric("outrider_rows_total", kind="draft") == 5
    assert lab.metric("outrider_rows_total", kind="self_decode") == 5
    assert lab.metric("outrider_steps_total") == lab.metric("outrider_step_duration_seconds_count") == 6


def test_streams_are_answered_while_a_forward_runs() -> None:
    async def test(lab: Lab) -> None:
        inbox, other, third = lab.stream(), lab.stream(), lab.stream()
        lab.target.gate.clear()
        inbox.post(opening())
        await lab.stop_in_forward()
        inbox.post(Heartbeat(7, 3))
        assert await inbox.next() == Heartbeat(7, 3)
        other.post(Open("o", (1,), 1, 1, TOY_VOCABULARY, known_len=1), Heartbeat(5, 0))
        assert await other.next() == NeedTokens()
        assert await other.next() == Heartbeat(5, 0)
        third.post(opening("third"), Heartbeat(6, 2))
        assert await third.next() == Heartbeat(6, 3)
        assert lab.target.in_forward.is_set()
        lab.target.gate.set()
        assert committed(await inbox.commits()) == target_stream(PROMPT, 8)
        assert committed(await third.commits()) == target_stream(PROMPT, 8)

    in_lab(test)


def test_what_a_step_leaves_to_do_comes_before_the_next_forward() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        inbox.post(opening(n=3))
        await inbox.commits()
        lab.worker.lost(inbox.number)
        again = lab.stream()
        again.post(opening(n=5, tokens=(*PROMPT, 1)))
        await again.commits()

    calls = in_lab(test).target.calls
    assert calls[:6] == [("forward", "/s"), ("keep", "/s")] * 3
    assert calls[6:8] == [("truncate", "/s"), ("forward", "/s")]


def test_an_equal_prefix_is_shared_in_order() -> None:
    async def test(lab: Lab) -> None:
        first, second = lab.stream(), lab.stream()
        first.post(long_opening("first", n=2))
        assert isinstance(await first.next(), Commit)
        lab.target.gate.clear()
        first.post(Heartbeat(1, 41))
        await lab.stop_in_forward()
        second.post(long_opening("second", n=1))
        lab.target.gate.set()
        assert committed(await second.commits()) == target_stream(LONG_PROMPT, 1)

    target = in_lab(test, window_tokens=1).target
    # The step in flight is not over yet when the second one comes; its prefix stands whatever that step gives.
    begin = target.calls.index(("share", "/second"))
    assert target.calls[begin - 1][0] == target.calls[begin + 2][0] == "forward"
    assert target.calls[begin : begin + 3] == [("share", "/second"), ("keep", "/first"), ("forward", "/second")]
    (rows,) = target.batches[-1]
    assert (rows.start, len(rows.tokens)) == (32, 8)
    assert len(target.threads) == 1


def test_an_evicted_cache_is_released_although_no_forward_follows() -> None:
    async def test(lab: Lab) -> None:
        first, second = lab.stream(), lab.stream()
        first.post(opening("first"))
        await first.commits()
        lab.worker.lost(first.number)
        second.post(opening("second"))  # one place: the first one's cache goes
        await second.commits()
        lab.worker.lost(second.number)
        assert ("release", "/first") in lab.target.calls

    assert set(in_lab(test, max_sessions=1).target.caches) == {"/second"}


def test_sessions_that_do_not_fit_together_take_turns() -> None:
    async def test(lab: Lab) -> None:
        inboxes = [lab.stream() for _ in range(3)]
        for index, inbox in enumerate(inboxes):
            inbox.post(opening(f"s{index}", n=40, tokens=(1, 2, index)))
        for index, inbox in enumerate(inboxes):
            assert committed(await inbox.commits()) == target_stream((1, 2, index), 40)
        await lab.until_asleep()
        used, in_all, parked = lab.worker.cache_usage()
        assert (in_all, parked) == (4, 0)
        assert (
            used == lab.target.blocks.num_blocks - lab.target.blocks.num_free == lab.metric("outrider_kv_blocks_used")
        )

    lab = in_lab(test, cache_blocks=4, residency_ms=5.0)
    releases = [session for call, session in lab.target.calls if call == "release"]
    assert lab.metric("outrider_evictions_total") == len(releases) > 0
    assert lab.metric("outrider_kv_blocks") == 4


def test_a_parked_session_is_opened_again_by_its_known_prefix() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream("me")
        inbox.post(opening(n=10))
        text = TokenLog((*PROMPT, *committed(await inbox.commits())))
        lab.worker.lost(inbox.number)
        reopen = Open("s", (), 3, 14, TOY_VOCABULARY, want=Want.STREAM, known_len=9, known_hash=text.hash_at(9))
        stranger = lab.stream("not me")
        stranger.post(reopen)
        assert await stranger.next() == NeedTokens()
        again = lab.stream("me")
        again.post(reopen)
        assert committed(await again.commits()) == target_stream(PROMPT, 14)[6:]

    target = in_lab(test).target
    first_again = target.calls.index(("truncate", "me/s")) + 1
    (rows,) = target.batches[target.calls[:first_again].count(("forward", "me/s"))]
    assert (rows.start, rows.tokens) == (8, target_stream(PROMPT, 6)[-1:])  # no prefill


def test_an_operator_sees_the_sessions() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream("me")
        assert lab.worker.session_statuses() == []
        lab.target.gate.clear()
        inbox.post(opening(n=2))
        await lab.stop_in_forward()
        (status,) = lab.worker.session_statuses()
        assert (status.session, status.state, status.committed_len) == ("me/s", "stepping", 3)
        lab.target.gate.set()
        await inbox.commits()
        (status,) = lab.worker.session_statuses()
        assert (status.state, status.committed_len, status.num_steps) == ("finished", 5, 2)
        lab.worker.lost(inbox.number)
        assert lab.worker.session_statuses() == []
        assert lab.worker.cache_usage() == (1, 4096, 1)

    in_lab(test)


def test_a_silent_stream_is_ended_by_the_timer() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        assert await inbox.next() is None

    in_lab(test, idle_timeout_ms=20.0)


def test_a_session_without_drafts_starves_for_a_while_only() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        inbox.post(opening(n=4, want=Want.SPECULATE))
        assert committed(await inbox.commits()) == target_stream(PROMPT, 4)

    in_lab(test, self_decode=SelfDecode.OFF, starved_after_ms=20.0)


def test_an_idle_worker_sleeps() -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        inbox.post(opening(n=1))
        await inbox.commits()
        await lab.until_asleep()
        reads = lab.clock.num_reads
        await asyncio.sleep(0.1)
        assert lab.clock.num_reads == reads

    in_lab(test)


def test_who_does_not_read_costs_a_window_of_forwards_and_no_more() -> None:
    async def test(lab: Lab) -> None:
        slow, good = lab.stream(), lab.stream()
        slow.post(opening("slow", n=1000))
        good.post(opening("good", n=12))
        await lab.until_asleep()
        assert slow.messages.qsize() == good.messages.qsize() == 8
        good.post(Heartbeat(1, 11))
        assert isinstance([await good.next() for _ in range(9)][-1], Heartbeat)
        assert committed(await good.commits()) == target_stream(PROMPT, 12)[8:]
        assert slow.messages.qsize() == 8

    batches = in_lab(test, window_tokens=8).target.batches
    assert sum(rows.session_id == "/slow" for batch in batches for rows in batch) == 8


def test_drafts_that_flood_in_during_a_forward_are_held_up_to_a_limit() -> None:
    right = target_stream(PROMPT, 12)

    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        lab.target.gate.clear()
        inbox.post(opening(n=12, want=Want.SPECULATE))
        await lab.stop_in_forward()
        parent = TokenLog(PROMPT).hash_at(3)
        inbox.post(Draft(3, parent, right[:6]), *[Draft(3, parent, (number, *range(99))) for number in range(1, 999)])
        (status,) = lab.worker.session_statuses()
        assert status.pending_tokens == 40
        lab.target.gate.set()
        commits = await inbox.commits()
        assert committed(commits) == right
        assert commits[1].num_accepted == 5  # the first of the six was next_token by then

    in_lab(test, max_pending_tokens=40)


def test_what_waits_behind_a_session_in_a_step_is_bounded() -> None:
    async def test(lab: Lab) -> None:
        old, new = lab.stream(), lab.stream()
        lab.target.gate.clear()
        old.post(opening(n=300))
        await lab.stop_in_forward()
        new.post(opening(n=4))  # waits until the step has let go of the session
        new.post(*[Draft(3, 1, (1, 2))] * 1000)
        lab.target.gate.set()
        assert committed(await new.commits()) == target_stream(PROMPT, 4)
        assert len([message for message in await old.rest() if isinstance(message, Commit)]) == 1
        await lab.until_asleep()

    assert in_lab(test).metric("outrider_stale_draft_tokens_total") == 63 * 2  # the Open and 63 others were kept


@pytest.mark.parametrize("number", [1, 2])
def test_messages_of_an_ended_stream_are_ignored(number: int) -> None:
    async def test(lab: Lab) -> None:
        inbox = lab.stream()
        inbox.post(*[Close()] * number)
        assert await inbox.next() is None
        inbox.post(opening(), Heartbeat(1, 0))
        await lab.until_asleep()
        assert inbox.messages.empty()
        assert lab.worker.session_statuses() == []
        lab.worker.lost(inbox.number)
        lab.worker.lost(inbox.number)

    assert in_lab(test).target.calls == []
