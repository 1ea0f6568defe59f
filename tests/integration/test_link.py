"""Promises 2 and 3 on the real pair over an emulated link of 50 ms."""

import asyncio
import time
from collections.abc import Sequence
from typing import Literal

import pytest

from cloud_verifier.engines import Target
from edge_agent.engines import LoadedDraft
from edge_agent.setup import make_agent, make_request
from shared.core.effects import Emit, Provenance, Rows
from shared.core.messages import Finish
from shared.testing.link_proxy import LinkProxy
from tests.integration.pair import GREEDY, PROMPTS, PlainTarget, Shown, answer, edge_config, run, verifier

pytestmark = pytest.mark.models
BUDGET_BYTES_PER_TOKEN = 16


def test_bytes_per_token_stay_in_the_budget(target: Target, draft: LoadedDraft) -> None:
    async def main() -> dict[str, float]:
        async with verifier(target) as running, LinkProxy("127.0.0.1", port(running.address), 25.0) as proxy:
            config = edge_config(f"127.0.0.1:{proxy.port}", generation__max_new_tokens=96)
            return (await answer(config, draft, PROMPTS[1], GREEDY)).report

    report = run(main())
    assert report["bytes_up_per_token"] <= BUDGET_BYTES_PER_TOKEN
    assert report["bytes_down_per_token"] <= BUDGET_BYTES_PER_TOKEN


@pytest.mark.parametrize("how", ["blackhole", "reset"])
@pytest.mark.parametrize("on_reconnect", ["continue", "revise"])
def test_answer_goes_on_through_a_cut_and_is_verified_again(
    target: Target,
    plain_target: PlainTarget,
    draft: LoadedDraft,
    how: Literal["blackhole", "reset"],
    on_reconnect: str,
) -> None:
    """Nothing is lost or doubled, and what follows the local part is the target's own continuation of it."""

    async def main() -> tuple[tuple[int, ...], Shown]:
        async with verifier(target) as running, LinkProxy("127.0.0.1", port(running.address), 25.0) as proxy:
            config = edge_config(
                f"127.0.0.1:{proxy.port}", generation__max_new_tokens=260, link__on_reconnect=on_reconnect
            )
            request = make_request(config, draft, PROMPTS[1])
            agent = make_agent(config, draft)
            shown, restoring = Shown(), None
            async for event in agent.answer(request):
                shown.take(event, len(request.prompt))
                if isinstance(event, Emit) and len(shown.tokens) > 12 and restoring is None:
                    proxy.cut(how)
                    restoring = asyncio.create_task(restore(proxy))
            assert restoring is not None
            await restoring
            await agent.close(keep_engine=True)
            return request.prompt, shown

    prompt, shown = run(main())
    assert shown.finished is not None
    assert shown.finished.finish in (Finish.LENGTH, Finish.STOP)
    assert shown.ever_local > 0, "the link was down long enough for local tokens"
    if on_reconnect == "continue":
        local = [index for index, source in enumerate(shown.provenance) if source is Provenance.LOCAL]
        assert local
        after = shown.tokens[local[-1] + 1 :]
        assert after, "verified tokens follow the local ones"
        context = (*prompt, *shown.tokens[: local[-1] + 1])
        assert plain_target.stream(context, GREEDY, len(after), frozenset())[: len(after)] == after
    else:
        expected = plain_target.stream(prompt, GREEDY, len(shown.tokens), frozenset())
        assert expected == shown.tokens, "after a revision all of it is the target's own"


def test_no_verifier_at_start_is_local_from_the_first_token(draft: LoadedDraft) -> None:
    config = edge_config("127.0.0.1:1", generation__max_new_tokens=12)  # nothing listens on port 1
    shown = run(answer(config, draft, PROMPTS[0], GREEDY))
    assert shown.provenance == [Provenance.LOCAL] * 12
    assert shown.report["local_tokens"] == shown.report["tokens"] == 12


def test_verifier_that_appears_later_takes_over(target: Target, draft: LoadedDraft) -> None:
    async def main() -> Shown:
        async with verifier(target) as running, LinkProxy("127.0.0.1", port(running.address), 5.0) as proxy:
            proxy.cut("reset")
            config = edge_config(f"127.0.0.1:{proxy.port}", generation__max_new_tokens=200)
            restoring = asyncio.create_task(restore(proxy))
            shown = await answer(config, draft, PROMPTS[1], GREEDY)
            await restoring
            return shown

    shown = run(main())
    assert shown.provenance[0] is Provenance.LOCAL
    assert shown.provenance[-1] is not Provenance.LOCAL


def test_prompt_that_is_read_for_longer_than_the_patience_is_waited_for(
    target: Target, plain_target: PlainTarget, draft: LoadedDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, num_forwards = target.engine.forward, 0

    def slowly(batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        nonlocal num_forwards
        num_forwards += 1
        time.sleep(0.4)
        return forward(batch)

    async def main() -> tuple[tuple[int, ...], Shown]:
        async with verifier(target, speculation__prefill_chunk_tokens=16) as running:
            config = edge_config(running.address, generation__max_new_tokens=4, link__patience_ms=1500)
            prompt = " ".join(PROMPTS * 2)
            return make_request(config, draft, prompt).prompt, await answer(config, draft, prompt, GREEDY)

    monkeypatch.setattr(target.engine, "forward", slowly)
    prompt, shown = run(main())
    monkeypatch.undo()
    assert num_forwards >= 8, "twice the patience, at least"
    assert shown.ever_local == 0
    assert shown.tokens == plain_target.stream(prompt, GREEDY, 4, frozenset())


async def restore(proxy: LinkProxy) -> None:
    await asyncio.sleep(1.0)
    await proxy.restore(half_open=True)


def port(address: str) -> int:
    return int(address.rpartition(":")[2])
