"""What every target engine must pass before it serves: the same tokens whatever the batch, the shape and the history.

The reference is the engine itself fed one row at a time: no packing, no tree and no rollback in that. Two rules:

- A token may differ from the reference's only where the reference logits of the two lie within `near_tie`: 0 in
  float32, so that they must be equal; elsewhere the rounding of the kernels, which changes with the batch's shape.
- The logits of a row may differ by a part of their spread only (root mean square over standard deviation). Tokens
  alone show too little: a tree mask that lets siblings see each other moves SmolLM2's logits by 0.3 to 1.2 and flips no
  token of this test. Measured on sound engines: 0.00001 in float32; in bfloat16 0 here, 0.17 after 300 tokens.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.core.messages import Sampling
from shared.core.selection import select
from shared.engine import EngineError, Rows, TargetEngine

_GREEDY = Sampling()
_SAMPLINGS = (
    _GREEDY,
    Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=7),
    Sampling(temperature=0.7, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25, seed=8),
    Sampling(repetition_penalty=1.1, frequency_penalty=-100.0),  # a reward: the context decides alone
)
_TREE = (-1, 0, 0, 1, 2, 2)  # two branches below row 0; row 4 and row 5 below row 2
_BRANCH = (0, 2, 5)  # a path of it that is not contiguous
_PROMPT_LEN = 3
_MAX_DISTANCE, _MAX_DISTANCE_EXACT = 0.3, 0.01
_PREFIX = "self-test-"

Logits = NDArray[np.float32]


class CheckableTarget(TargetEngine, Protocol):
    """A target engine that shows its logits."""

    @property
    def near_tie(self) -> float:
        """How far two logits may lie apart and still change places with the shape of the batch."""
        ...

    def logits(self, batch: Sequence[Rows]) -> list[Logits]:
        """As `forward`, but the logits (rows, vocabulary) that the tokens are selected from."""
        ...


def check_target(engine: CheckableTarget) -> None:
    """Raise `EngineError` where the engine breaks a promise of `TargetEngine`; releases the sessions that it used."""
    check = _Check(engine)
    try:
        check.packed_is_plain()
        if engine.capabilities.can_rollback:
            check.rollback_is_fresh()
        check.selection_is_the_reference()
    finally:
        for session in ("a", "b", "tree", "reference"):
            engine.release(_PREFIX + session)


class _Check:
    """The checks over made-up texts: any ids will do, since both sides of each comparison get the same."""

    def __init__(self, engine: CheckableTarget) -> None:
        self._engine = engine
        size = engine.fingerprint.size
        self._text = tuple((index * 7919 + index * index + 13) % size for index in range(24))
        self._has_tree = engine.capabilities.can_tree

    def packed_is_plain(self) -> None:
        """Two prompts of different lengths and a tree over a cached prefix, in one forward, against row by row."""
        text, tree = self._text, self._text[12:18]
        prefixes = [_rows("a", 0, text[:3]), _rows("tree", 0, text[:2])]
        batch = [_rows("a", 3, text[3:7]), _rows("b", 0, text[8:11])]
        batch.append(_rows("tree", 2, tree, _TREE) if self._has_tree else _rows("tree", 2, tree))
        self._engine.forward(prefixes)
        tokens = self._engine.forward(batch)
        for session in ("a", "b", "tree"):
            self._engine.release(_PREFIX + session)
        self._engine.forward(prefixes)
        logits = self._engine.logits(batch)
        if tokens != [tuple(part.argmax(axis=1)) for part in logits]:
            raise EngineError("self-test: a forward, repeated, gives other tokens or gives them to other sessions")
        self._compare("packed rows", logits[0], self._reference(text[:7])[3:])
        self._compare("packed rows", logits[1], self._reference(text[8:11]))
        if not self._has_tree:
            self._compare("packed rows", logits[2], self._reference(text[:2] + tree)[2:])
            return
        for leaf in ((0, 1, 3), (0, 2, 4), (0, 2, 5)):
            expected = self._reference(text[:2] + tuple(tree[row] for row in leaf))[2:]
            self._compare("a tree", logits[2][list(leaf)], expected)

    def rollback_is_fresh(self) -> None:
        """Rows after `truncate`, and after `keep` of a branch, against a session that never held the others."""
        text = self._text
        self._engine.truncate(_PREFIX + "a", 3)
        (after_cut,) = self._engine.logits([_rows("a", 3, text[18:20])])
        self._compare("a truncated session", after_cut, self._reference(text[:3] + text[18:20])[3:])
        kept = _BRANCH if self._has_tree else (0, 1, 2)
        self._engine.keep(_PREFIX + "tree", 2, kept)
        (after_keep,) = self._engine.logits([_rows("tree", 5, text[18:20])])
        prefix = text[:2] + tuple(text[12 + row] for row in kept)
        self._compare("a session that kept some rows", after_keep, self._reference(prefix + text[18:20])[5:])

    def selection_is_the_reference(self) -> None:
        """The engine's own selection against `select` on the logits of the very same forward, repeated."""
        text = tuple(self._text[index] for index in (0, 1, 0, 2, 1, 1))
        self._engine.release(_PREFIX + "reference")
        (logits,) = self._engine.logits([_rows("reference", 0, text)])
        for sampling in _SAMPLINGS:
            self._engine.release(_PREFIX + "reference")
            (tokens,) = self._engine.forward([_rows("reference", 0, text, sampling=sampling)])
            positions = range(1, len(text) + 1)
            expected = [select(logits[n - 1], sampling, n, text[:n], _PROMPT_LEN) for n in positions]
            if list(tokens) != expected:
                raise EngineError(
                    f"self-test: with {sampling} the engine selects {list(tokens)}, the reference {expected};"
                    " do not use this engine here"
                )

    def _reference(self, tokens: Sequence[int]) -> list[Logits]:
        """Logits (vocabulary,) after each token, evaluated alone and one by one."""
        self._engine.release(_PREFIX + "reference")
        return [self._engine.logits([_rows("reference", n, [token])])[0][0] for n, token in enumerate(tokens)]

    def _compare(self, what: str, logits: Logits, reference: Sequence[Logits]) -> None:
        """Hold rows of logits, (rows, vocabulary), against the reference by the two rules above."""
        limit = _MAX_DISTANCE if self._engine.near_tie else _MAX_DISTANCE_EXACT
        for row, (packed, alone) in enumerate(zip(logits, reference, strict=True)):
            token, expected = int(packed.argmax()), int(alone.argmax())
            margin = float(alone[expected] - alone[token])
            distance = float(np.sqrt(np.mean((packed - alone) ** 2)) / alone.std())
            if margin > self._engine.near_tie or not distance <= limit:
                raise EngineError(
                    f"self-test: row {row} of {what} selects token {token}, alone it selects {expected} (margin"
                    f" {margin:.3g}, distance of the logits {distance:.3g}); this engine would change the text:"
                    " try dtype float32, device cpu or another model"
                )


def _rows(
    session: str, start: int, tokens: Sequence[int], parents: Sequence[int] | None = None, sampling: Sampling = _GREEDY
) -> Rows:
    return Rows(
        session_id=_PREFIX + session,
        start=start,
        tokens=tuple(tokens),
        parents=tuple(range(-1, len(tokens) - 1)) if parents is None else tuple(parents),
        first_selected=0,
        sampling=sampling,
        prompt_len=_PROMPT_LEN,
    )
