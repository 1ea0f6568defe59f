"""What the user has seen of one answer, and the effects that keep it true."""

from shared.core.effects import Confirm, Emit, Provenance, Retract
from shared.core.messages import Commit
from shared.core.tokens import TokenLog


class Transcript:
    """The first `shown_len` tokens of the log are shown."""

    def __init__(self, prompt_len: int) -> None:
        self.shown_len = prompt_len

    def show_local(self, log: TokenLog) -> list[Emit]:
        """Show the rest of the log as local."""
        start, tokens = self.shown_len, log.tokens(self.shown_len)
        self.shown_len = len(log)
        return [Emit(start, tokens, (Provenance.LOCAL,) * len(tokens))] if tokens else []

    def show_committed(
        self, log: TokenLog, commit: Commit, start: int, differs_at: int
    ) -> list[Confirm | Retract | Emit]:
        """Make what is shown equal to what is committed.

        The commit's new tokens are in the log from `start` on; up to `differs_at` they equal the own path, so local
        tokens shown there are confirmed, and local tokens shown beyond are retracted.
        """
        effects: list[Confirm | Retract | Emit] = []
        end = commit.start + len(commit.tokens)
        if min(self.shown_len, differs_at) > start:
            effects.append(Confirm(min(self.shown_len, differs_at)))
        if differs_at < min(self.shown_len, end):
            effects.append(Retract(differs_at))
            self.shown_len = differs_at
        if self.shown_len < end:
            num_accepted = max(commit.start + commit.num_accepted - self.shown_len, 0)
            num_cloud = end - self.shown_len - num_accepted
            provenance = (Provenance.ACCEPTED,) * num_accepted + (Provenance.CLOUD,) * num_cloud
            effects.append(Emit(self.shown_len, log.tokens(self.shown_len, end), provenance))
            self.shown_len = end
        return effects
