"""How well one request's drafts did: counts of its commits, in vLLM's words."""

from dataclasses import dataclass, field

from shared.core.messages import Commit


@dataclass(slots=True)
class RequestAcceptance:
    """Counts over the commits of one request; the rates are the reader's, or `report`'s.

    The names are vLLM's (`SpecDecodingStats`): `num_drafts` counts target steps that evaluated draft tokens,
    `num_draft_tokens` those tokens, `num_accepted_tokens` the ones that the target agreed with, and
    `num_accepted_tokens_per_pos[i]` the steps that accepted more than i. A next_token is never counted as accepted;
    draft tokens that arrived and were never evaluated are not counted at all. `num_recycled_tokens`, a word of ours,
    counts those that the verifier had guessed itself.
    """

    num_steps: int = 0
    num_committed_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_recycled_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    def count(self, commit: Commit) -> None:
        """Count one target step."""
        self.num_steps += 1
        self.num_committed_tokens += len(commit.tokens)
        self.num_drafts += commit.num_drafted > 0
        self.num_draft_tokens += commit.num_drafted
        self.num_accepted_tokens += commit.num_accepted
        self.num_recycled_tokens += commit.num_recycled
        per_position = self.num_accepted_tokens_per_pos
        per_position += [0] * (commit.num_accepted - len(per_position))
        for position in range(commit.num_accepted):
            per_position[position] += 1

    def report(self) -> dict[str, object]:
        """The counts and two rates, ready for JSON and logs; a rate is None where there is nothing to divide by.

        `acceptance_rate` is accepted / drafted, `mean_acceptance_length` committed tokens a step, next_token included.
        """
        steps, drafted = self.num_steps, self.num_draft_tokens
        return {
            "num_steps": steps,
            "num_drafts": self.num_drafts,
            "num_draft_tokens": drafted,
            "num_accepted_tokens": self.num_accepted_tokens,
            "num_recycled_tokens": self.num_recycled_tokens,
            "num_accepted_tokens_per_pos": list(self.num_accepted_tokens_per_pos),
            "acceptance_rate": round(self.num_accepted_tokens / drafted, 4) if drafted else None,
            "mean_acceptance_length": round(self.num_committed_tokens / steps, 3) if steps else None,
        }
