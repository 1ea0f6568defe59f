"""Block accounting of a key/value cache that many sessions share: who holds which blocks, and how many are free.

A block is `BLOCK_TOKENS` tokens. A session has a list of blocks; its tokens fill them in order. A block may be held by
several sessions, which is how equal prefixes are kept once. Only whole blocks are shared and a session grows by new
blocks of its own only, so nothing is ever written into a shared block and none is ever copied; where a session is cut
inside of a shared block, it gives up the whole block (`cut`).

Placement: a session grows into the block right behind its last one where that is free, so that its tokens mostly lie
in one run, which an engine can use as a plain view. A new run begins in the middle of the largest free gap, which
leaves its neighbour and itself room to grow; sooner where what is wanted now would not fit behind the middle; and the
very first at block 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shared.core.errors import LocalProtocolError

BLOCK_TOKENS = 16


@dataclass(slots=True)
class _Table:
    length: int = 0  # tokens
    blocks: list[int] = field(default_factory=list)


class KvBlocks:
    """The blocks of all sessions. Pure and deterministic: the same calls give the same blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._holders = np.zeros(num_blocks, dtype=np.int32)  # sessions that hold each block
        self._tables: dict[str, _Table] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def __contains__(self, key: object) -> bool:
        return key in self._tables

    def __repr__(self) -> str:
        return f"<KvBlocks {self.num_free} of {self.num_blocks} free, {len(self)} sessions>"

    def length(self, key: str) -> int:
        """Tokens of a session; 0 where it is unknown."""
        table = self._tables.get(key)
        return 0 if table is None else table.length

    def blocks(self, key: str) -> Sequence[int]:
        """A session's blocks in the order of its tokens; not to be changed, valid until the next call that changes."""
        table = self._tables.get(key)
        return () if table is None else table.blocks

    def resize(self, key: str, length: int) -> bool:
        """Grow or cut a session to `length` tokens; an unknown one is created. False: too few blocks, nothing changed.

        Raises `LocalProtocolError` for a cut inside of a shared block: that is what `cut` is for.
        """
        table = self._tables.get(key)
        if table is None:
            table = _Table()
        if length < table.length:
            if self.cut(key, length) != length:
                raise LocalProtocolError(f"{key}: cut to {length} tokens, inside of a shared block")
            return True
        missing = num_blocks(length) - len(table.blocks)
        if missing > self.num_free:
            return False
        for wanted in range(missing, 0, -1):
            self._append_block(table.blocks, wanted)
        table.length = length
        self._tables[key] = table
        return True

    def cut(self, key: str, length: int) -> int:
        """Cut a session to at most `length` tokens and return how many it has then.

        They are fewer where the cut falls inside of a block that others hold too: that block is given up. Raises
        `LocalProtocolError` for more tokens than there are.
        """
        table = self._tables.get(key)
        if table is None or not 0 <= length <= table.length:
            raise LocalProtocolError(f"{key}: cut to {length} of {self.length(key)} tokens")
        if length == table.length:
            return length
        whole, rest = divmod(length, BLOCK_TOKENS)
        if rest and self._holders[table.blocks[whole]] > 1:
            length, rest = whole * BLOCK_TOKENS, 0
        self._give_up(table.blocks, whole + (rest > 0))
        table.length = length
        return length

    def share(self, key: str, source: str, length: int) -> int:
        """Let a new session begin with the whole blocks of the source's first `length` tokens; returns how many tokens.

        Raises `LocalProtocolError` where the session exists or the source has fewer tokens.
        """
        if key in self._tables or length > self.length(source):
            raise LocalProtocolError(f"{key}: cannot share {length} of {self.length(source)} tokens of {source}")
        shared = list(self.blocks(source)[: length // BLOCK_TOKENS])
        self._holders[shared] += 1
        self._tables[key] = _Table(len(shared) * BLOCK_TOKENS, shared)
        return len(shared) * BLOCK_TOKENS

    def release(self, key: str) -> None:
        """Forget a session; unknown ones are ignored."""
        table = self._tables.pop(key, None)
        if table is not None:
            self._give_up(table.blocks, 0)

    def check_integrity(self) -> None:
        """Raise `LocalProtocolError` where tables, holders and the free count do not agree."""
        holders = np.zeros_like(self._holders)
        for key, table in self._tables.items():
            if len(table.blocks) != num_blocks(table.length):
                raise LocalProtocolError(f"{key}: {table.length} tokens in {len(table.blocks)} blocks")
            if len(set(table.blocks)) != len(table.blocks):
                raise LocalProtocolError(f"{key}: a block twice in {table.blocks}")
            holders[table.blocks] += 1
        for key, table in self._tables.items():
            if table.length % BLOCK_TOKENS and holders[table.blocks[-1]] > 1:
                raise LocalProtocolError(f"{key}: would write into block {table.blocks[-1]}, which others hold")
        if (holders != self._holders).any():
            block = int(np.flatnonzero(holders != self._holders)[0])
            raise LocalProtocolError(f"block {block}: {self._holders[block]} holders on record, {holders[block]} found")
        num_free = int(np.count_nonzero(holders == 0))
        if num_free != self.num_free:
            raise LocalProtocolError(f"{self.num_free} free blocks on record, {num_free} found")

    def _append_block(self, blocks: list[int], wanted: int) -> None:
        block = blocks[-1] + 1 if blocks else self.num_blocks
        if block >= self.num_blocks or self._holders[block]:
            block = self._new_run(wanted)
        self._holders[block] = 1
        self.num_free -= 1
        blocks.append(block)

    def _new_run(self, wanted: int) -> int:
        """Where a run of `wanted` blocks or more begins; at least one block is free."""
        edges = np.flatnonzero(np.diff(self._holders == 0, prepend=False, append=False))  # start, end, start, end, ...
        starts, sizes = edges[::2], edges[1::2] - edges[::2]
        largest = int(sizes.argmax())
        start, size = int(starts[largest]), int(sizes[largest])
        return start if size == self.num_blocks else start + min(size // 2, max(size - wanted, 0))

    def _give_up(self, blocks: list[int], keep: int) -> None:
        """Drop the blocks of a table behind the first `keep`."""
        dropped = blocks[keep:]
        if dropped:
            del blocks[keep:]
            self._holders[dropped] -= 1
            self.num_free += int(np.count_nonzero(self._holders[dropped] == 0))


def num_blocks(length: int) -> int:
    """Blocks that so many tokens take."""
    return -(-length // BLOCK_TOKENS)
