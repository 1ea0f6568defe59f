"""Random simulated sessions by seed: who drafts how well over which link, and what goes wrong when."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from random import Random

from shared.core.link import LinkSettings
from shared.core.messages import Fingerprint, Sampling, Want
from shared.core.policies import DraftPolicy
from shared.core.settings import (
    CloudSettings,
    EdgeSettings,
    OnDisconnect,
    OnReconnect,
    Request,
    SelfDecode,
    TableSettings,
)
from shared.policy.run_ahead import RunAhead, StopAndWait
from shared.policy.scheduler import LEAST_CHUNK_ROWS
from shared.testing.checks import SimEdge
from shared.testing.engines import TOY_VOCABULARY, HashModel, NoisyModel, ToyDraft, ToyTarget
from shared.testing.link_model import LinkModel
from shared.testing.world import World

BUDGET_BYTES = 16.0
BUDGET_MESSAGES_PER_S = 30.0
MAX_STALL_MS = 600.0
HEARTBEAT_MS = 200.0

# What 2,000 sessions must reach, and how often at least; a fault model that stops reaching one of these proves nothing.
MUST_VISIT = {
    **dict.fromkeys(("phase:connecting", "phase:opening", "phase:linked", "phase:local", "phase:done"), 100),
    **dict.fromkeys(("effect:Send", "effect:Connect", "effect:Disconnect", "effect:Draft", "effect:Rollback"), 100),
    **dict.fromkeys(("effect:Emit", "effect:Finished", "effect:Keep", "effect:EndStream"), 100),
    **dict.fromkeys(("effect:Confirm", "effect:Retract", "effect:Release", "effect:Refused"), 20),
    **dict.fromkeys(("up:Open", "up:Draft", "up:Heartbeat", "up:Close", "down:Commit", "down:Heartbeat"), 100),
    **dict.fromkeys(("down:NeedTokens", "down:Failure"), 20),
    **dict.fromkeys(("shown:accepted", "shown:cloud", "shown:local", "finish:stop", "finish:length"), 100),
    **dict.fromkeys(("finish:none", "dial:fresh", "dial:again"), 12),
    **dict.fromkeys(("fault:reset", "fault:blackhole", "fault:half_open", "fault:stall", "fault:restart"), 100),
    **dict.fromkeys(("fault:overload", "fault:slow", "fault:late_delivery", "fault:silent_edge"), 50),
    "budget": 20,
    "evicted": 20,
    "hold": 100,
    **dict.fromkeys(("effect:Truncate", "effect:Share", "fault:forward", "prefill:shared", "prefill:told"), 50),
    **dict.fromkeys(("gaps:link", "gaps:verifier", "up:sibling"), 100),
    **dict.fromkeys(("sibling:sent", "sibling:hit", "sibling:stale"), 100),
    **dict.fromkeys(("recycled", "recycled:repetition"), 50),
}


def hardly_reached(visits: Counter[str], sessions: int) -> dict[str, int]:
    """What so many sessions should have reached more often: visits by name."""
    share = min(sessions / 2000, 1.0)
    return {name: visits[name] for name, least in MUST_VISIT.items() if visits[name] < least * share}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one world came to."""

    sessions: int
    tokens: int
    violations: list[str]
    visits: Counter[str]


