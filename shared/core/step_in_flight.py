"""One session's part of a step between its start and its end: what was fed, and what the selected tokens say of it."""

from dataclasses import dataclass

from shared.core.draft_tree import Node


@dataclass(slots=True)
class StepInFlight:
    """A step in flight: it feeds `fed` committed tokens, then the nodes; `partial`: a prefill chunk, no nodes.

    `is_recycled`: the nodes are no drafts, but the verifier's own guess.
    """

    fed: int
    nodes: list[Node]
    is_recycled: bool
    partial: bool
    queue_ms: float

    def judge(self, selected: tuple[int, ...], stop_ids: frozenset[int]) -> tuple[list[int], tuple[int, ...]]:
        """Indices of the accepted nodes, and the tokens that the step commits (up to a stop token)."""
        accepted: list[int] = []
        tokens, nodes = [selected[0]], self.nodes
        node = nodes[0].parent if nodes else None  # the first one hangs on the root
        while node is not None:
            node = node.children.get(tokens[-1])
            if node is None or node.row >= len(nodes) or nodes[node.row] is not node:  # it came during the step
                break
            accepted.append(node.row)
            if node.token in stop_ids:  # it ends the text, and nothing follows it
                break
            tokens.append(selected[1 + node.row])
        return accepted, tuple(tokens)
