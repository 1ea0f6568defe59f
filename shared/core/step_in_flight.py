"""One session's part of a step between its start and its end: what was fed, and what the selected tokens say of it."""

from dataclasses import dataclass

from shared.core.draft_tree import Node


@dataclass(slots=True)
class StepInFlight:
    """A step in flight: it feeds `fed` committed tokens, the drafts `nodes`, then the verifier's own `guess`.

    A guess hangs on the last draft, and then these are one path; or on the last committed token where there is none.
    `partial`: a prefill chunk, nothing else.
    """

    fed: int
    nodes: list[Node]
    guess: tuple[int, ...]
    partial: bool
    queue_ms: float

    def judge(self, selected: tuple[int, ...], stop_ids: frozenset[int]) -> tuple[list[int], tuple[int, ...]]:
        """Which rows behind the fed ones are accepted, and the tokens that the step commits (up to a stop token)."""
        accepted: list[int] = []
        tokens, nodes = [selected[0]], self.nodes
        node = nodes[0].parent if nodes else None  # the first one hangs on the root
        while node is not None:
            node = node.children.get(tokens[-1])
            if node is None or node.row >= len(nodes) or nodes[node.row] is not node:  # it came during the step
                break
            accepted.append(node.row)
            if node.token in stop_ids:  # it ends the text, and nothing follows it
                return accepted, tuple(tokens)
            tokens.append(selected[1 + node.row])
        if len(accepted) < len(nodes):
            return accepted, tuple(tokens)
        for row, guessed in enumerate(self.guess, start=len(nodes)):
            if guessed != tokens[-1]:
                break
            accepted.append(row)
            if guessed in stop_ids:
                break
            tokens.append(selected[1 + row])
        return accepted, tuple(tokens)
