"""Pending drafts of one session on the verifier: a token tree whose root is the end of the committed tokens.

A draft names the prefix that it extends by hash, so it is grafted only where that prefix really stands: on the
committed tokens or on a pending node. Anything else is stale and dropped. Grafting the same draft twice changes
nothing. A commit moves the root along the committed tokens: what hangs below the new root still stands, the rest is
pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate
from operator import mul

from shared.core.acceptance import Calibration
from shared.core.messages import Draft
from shared.core.tokens import TokenLog, next_hash


@dataclass(slots=True, eq=False)
class Node:
    """One pending draft token. `confidence` is the draft's own probability of it, as a byte.

    `row` is the owner's: the place of the node among those that it takes into a step, -1 for the root.
    """

    token: int
    position: int
    prefix_hash: int
    confidence: int
    parent: Node | None = None
    children: dict[int, Node] = field(default_factory=dict)
    row: int = -1


@dataclass(frozen=True, slots=True)
class Grafted:
    """What became of a draft's tokens: new nodes, and tokens dropped as stale or over the limit.

    Those before the dropped ones stand. `differs`: the first stale one is another than the committed token there.
    """

    added: int
    stale: int
    overflow: int
    differs: bool = False


@dataclass(frozen=True, slots=True)
class Judged:
    """What a commit said about pending drafts: the confidences of those that matched, and of the one that did not.

    Among siblings that all did not match, `failed` names the surest; it is empty where nothing was pending.
    """

    matched: bytes
    failed: bytes


class DraftTree:
    """At most `limit` pending tokens on top of a committed `TokenLog` that the owner keeps."""

    def __init__(self, log: TokenLog, limit: int) -> None:
        self.limit = limit
        self._log = log
        self._nodes: dict[int, Node] = {}  # by prefix hash; the root is not among them
        self._root = Node(-1, len(log) - 1, log.hash_at(len(log)), 255)
        self._chain: list[Node] | None = []  # the nodes from the root on where none has a sibling, as mostly; else None
        self._ranges = bytearray()  # of confidence, of the chain's nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        depth = max((node.position for node in self._nodes.values()), default=self._root.position) - self._root.position
        return f"<DraftTree {len(self)} pending, depth {depth}>"

    def graft(self, draft: Draft) -> Grafted:
        """Apply a draft where its prefix stands."""
        tokens = draft.tokens
        committed = max(len(self._log) - draft.start, 0)
        if committed:
            stands = self._log.has_prefix(draft.start, draft.parent_hash)
            common = self._log.match(draft.start, tokens) if stands else 0
            if common < min(committed, len(tokens)):
                return Grafted(0, len(tokens) - common, 0, differs=stands)
            parent: Node | None = self._root
        elif draft.parent_hash == self._root.prefix_hash:
            parent = self._root
        else:
            parent = self._nodes.get(draft.parent_hash)
        if parent is None or (not committed and parent.position + 1 != draft.start):
            return Grafted(0, len(tokens), 0)
        return self._attach(parent, tokens, draft.confidence, min(committed, len(tokens)))

    def advance(self, tokens: Sequence[int]) -> Judged:
        """Re-root along tokens that were just committed (and appended to the log)."""
        matched, node, has_siblings = bytearray(), self._root, False
        for token in tokens:
            child = node.children.get(token)
            if child is None:
                siblings = [sibling.confidence for sibling in node.children.values()]
                self._nodes.clear()
                self._chain, self._ranges = [], bytearray()
                self._root = Node(-1, len(self._log) - 1, self._log.hash_at(len(self._log)), 255)
                return Judged(bytes(matched), bytes((max(siblings),)) if siblings else b"")
            matched.append(child.confidence)
            has_siblings |= len(node.children) > 1
            node = child
            del self._nodes[node.prefix_hash]
        self._root, node.parent, node.row = node, None, -1
        if has_siblings:
            self._prune()
        elif self._chain is not None:
            del self._chain[: len(tokens)], self._ranges[: len(tokens)]
        return Judged(bytes(matched), b"")

    def best(self, count: int, last_position: int, table: Sequence[float]) -> tuple[list[Node], list[float]]:
        """The `count` nodes up to a position that are likeliest to be accepted, likeliest first, and how likely.

        A node is as likely as its parent times what `table` (see `Calibration`) says of its own confidence, so a parent
        comes before its children: DySpec's greedy tree, grown under a budget of nodes.
        """
        if not self._nodes:
            return [], []
        if self._chain is not None:
            nodes = self._chain[: max(min(count, last_position - self._root.position), 0)]
            return nodes, list(accumulate(map(table.__getitem__, self._ranges[: len(nodes)]), mul))
        nodes, worth = [], []
        frontier: list[tuple[float, int, Node]] = []  # a heap; the serial number breaks ties by age
        node, path_worth, serial = self._root, 1.0, 0
        while len(nodes) < count:
            if node.position < last_position:
                for child in node.children.values():
                    serial += 1
                    heappush(frontier, (-path_worth * table[child.confidence >> Calibration.RANGE_BITS], serial, child))
            if not frontier:
                break
            lost, _, node = heappop(frontier)
            path_worth = -lost
            nodes.append(node)
            worth.append(path_worth)
        return nodes, worth

    def _attach(self, parent: Node, tokens: Sequence[int], confidence: bytes, begin: int) -> Grafted:
        """Hang `tokens` from index `begin` on; the ones before are committed."""
        added = 0
        for index in range(begin, len(tokens)):
            token = tokens[index]
            child = parent.children.get(token)
            if child is None:
                if len(self._nodes) >= self.limit:
                    return Grafted(added, 0, len(tokens) - index)
                prefix_hash = next_hash(parent.prefix_hash, token)
                sure = confidence[index] if confidence else 255
                child = Node(token, parent.position + 1, prefix_hash, sure, parent)
                parent.children[token] = self._nodes[prefix_hash] = child
                self._lengthen_chain(parent, child)
                added += 1
            parent = child
        return Grafted(added, 0, 0)

    def _lengthen_chain(self, parent: Node, child: Node) -> None:
        chain = self._chain
        if chain is not None and parent is (chain[-1] if chain else self._root):
            chain.append(child)
            self._ranges.append(child.confidence >> Calibration.RANGE_BITS)
        else:
            self._chain = None

    def _prune(self) -> None:
        """Forget what does not hang on the root, and see whether the rest is a chain."""
        self._nodes = {}
        self._chain, self._ranges = [], bytearray()
        waiting = list(self._root.children.values())
        while waiting:
            node = waiting.pop()
            self._nodes[node.prefix_hash] = node
            assert node.parent is not None, "only the root hangs on nothing"
            self._lengthen_chain(node.parent, node)
            waiting.extend(node.children.values())