def play(seed: int) -> Outcome:
    """One world: one to three edges on a verifier, faults in three worlds out of four."""
    random = Random(seed)
    stop_rate, base_ms = random.choice((0.0, 0.0, 0.02)), random.choice((8.0, 30.0, 65.0))
    row_ms, calm = random.choice((0.2, 1.0, 5.0)), random.random() < 0.25
    # Other than the seeds that once failed, whose worlds stay what they were.
    habit, period = 0.9 if seed % 8 in (2, 4) else 0.0, 12 if seed % 8 == 4 else 0
    stop_rate = 0.0 if calm else stop_rate  # calm ones are long enough for the byte budget
    model = HashModel(seed, stop_rate, habit=habit, period=period)
    sessions = 1 if random.random() < 0.6 else random.choice((3, 6))
    context_length = random.choice((4096, 4096, 120))
    is_tight = not calm and sessions > 1 and random.random() < 0.7  # the cache does not hold all sessions
    target = ToyTarget(model, base_ms=base_ms, row_ms=row_ms, cache_tokens=320 if is_tight else 1 << 16)
    cloud = CloudSettings(
        context_length=4096 if calm else 280 if is_tight else context_length,
        self_decode=random.choice(list(SelfDecode)),
        max_draft_rows=random.choice((4, 16)),
        max_pending_tokens=random.choice((12, 64, 256)),
        window_tokens=random.choice((24, 128)),
    )
    settings = TableSettings(
        cloud,
        TOY_VOCABULARY,
        cache_blocks=target.blocks.num_blocks,
        step_ms=tuple(target.cost_ms(rows) for rows in range(1, cloud.max_draft_rows + 2)),
        max_sessions=sessions,
        share_across_identities=random.random() < 0.5,
        idle_timeout_ms=2_500.0,
        park_timeout_ms=4_000.0,
        retry_after_ms=300,
    )
    chunk_tokens = random.choice((8, 256))
    world = World(seed, model, target, settings, chunk_tokens)
    system_tokens = random.choice((0, 20, 70)) if sessions > 1 else 0
    system_prompt = tuple(random.randrange(1, 1000) for _ in range(system_tokens))
    link_only = not is_tight
    for index in range(sessions):
        edge = _add_edge(world, random, model, seed * 8 + index, system_prompt, calm)
        if not calm:
            link_only &= _schedule_faults(world, random, edge)
    world.run()
    for edge in world.edges:
        if calm:
            _check_budget(world, edge)
        chunk = min(chunk_tokens, LEAST_CHUNK_ROWS)
        step_ms = target.cost_ms(sessions * (1 + cloud.max_draft_rows) + (chunk if sessions > 1 else 0))
        prompts_ms = step_ms * (sum(len(other.request.prompt) for other in world.edges) // chunk)
        _check_gaps(world, edge, link_only, step_ms, prompts_ms)
    tokens = sum(len(edge.user.log) - len(edge.request.prompt) for edge in world.edges)
    return Outcome(sessions, tokens, world.checks.violations, world.checks.visits)


def _add_edge(
    world: World, random: Random, model: HashModel, seed: int, system_prompt: tuple[int, ...], calm: bool
) -> SimEdge:
    acceptance = random.choice((0.9, 0.97, 1.0) if calm else (0.0, 0.3, 0.7, 0.9, 0.97, 1.0))
    policy: DraftPolicy = RunAhead() if random.random() < 0.75 else StopAndWait(random.choice((1, 5)))
    mismatch = not calm and random.random() < 0.03
    request = Request(
        session_id=f"s{seed}",
        prompt=system_prompt + tuple(random.randrange(1, 1000) for _ in range(random.choice((1, 5, 40)))),
        max_new_tokens=120 if calm else random.choice((1, 30, 120)),
        vocabulary=Fingerprint(999, b"other") if mismatch else TOY_VOCABULARY,
        sampling=Sampling(seed=seed),
        stop_ids=frozenset((0,)),
        want=Want.STREAM if random.random() < 0.1 else Want.SPECULATE,
    )
    settings = EdgeSettings(
        link=LinkSettings(max_stall_ms=MAX_STALL_MS, heartbeat_ms=HEARTBEAT_MS),
        patience_ms=random.choice((1_500.0, 5_000.0)),
        on_disconnect=random.choice((OnDisconnect.CONTINUE,) * 6 + (OnDisconnect.PAUSE, OnDisconnect.FAIL)),
        on_reconnect=random.choice(list(OnReconnect)),
        offline=not calm and random.random() < 0.02,
    )
    link = LinkModel(
        world.random,
        one_way_ms=random.choice((1.0, 10.0, 25.0, 75.0)),
        jitter_ms=random.choice((0.0, 5.0, 40.0)),
        duplicate_rate=0.0 if calm else 0.05,
    )
    draft = NoisyModel(model, acceptance, salt=seed + 1, second_chance=(0.0, 0.3, 0.7)[seed % 3])
    engine = ToyDraft(draft, max_context=random.choice((1 << 20, 1 << 20, 100)))
    draft_ms = random.choice((1.0, 8.0, 13.0, 60.0))
    return world.add_edge(request, settings, policy, engine, link, draft_ms, is_branching=not calm and seed % 2 == 0)


def _schedule_faults(world: World, random: Random, edge: SimEdge) -> bool:
    """Plan what goes wrong; True where only the link does."""
    faults = []
    for _ in range(random.randrange(1, 5)):
        when, lasts_s = random.random() * 4.0, random.choice((0.05, 0.4, 1.0, 3.0, 8.0))
        faults.append(random.randrange(10))
        match faults[-1]:
            case 0:
                world.at(when, partial(world.reset_link, edge, lasts_s))
            case 1:
                world.at(when, partial(world.blackhole, edge, lasts_s))
            case 2:
                world.at(when, partial(world.blackhole, edge, lasts_s, up=False))
            case 3:
                world.at(when, partial(world.blackhole, edge, lasts_s, down=False))
            case 4:
                world.at(when, partial(world.stall, edge, lasts_s))
            case 5:
                world.at(when, world.restart_verifier)
            case 6:  # the cloud is slow to answer the Open after a short outage: the edge shows local tokens meanwhile
                when, lasts_s = when / 4, lasts_s / 8
                world.at(when, partial(world.reset_link, edge, lasts_s))
                world.at(when, partial(world.slow_down, lasts_s + 2.0, slow_ms=700.0))
            case 7:
                world.at(when, partial(world.overload, lasts_s))
            case 8:
                world.at(when / 4, partial(world.poison, edge, lasts_s / 4))
            case _:
                when /= 4  # early: most sessions are short
                world.at(when, partial(world.slow_down, lasts_s, slow_ms=700.0 if lasts_s < 2 else 4_000.0))
                if lasts_s > 0.1 and random.random() < 0.5:  # and the device changes its network meanwhile
                    world.at(when + 0.1, partial(world.reset_link, edge, 0.05))
    return max(faults) < 5


def _check_gaps(world: World, edge: SimEdge, link_only: bool, step_ms: float, prompts_ms: float) -> None:
    """Where the link alone is at fault, no pause is longer than `max_stall_ms` and what the work in hand takes.

    A verifier at fault may cost the patience too. Silence counts from the last message, a heartbeat perhaps: a step may
    have been on its way for its own duration and a round trip. Then the draft engine may have to finish a chunk before
    it drafts the token to show. Before the first token everybody's prompt may have to be read; and again where the
    verifier forgot them.
    """
    room = edge.engine.capabilities.max_context
    if edge.settings.on_disconnect is not OnDisconnect.CONTINUE or room < 1000:
        return
    world.checks.visits["gaps:link" if link_only else "gaps:verifier"] += 1
    slack_ms = 2 * (edge.link.one_way_ms + edge.link.jitter_ms) + 2 * step_ms + 6 * edge.draft_ms
    allowed_ms = MAX_STALL_MS + slack_ms + (0.0 if link_only else edge.settings.patience_ms + prompts_ms)
    first_ms = allowed_ms + (prompts_ms if link_only else 0.0)
    for gap_s, limit_ms in ((edge.user.first_gap_s, first_ms), (edge.user.longest_gap_s, allowed_ms)):
        if gap_s > limit_ms / 1000:
            world.checks.violated(edge, world.now, f"showed nothing for {gap_s:.2f} s, {limit_ms:.0f} ms allowed")


def _check_budget(world: World, edge: SimEdge) -> None:
    """Steady state of one calm session that runs ahead with a good draft at a round trip of 50 ms or so.

    Longer round trips waste more drafts on each rejection, and bytes with them.
    """
    tokens = len(edge.user.log) - len(edge.request.prompt)
    is_steady = tokens >= 100 and len(world.edges) == 1 and edge.draft_ms <= 20 and edge.link.one_way_ms <= 25
    model = edge.engine.model
    is_good = isinstance(model, NoisyModel) and model.acceptance > 0.95
    if not is_steady or not is_good or not isinstance(edge.policy, RunAhead):
        return
    world.checks.visits["budget"] += 1
    for way, spent in (("up", edge.bytes_up), ("down", edge.bytes_down)):
        if spent / tokens > BUDGET_BYTES:
            world.checks.violated(edge, world.now, f"{spent / tokens:.1f} bytes {way} per token")
    # Or four for three steps and heartbeats; the Open and the Close are not steady state.
    seconds = edge.user.gap_since
    allowed = max(BUDGET_MESSAGES_PER_S * seconds, edge.commits * 4 / 3 + seconds * 1000 / HEARTBEAT_MS)
    if edge.messages_up - 2 > allowed:
        world.checks.violated(edge, world.now, f"{edge.messages_up - 2} messages up, {allowed:.0f} allowed")
