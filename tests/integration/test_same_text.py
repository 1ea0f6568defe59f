"""Promise 1 on the real pair: whatever the drafts, the timing and the verifier's mode, the text is the target's own."""

from collections.abc import Sequence
from itertools import product

import pytest

from cloud_verifier.engines import Target
from edge_agent.engines import LoadedDraft
from edge_agent.setup import make_request
from shared.core.effects import Provenance
from shared.core.messages import Sampling
from tests.integration.pair import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    Plain,
    PlainLlamaCpp,
    PlainTarget,
    answer,
    edge_config,
    run,
    verifier,
)

pytestmark = pytest.mark.models
MODES = tuple(product((True, False), ("off", "idle", "always"), (False, True)))  # run-ahead, self-decode, garbage


async def check(
    target: Target,
    plain: Plain,
    draft: LoadedDraft,
    prompt: str,
    sampling: Sampling,
    n: int,
    modes: Sequence[tuple[bool, str, bool]] = MODES,
) -> None:
    request = make_request(edge_config("127.0.0.1:1"), draft, prompt)
    expected = plain.stream(request.prompt, sampling, n, request.stop_ids)
    for run_ahead, self_decode, garbage in modes:
        async with verifier(target, speculation__self_decode=self_decode) as running:
            config = edge_config(
                running.address,
                generation__max_new_tokens=n,
                speculation__run_ahead=run_ahead,
                # A busy test machine must not look like a stalled link.
                link__max_stall_ms=20_000,
                link__heartbeat_ms=10_000,
                link__patience_ms=60_000,
            )
            shown = await answer(config, draft, prompt, sampling, garbage)
        mode = f"run_ahead={run_ahead} self_decode={self_decode} garbage={garbage}"
        assert Provenance.LOCAL not in shown.provenance, f"{mode}: the link was fine"
        assert expected == shown.tokens, mode


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_text_is_the_targets_own_in_every_mode(
    target: Target, plain_target: PlainTarget, draft: LoadedDraft, prompt: str, sampling: Sampling
) -> None:
    run(check(target, plain_target, draft, prompt, sampling, 20), timeout_s=880)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_text_is_the_llama_cpp_targets_own(
    llama_cpp_target: Target, plain_llama_cpp_target: PlainLlamaCpp, draft: LoadedDraft, sampling: Sampling
) -> None:
    modes = [mode for mode in MODES if mode[0]]
    run(check(llama_cpp_target, plain_llama_cpp_target, draft, PROMPTS[2], sampling, 16, modes), timeout_s=880)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_long_text_is_the_targets_own_in_every_mode(
    target: Target, plain_target: PlainTarget, draft: LoadedDraft, prompt: str, sampling: Sampling
) -> None:
    run(check(target, plain_target, draft, prompt, sampling, 64), timeout_s=1180)


def test_drafts_are_accepted_on_the_real_pair(target: Target, draft: LoadedDraft) -> None:
    async def main() -> None:
        async with verifier(target) as running:
            config = edge_config(running.address, generation__max_new_tokens=48)
            shown = await answer(config, draft, PROMPTS[1], GREEDY)
        assert shown.provenance.count(Provenance.ACCEPTED) >= 10
        assert shown.report["num_accepted_tokens"] == shown.provenance.count(Provenance.ACCEPTED)

    run(main())
