"""Pending drafts of one session on the verifier: a token tree whose root is the end of the committed tokens.

A draft names the prefix that it extends by hash, so it is grafted only where that prefix really stands: on the
committed tokens or on a pending node. Anything else is stale and dropped. Grafting the same draft twice changes
nothing. A commit moves the root along the committed tokens: what hangs below the new root still stands, the rest is
pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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

    def __add__(self, branch: Grafted) -> Grafted:
        """What became of both; whether a branch differs from the committed tokens says nothing."""
        added, stale, overflow = self.added + branch.added, self.stale + branch.stale, self.overflow + branch.overflow
        return Grafted(added, stale, overflow, self.differs)


@dataclass(frozen=True, slots=True)
class Judged:
    """What a commit said about pending drafts: the confidences of those that matched, and of those that did not.

    The first child of a node is judged apart from its siblings, of which each is asked only once those before it were
    wrong. `failed` is empty exactly where the text went along first children, as far as anything was pending.
    """

    matched: bytes
    failed: bytes
    sibling_matched: bytes = b""
    sibling_failed: bytes = b""


def chains(draft: Draft) -> list[Draft]:
    """The draft in pieces without branches; each hangs on the named prefix or on a piece before it."""
    if not draft.parents:
        return [draft]
    split = len(draft.tokens) - len(draft.parents)
    parents = (*range(-1, split - 1), *draft.parents)
    behind = [(draft.start, draft.parent_hash)]  # position and prefix hash of what hangs on the prefix, on each token
    for parent, token in zip(parents, draft.tokens, strict=True):
        position, prefix_hash = behind[parent + 1]
        behind.append((position + 1, next_hash(prefix_hash, token)))
    pieces = [replace(draft, tokens=draft.tokens[:split], confidence=draft.confidence[:split], parents=())]
    for index in range(split, len(parents)):
        start, parent_hash = behind[parents[index] + 1]
        confidence = draft.confidence[index : index + 1]
        pieces.append(Draft(start, parent_hash, draft.tokens[index : index + 1], confidence))
    return pieces if split else pieces[1:]


def detached(position: int, tokens: Sequence[int]) -> list[Node]:
    """A chain of nodes behind the token at `position`, part of no tree."""
    nodes, parent = list[Node](), Node(-1, position, 0, 255)
    for token in tokens:
        child = Node(token, parent.position + 1, 0, 255, parent)
        parent.children[token] = child
        nodes.append(child)
        parent = child
    return nodes


def hash_behind(prefix_hash: int, tokens: Sequence[int]) -> int:
    """The hash of a prefix and these tokens behind it."""
    for token in tokens:
        prefix_hash = next_hash(prefix_hash, token)
    return prefix_hash


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

    @property
    def path_len(self) -> int:
        """How far the pending drafts go along first children: the edge's own path."""
        return len(self._chain if self._chain is not None else self._first_children())

    @property
    def last_token(self) -> int | None:
        """What that path ends with; None: nothing is pending."""
        path = self._chain if self._chain is not None else self._first_children()
        return path[-1].token if path else None

    def rejected(self, tokens: Sequence[int]) -> Sequence[Node]:
        """The edge's own path from where it differs from tokens that are about to be committed; empty: nowhere."""
        path = self._chain if self._chain is not None else self._first_children()
        for index, (node, token) in enumerate(zip(path, tokens, strict=False)):
            if node.token != token:
                return path[index:]
        return ()

    def graft(self, draft: Draft) -> Grafted:
        """Apply a draft without branches (see `chains`) where its prefix stands."""
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
        matched, failed, sibling_matched, sibling_failed = bytearray(), bytearray(), bytearray(), bytearray()
        node, has_siblings = self._root, False
        for token in tokens:
            child = node.children.get(token)
            if child is not None and len(node.children) == 1:
                matched.append(child.confidence)
            else:
                has_siblings = True
                right, wrong = matched, failed
                for sibling in node.children.values():
                    if sibling is child:
                        right.append(sibling.confidence)
                        break
                    wrong.append(sibling.confidence)
                    right, wrong = sibling_matched, sibling_failed
            if child is None:
                self._nodes.clear()
                self._chain, self._ranges = [], bytearray()
                self._root = Node(-1, len(self._log) - 1, self._log.hash_at(len(self._log)), 255)
                return Judged(bytes(matched), bytes(failed), bytes(sibling_matched), bytes(sibling_failed))
            node = child
            del self._nodes[node.prefix_hash]
        self._root, node.parent, node.row = node, None, -1
        if has_siblings:
            self._prune()
        elif self._chain is not None:
            del self._chain[: len(tokens)], self._ranges[: len(tokens)]
        return Judged(bytes(matched), bytes(failed), bytes(sibling_matched), bytes(sibling_failed))

    def best(
        self, count: int, last_position: int, table: Sequence[float], sibling_table: Sequence[float]
    ) -> tuple[list[Node], list[float]]:
        """The `count` nodes up to a position that are likeliest to be accepted, likeliest first, and how likely.

        A first child is as likely as its parent times what `table` (see `Calibration`) says of its own confidence. A
        sibling has what those before it leave over, times what `sibling_table` says. So a parent comes before its
        children: DySpec's greedy tree (arXiv 2410.11744), grown under a budget of nodes.
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
                left, chances = path_worth, table
                for child in node.children.values():
                    serial += 1
                    its_worth = left * chances[child.confidence >> Calibration.RANGE_BITS]
                    heappush(frontier, (-its_worth, serial, child))
                    left, chances = left - its_worth, sibling_table
            if not frontier:
                break
            lost, _, node = heappop(frontier)
            path_worth = -lost
            nodes.append(node)
            worth.append(path_worth)
        return nodes, worth

    def _first_children(self) -> list[Node]:
        path, node = list[Node](), self._root
        while node.children:
            node = next(iter(node.children.values()))
            path.append(node)
        return path

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
