"""Which setting to change, by what was measured: pure, for `edge-agent doctor`."""

import math
from dataclasses import dataclass

from edge_agent.config import EdgeConfig
from edge_agent.link_probe import LinkMeasured
from shared.core.link import LinkSettings

_SLOW_DRAFT = 1 / 4  # of a target step: with a slower draft it is the draft that limits the speed
_LEAST_UP_KBPS = 30.0  # 24 messages a second, with their headers
_SLOW_INTERVAL_MS = 100.0


@dataclass(frozen=True, slots=True)
class Advice:
    """Set `key` to `value`, and why."""

    key: str
    value: str
    why: str


def advise(
    config: EdgeConfig, link: LinkMeasured, draft_ms: float, step_ms: float, gain: float, num_cpus: int
) -> tuple[Advice, ...]:
    """What to change, the most important first. `gain`: speed with drafts over what would just be worth it."""
    return (*_drafting(config, draft_ms, step_ms, gain, num_cpus), *_link(config, link))


def _drafting(config: EdgeConfig, draft_ms: float, step_ms: float, gain: float, num_cpus: int) -> list[Advice]:
    advice, draft = list[Advice](), config.draft
    if gain < 1 and config.speculation.enabled:
        why = "drafts gain less than 10 % here and cost energy; the cloud alone is as good"
        advice.append(Advice("speculation.enabled", "false", why))
    if gain >= 1 and not config.speculation.enabled:
        advice.append(Advice("speculation.enabled", "true", f"answers would come {gain * 1.1:.1f} times as fast"))
    if draft_ms > step_ms * _SLOW_DRAFT:
        limit = f"a draft token takes {draft_ms:.1f} ms, a target step {step_ms:.1f} ms: the draft is the limit"
        if draft.quantization is None and draft.engine.endswith("llama_cpp"):
            advice.append(Advice("draft.quantization", "q8_0", f"{limit}; worth a try"))
        if 0 < draft.threads < num_cpus:
            advice.append(Advice("draft.threads", str(draft.threads + 1), f"{limit}; there are {num_cpus} processors"))
    return advice


def _link(config: EdgeConfig, link: LinkMeasured) -> list[Advice]:
    advice = list[Advice]()
    slack_ms = max(link.jitter_ms, LinkSettings().min_stall_ms)
    needed_ms = config.link.heartbeat_ms + link.rtt_ms + slack_ms
    if needed_ms > config.link.max_stall_ms:
        why = f"a live link of {link.rtt_ms:.0f} ms can be silent for {needed_ms:.0f} ms and would count as stalled"
        advice.append(Advice("link.max_stall_ms", _rounded_up(needed_ms), why))
    if 3 * link.rtt_ms > config.link.connect_timeout_ms:
        why = f"connecting takes up to three round trips of {link.rtt_ms:.0f} ms"
        advice.append(Advice("link.connect_timeout_ms", _rounded_up(4 * link.rtt_ms), why))
    is_slow = link.up_kbps is not None and link.up_kbps < _LEAST_UP_KBPS
    if is_slow and config.speculation.message_interval_ms < _SLOW_INTERVAL_MS:
        why = f"{link.up_kbps:.0f} kbit/s up are too few for messages at that rate"
        advice.append(Advice("speculation.message_interval_ms", f"{_SLOW_INTERVAL_MS:g}", why))
    return advice


def _rounded_up(ms: float) -> str:
    return str(math.ceil(ms / 100) * 100)
