"""How often the target agreed with what each source of drafts proposed."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class DraftSources:
    """Remembers which source drafted each token of the own path, until the verifier has committed that position.

    A drafted token is judged if everything before it was right: what follows a wrong one was drafted on a path that the
    text did not take, and says nothing about its source.
    """

    _drafted: dict[int, tuple[int, str]] = field(default_factory=dict)  # by position: token, source
    _judged: dict[str, list[int]] = field(default_factory=dict)  # by source: accepted, all

    def drafted(self, start: int, tokens: Sequence[int], sources: Sequence[str]) -> None:
        """These tokens are the own path from position `start` on, which is not committed yet."""
        self._forget(start)
        self._drafted.update(enumerate(zip(tokens, sources, strict=True), start))

    def committed(self, start: int, tokens: Sequence[int]) -> None:
        """The verifier's tokens from position `start` on."""
        for position, token in enumerate(tokens, start):
            found = self._drafted.pop(position, None)
            if found is None:
                continue
            drafted, source = found
            counts = self._judged.setdefault(source, [0, 0])
            counts[0] += drafted == token
            counts[1] += 1
            if drafted != token:
                self._forget(position)

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
        while self._drafted and next(reversed(self._drafted)) >= start:  # positions come in order
            self._drafted.popitem()
