"""Many edges on one verifier, the real pair: each gets its own text, whoever else is served beside it."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from grpc import aio

from cloud_verifier.engines import Target
from cloud_verifier.engines.torch_engine import TorchTarget
from edge_agent.config import load_edge_config
from edge_agent.engines import LoadedDraft, load_draft
from edge_agent.setup import make_request
from shared.core.effects import Provenance
from shared.core.kv_blocks import BLOCK_TOKENS, num_blocks
from shared.core.messages import Finish, Open
from tests.cloud_verifier.raw_edge import RawEdge
from tests.integration.pair import GREEDY, PROMPTS, SAMPLED, PlainTarget, Shown, answer, edge_config, run, verifier

pytestmark = pytest.mark.models
SIX = 6
# A busy test machine must not look like a stalled link.
PATIENT = {"link__max_stall_ms": 20_000, "link__heartbeat_ms": 10_000, "link__patience_ms": 60_000}


@pytest.fixture(scope="module")
def drafts(default_model_path: Path) -> Iterator[list[LoadedDraft]]:
    config = load_edge_config(environ={}, overrides={"draft.context_tokens": 1024}).draft
    loaded = [load_draft(config, default_model_path) for _ in range(SIX)]
    yield loaded
    for one in loaded:
        one.engine.close()


async def check_six(
    target: Target, plain: PlainTarget, drafts: list[LoadedDraft], self_decode: str, run_ahead: bool, n: int
) -> None:
    """Six prompts at a time, greedy and sampled by turns, one of them with garbage drafts and one without any."""
    edge = edge_config("127.0.0.1:1")
    samplings = [replace(SAMPLED, seed=index) if index % 2 else GREEDY for index in range(SIX)]
    expected = []
    for prompt, sampling, draft in zip(PROMPTS, samplings, drafts, strict=True):
        request = make_request(edge, draft, prompt)
        expected.append(plain.stream(request.prompt, sampling, n, request.stop_ids))
    async with verifier(target, speculation__self_decode=self_decode) as running:
        edge = edge_config(running.address, generation__max_new_tokens=n, speculation__run_ahead=run_ahead, **PATIENT)
        plain_edge = edge_config(running.address, generation__max_new_tokens=n, speculation__enabled=False, **PATIENT)
        shown: list[Shown] = await asyncio.gather(
            *(
                answer(plain_edge if index == 5 else edge, draft, prompt, sampling, garbage=index == 4)
                for index, (prompt, sampling, draft) in enumerate(zip(PROMPTS, samplings, drafts, strict=True))
            )
        )
    for index, (one, text) in enumerate(zip(shown, expected, strict=True)):
        assert Provenance.LOCAL not in one.provenance, f"edge {index}: the link was fine"
        assert text == one.tokens, f"edge {index}"
    assert sum(one.provenance.count(Provenance.ACCEPTED) for one in shown) > 0


@pytest.mark.timeout(900)
def test_six_edges_at_a_time_each_get_the_targets_text(
    target: Target, plain_target: PlainTarget, drafts: list[LoadedDraft]
) -> None:
    run(check_six(target, plain_target, drafts, "idle", True, 24), timeout_s=880)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize("self_decode", ["off", "idle", "always"])
def test_six_edges_at_a_time_each_get_a_long_text(
    target: Target, plain_target: PlainTarget, drafts: list[LoadedDraft], self_decode: str, run_ahead: bool
) -> None:
    run(check_six(target, plain_target, drafts, self_decode, run_ahead, 64), timeout_s=880)


async def check_idle(path: Path, plain: PlainTarget, count: int) -> None:
    """Sessions that stop to acknowledge keep no claim on the cache; each of them goes on rightly when it is back."""
    engine = TorchTarget.load(str(path), dtype="float32", threads=1, context_tokens=64, kv_cache_mb=8)
    target = Target(engine, engine.vocabulary, "SmolLM2", "float32", "torch")
    num_cache_blocks = engine.limits.cache_tokens // BLOCK_TOKENS
    random = Random(1)
    prompts = [tuple(random.randrange(1_000, 20_000) for _ in range(20)) for _ in range(count)]
    assert count * num_blocks(len(prompts[0])) > 4 * num_cache_blocks, "they would all fit"
    limits = {"limits__max_sessions": count, "limits__idle_timeout_s": 3600, "speculation__window_tokens": 2}
    async with verifier(target, **limits) as running, aio.insecure_channel(running.address) as channel:
        edges = []
        for group in range(0, count, 4):  # more at a time are refused: the cache would not hold their prompts
            opened = [
                RawEdge(channel, Open(f"s{group}-{index}", prompt, len(prompt), 5, engine.fingerprint))
                for index, prompt in enumerate(prompts[group : group + 4])
            ]
            edges += opened
            await asyncio.gather(*(edge.send(edge.opened) for edge in opened))
            await asyncio.gather(*(edge.read(2) for edge in opened))
        used, in_all, _ = running.worker.cache_usage()
        assert used <= in_all == num_cache_blocks
        used, in_all, _ = running.worker.cache_usage()
        assert used <= in_all == num_cache_blocks
        for edge in edges:
            assert len(edge.text) == 2
            while edge.finish is Finish.NONE:
                await edge.acknowledge()
                await edge.read(min(len(edge.text) + 2, 5))
    for edge, prompt in zip(edges, prompts, strict=True):
        assert list(edge.text) == plain.stream(prompt, GREEDY, 5, frozenset())


@pytest.mark.timeout(900)
def test_idle_edges_cost_no_cache_and_go_on_rightly(default_model_path: Path, plain_target: PlainTarget) -> None:
    run(check_idle(default_model_path, plain_target, 24), timeout_s=880)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousand_idle_edges_cost_no_cache_and_go_on_rightly(
    default_model_path: Path, plain_target: PlainTarget
) -> None:
    run(check_idle(default_model_path, plain_target, 1_000), timeout_s=3500)
