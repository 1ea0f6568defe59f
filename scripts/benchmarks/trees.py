"""Chain or tree on the real pair with a weak draft: what a step commits at equal row budgets, counted, not timed.

Edge and verifier go in lockstep: the edge drafts as many tokens as the budget has rows and waits; the step takes the
best rows, whatever the forward costs. The draft is the default model with layers removed; the text of every run must be
the target's own.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.prompts import load_prompts
from benchmarks.pruned import without_layers
from cloud_verifier.config import load_cloud_config
from cloud_verifier.engines import Target, load_target
from edge_agent.config import load_edge_config
from edge_agent.engines import LoadedDraft, load_draft
from edge_agent.setup import make_request
from shared.core.kv_blocks import BLOCK_TOKENS
from shared.core.messages import Sampling
from shared.core.policies import Allotment, DraftObservation, Offer
from shared.core.settings import CloudSettings, EdgeSettings, Request, TableSettings
from shared.policy.run_ahead import StopAndWait
from shared.runtimes.hub import default_cache_dir, resolve_model
from shared.testing.pair import Pair

CONTEXT_TOKENS = 1024


@dataclass(frozen=True)
class Plan:
    """What to count. `dropped` are the layers that the draft lacks."""

    engine: str
    dropped: Sequence[int]
    budgets: Sequence[int]
    temperatures: Sequence[float]
    num_prompts: int
    max_new_tokens: int


@dataclass(frozen=True)
class Counted:
    """One way of drafting, over all prompts. `hits` are steps that went on behind a sibling."""

    tokens: int
    steps: int
    rows: int
    hits: int
    is_same_text: bool

    @property
    def committed_per_step(self) -> float:
        """Mean acceptance length."""
        return self.tokens / self.steps


@dataclass(frozen=True)
class Case:
    """Both ways at one temperature, with at most so many draft rows a step."""

    temperature: float
    budget_rows: int
    chain: Counted
    tree: Counted

    @property
    def tree_vs_chain(self) -> float:
        """Committed tokens per step of the tree in those of the chain."""
        return self.tree.committed_per_step / self.chain.committed_per_step

    def report(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "chain_tokens_per_step": round(self.chain.committed_per_step, 3),
            "tree_tokens_per_step": round(self.tree.committed_per_step, 3),
            "tree_vs_chain": round(self.tree_vs_chain, 3),
            "chain_rows_per_step": round(self.chain.rows / self.chain.steps, 2),
            "tree_rows_per_step": round(self.tree.rows / self.tree.steps, 2),
            "sibling_hits_per_step": round(self.tree.hits / self.tree.steps, 3),
            "same_text": self.chain.is_same_text and self.tree.is_same_text,
        }


class ChainOnly(StopAndWait):
    """A draft policy that sends no siblings."""

    def sibling_price(self, seen: DraftObservation) -> float:
        """More than any is worth."""
        return 2.0


class TakeBest:
    """A step policy that takes every row on offer."""

    def allot(self, offers: Sequence[Offer]) -> Allotment:
        """See `StepPolicy`."""
        return Allotment([offer.prefill_rows + 1 + len(offer.worth) for offer in offers])


def trees(plan: Plan, progress: Callable[[str], None]) -> list[Case]:
    """Count every case of the plan. Raises `EngineError`."""
    config = load_edge_config(
        environ={}, overrides={"draft.engine": "llama_cpp", "draft.context_tokens": CONTEXT_TOKENS}
    )
    path = resolve_model(config.draft.model, "draft.model")
    draft = load_draft(config.draft, without_layers(path, plan.dropped, default_cache_dir()))
    overrides = {
        "target.engine": plan.engine, "target.dtype": "float32", "target.context_tokens": CONTEXT_TOKENS,
    }  # fmt: skip
    target = load_target(load_cloud_config(environ={}, overrides=overrides).target, lambda *_: None)
    texts = [prompt.text for prompt in load_prompts(None, plan.num_prompts)]
    cases: list[Case] = []
    for temperature in plan.temperatures:
        sampling = Sampling(temperature=temperature, seed=1)
        requests = [
            replace(make_request(config, draft, text), sampling=sampling, max_new_tokens=plan.max_new_tokens)
            for text in texts
        ]
        own = [_play(request, draft, target, ChainOnly(0), 1)[0] for request in requests]
        for budget in plan.budgets:
            chain = _count(requests, own, draft, target, ChainOnly(budget), budget)
            tree = _count(requests, own, draft, target, StopAndWait(budget), budget)
            cases.append(Case(temperature, budget, chain, tree))
            progress(f"temperature {temperature}, {budget} rows: {json.dumps(cases[-1].report())}")
    draft.engine.close()
    return cases


def _count(
    requests: Sequence[Request],
    own: Sequence[tuple[int, ...]],
    draft: LoadedDraft,
    target: Target,
    policy: StopAndWait,
    budget: int,
) -> Counted:
    tokens = steps = rows = hits = 0
    is_same = True
    for request, expected in zip(requests, own, strict=True):
        text, pair = _play(request, draft, target, policy, budget)
        is_same &= text == expected
        tokens += len(text)
        steps += len(pair.commits)
        rows += sum(commit.num_drafted for commit in pair.commits)
        hits += pair.session.path.siblings.num_hits
    return Counted(tokens, steps, rows, hits, is_same)


def _play(
    request: Request, draft: LoadedDraft, target: Target, policy: StopAndWait, budget: int
) -> tuple[tuple[int, ...], Pair]:
    cloud = CloudSettings(context_length=CONTEXT_TOKENS, max_draft_rows=budget)
    table = TableSettings(cloud, request.vocabulary, cache_blocks=CONTEXT_TOKENS // BLOCK_TOKENS)
    pair = Pair(request, EdgeSettings(), policy, draft.engine, target.engine, table, TakeBest())
    pair.run()
    target.engine.release(f"edge/{request.session_id}")  # the table would keep it for a return
    return pair.shown.tokens(len(request.prompt)), pair
