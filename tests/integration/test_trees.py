"""A weak draft on the real pair: the edge sends trees of its own accord, and the text is still the target's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.pruned import without_layers
from benchmarks.trees import Plan, trees

from cloud_verifier.engines import Target
from edge_agent.config import load_edge_config
from edge_agent.engines import LoadedDraft, load_draft
from edge_agent.setup import make_request
from shared.core.messages import Sampling
from shared.runtimes.hub import default_cache_dir
from tests.integration.pair import (
    GREEDY,
    PROMPTS,
    Plain,
    PlainLlamaCpp,
    PlainTarget,
    Shown,
    answer,
    edge_config,
    run,
    verifier,
)

pytestmark = pytest.mark.models
TOKENS = 24


@pytest.fixture(scope="module")
def weak_draft(default_model_path: Path) -> Iterator[LoadedDraft]:
    """Accepted about every other time."""
    config = load_edge_config(environ={}, overrides={"draft.engine": "llama_cpp", "draft.context_tokens": 1024}).draft
    loaded = load_draft(config, without_layers(default_model_path, (24, 25, 26), default_cache_dir()))
    yield loaded
    loaded.engine.close()


async def shown_on(target: Target, draft: LoadedDraft, prompt: str, sampling: Sampling) -> Shown:
    async with verifier(target, speculation__self_decode="off") as running:
        config = edge_config(
            running.address,
            generation__max_new_tokens=TOKENS,
            # A busy test machine must not look like a stalled link.
            link__max_stall_ms=20_000,
            link__heartbeat_ms=10_000,
            link__patience_ms=60_000,
        )
        return await answer(config, draft, prompt, sampling)


def check(target: Target, plain: Plain, draft: LoadedDraft) -> None:
    hits = 0
    # Seeds where several siblings are right: whether each is in time is up to the machine.
    sampled = [Sampling(temperature=1.0, seed=seed) for seed in (99, 101, 110, 115)]
    for prompt, sampling in ((PROMPTS[1], GREEDY), *[(PROMPTS[4], one) for one in sampled]):
        shown = run(shown_on(target, draft, prompt, sampling))
        request = make_request(edge_config("127.0.0.1:1"), draft, prompt)
        assert shown.tokens == plain.stream(request.prompt, sampling, TOKENS, request.stop_ids)
        hits += shown.report["sibling_hits"]
    assert hits > 0


def test_text_with_trees_is_the_torch_targets_own(
    target: Target, plain_target: PlainTarget, weak_draft: LoadedDraft
) -> None:
    check(target, plain_target, weak_draft)


def test_text_with_trees_is_the_llama_cpp_targets_own(
    llama_cpp_target: Target, plain_llama_cpp_target: PlainLlamaCpp, weak_draft: LoadedDraft
) -> None:
    check(llama_cpp_target, plain_llama_cpp_target, weak_draft)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tree_commits_more_than_the_chain_with_as_many_rows() -> None:
    (case,) = trees(Plan("llama_cpp", (24, 25, 26), (8,), (1.0,), 3, 64), print)
    assert case.tree.is_same_text
    assert case.tree_vs_chain > 1.1
