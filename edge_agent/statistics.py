"""What one answer was like, measured where the user sits. Monotonic clock; durations in ms."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_agent.channel import Traffic
from edge_agent.draft_sources import DraftSources
from shared.core.acceptance_report import RequestAcceptance
from shared.core.effects import Confirm, Emit, Provenance, Retract
from shared.core.messages import Commit

_COUNTED_AT_ONCE = 32  # commits: counted one by one, each amid everything else, they take four times as long


@dataclass(slots=True)
class Statistics:
    """Filled while an answer runs. What was retracted counts as retracted and nowhere else."""

    begun_at: float
    shown_at: list[float] = field(default_factory=list)
    provenance: list[Provenance] = field(default_factory=list)
    start: int = 0  # position of the first shown token
    retracted_tokens: int = 0
    acceptance: RequestAcceptance = field(default_factory=RequestAcceptance)
    sources: DraftSources = field(default_factory=DraftSources)
    verify_ms: float = 0.0
    disconnects: int = 0
    _uncounted: list[Commit] = field(default_factory=list)

    def saw_commit(self, commit: Commit) -> None:
        """One target step, to be counted."""
        self._uncounted.append(commit)
        if len(self._uncounted) >= _COUNTED_AT_ONCE:
            self._count()

    def saw_drafts(self, start: int, tokens: Sequence[int], sources: Sequence[str]) -> None:
        """These tokens were drafted at position `start`; what was committed before says nothing about them."""
        self._count()
        self.sources.drafted(start, tokens, sources)

    def saw(self, event: Emit | Confirm | Retract, now: float) -> None:
        """Tokens were shown, verified after all or taken back."""
        match event:
            case Emit(start=start, tokens=tokens, provenance=provenance):
                self.start = self.start if self.shown_at else start
                self.shown_at += [now] * len(tokens)
                self.provenance += provenance
            case Confirm(length=length):
                confirmed = self.provenance[: length - self.start]
                accepted = [Provenance.ACCEPTED if source is Provenance.LOCAL else source for source in confirmed]
                self.provenance[: len(accepted)] = accepted
            case Retract(length=length):
                self.retracted_tokens += self.start + len(self.shown_at) - length
                del self.shown_at[length - self.start :]
                del self.provenance[length - self.start :]

    @property
    def ttft_ms(self) -> float:
        """From the request to the first token; 0 if none came."""
        return (self.shown_at[0] - self.begun_at) * 1000 if self.shown_at else 0.0

    @property
    def tpot_ms(self) -> float:
        """Mean time per token after the first: (last - first) / (n - 1)."""
        if len(self.shown_at) < 2:
            return 0.0
        return (self.shown_at[-1] - self.shown_at[0]) * 1000 / (len(self.shown_at) - 1)

    @property
    def max_itl_ms(self) -> float:
        """The longest gap between two tokens."""
        gaps = (later - earlier for earlier, later in zip(self.shown_at, self.shown_at[1:], strict=False))
        return max(gaps, default=0.0) * 1000

    def report(self, traffic: Traffic, draft_ms: float, rtt_ms: float, wasted_tokens: int) -> dict[str, object]:
        """One JSON-ready object; rates are null where nothing was counted."""
        self._count()
        tokens = len(self.shown_at)
        steps = self.acceptance.num_steps
        accepted, cloud, local = (self.provenance.count(source) for source in Provenance)
        committed = accepted + cloud
        return {
            "tokens": tokens,
            "ttft_ms": round(self.ttft_ms, 2),
            "tpot_ms": round(self.tpot_ms, 3),
            "max_itl_ms": round(self.max_itl_ms, 2),
            "accepted_tokens": accepted,
            "cloud_tokens": cloud,
            "local_tokens": local,
            "retracted_tokens": self.retracted_tokens,
            **self.acceptance.report(),
            "draft_sources": self.sources.report(),
            "mean_verify_ms": round(self.verify_ms / steps, 2) if steps else None,
            "wasted_draft_tokens": wasted_tokens,
            "draft_ms": round(draft_ms, 2),
            "rtt_ms": round(rtt_ms, 2),
            "open_bytes": traffic.open_bytes,
            "bytes_up_per_token": round(traffic.bytes_up / committed, 2) if committed else None,
            "bytes_down_per_token": round(traffic.bytes_down / committed, 2) if committed else None,
            "messages_up": traffic.messages_up,
            "messages_down": traffic.messages_down,
            "disconnects": self.disconnects,
        }

    def _count(self) -> None:
        for commit in self._uncounted:
            self.acceptance.count(commit)
            self.sources.committed(commit.start, commit.tokens)
            self.verify_ms += commit.verify_ms
        self._uncounted.clear()
