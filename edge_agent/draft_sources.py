"""How often the target agreed with what each source of drafts proposed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.engine import MODEL_SOURCE, Proposal


@dataclass(slots=True)
class DraftSources:
    """Remembers what was drafted where, until the verifier has committed that position.

    A drafted token is judged once everything before it was right: what follows a wrong one was drafted on a path that
    the text did not take, and says nothing about its source.
    """

    _drafted: dict[int, tuple[int, str]] = field(default_factory=dict)  # by position: token, source
    _judged: dict[str, list[int]] = field(default_factory=dict)  # by source: accepted, all

    def drafted(self, start: int, proposal: Proposal) -> None:
        """These tokens follow the text at `start`; whatever was drafted from there before is gone."""
        self._forget(start)
        sources = proposal.sources or (MODEL_SOURCE,) * len(proposal.tokens)
        for position, drafted in enumerate(zip(proposal.tokens, sources, strict=True), start=start):
            self._drafted[position] = drafted

    def committed(self, start: int, tokens: Sequence[int]) -> None:
        """The verifier's tokens from position `start` on."""
        for position, token in enumerate(tokens, start=start):
            if position not in self._drafted:
                continue
            drafted, source = self._drafted.pop(position)
            counts = self._judged.setdefault(source, [0, 0])
            counts[0] += drafted == token
            counts[1] += 1
            if drafted != token:
                self._forget(position)
                return

    def report(self) -> dict[str, dict[str, float]]:
        """By source: tokens judged, tokens accepted and their share."""
        return {
            source: {
                "num_draft_tokens": judged,
                "num_accepted_tokens": accepted,
                "acceptance_rate": round(accepted / judged, 4),
            }
            for source, (accepted, judged) in sorted(self._judged.items())
        }

    def _forget(self, start: int) -> None:
        for position in [position for position in self._drafted if position >= start]:
            del self._drafted[position]
