"""The load-time self-test of a draft engine: its cache must never be out of step with its token list.

A cache left in place after a rollback raises nothing: proposals only get worse, and the acceptance rate decays. So what
an engine proposes after a history of rollbacks must be what it proposes on the same tokens from an empty cache.

Quantized kernels give slightly other logits for other batch shapes, so a near-tie may flip a token on a sound engine.
Hence tokens and confidence are compared on random tokens, where a wrong context changes both by far more than rounding
does, and one history fails only if it disagrees on the first draw and on two of the next four. (A sound ONNX model in
4 bits agrees on 9 of 10 draws, one with a stale token on 1 of 10.)
"""

import math
from collections.abc import Callable

from shared.core.messages import Sampling
from shared.core.noise import uniform
from shared.engine import DraftEngine, EngineError, Proposal

# Noise by position: an engine that is off by one in its positions selects other tokens.
_SAMPLING = Sampling(temperature=1.0, seed=20_240_817)
_PROMPT_TOKENS = 6
_PROPOSED_TOKENS = 2
_TOLERANCE = 0.25  # in the log odds of a confidence; one stale token in a cache moves them by 0.1 to 1

_History = Callable[[DraftEngine, list[int], list[int]], list[int]]
"""Drives the engine over a prompt and some other tokens; returns the tokens that must stand in it then."""


def check_draft(engine: DraftEngine) -> None:
    """Raise `EngineError` if the engine's proposals depend on how it came to its tokens.

    Evaluates some sixty tokens; `reset` the engine before any other use. Rollbacks are tried only where the engine says
    that it has them.
    """
    histories = _WITHOUT_ROLLBACK | (_WITH_ROLLBACK if engine.capabilities.can_rollback else {})
    for name, history in histories.items():
        # Sound at the first draw is sound; else more are needed.
        if not _agrees(engine, history, 0) and sum(_agrees(engine, history, draw) for draw in range(1, 5)) < 3:
            raise EngineError(
                f"draft engine self-test: after {name} it proposes other tokens than on a fresh cache; "
                "its cache is out of step, do not use it"
            )


def _agrees(engine: DraftEngine, history: _History, draw: int) -> bool:
    size = engine.fingerprint.size
    tokens = [int(uniform(draw, index) * size) for index in range(2 * _PROMPT_TOKENS)]
    standing = history(engine, tokens[:_PROMPT_TOKENS], tokens[_PROMPT_TOKENS:])
    proposed = engine.propose(_PROPOSED_TOKENS)
    engine.reset([(standing[0] + 1) % size], _SAMPLING, 1)  # shares no prefix, so the cache is empty after it
    engine.reset(standing, _SAMPLING, _PROMPT_TOKENS)
    return _alike(proposed, engine.propose(_PROPOSED_TOKENS))


def _alike(one: Proposal, other: Proposal) -> bool:
    odds = zip(map(_log_odds, one.confidence), map(_log_odds, other.confidence), strict=False)
    return one.tokens == other.tokens and all(abs(ours - theirs) <= _TOLERANCE for ours, theirs in odds)


def _log_odds(confidence: float) -> float:
    inside = min(max(confidence, 1e-6), 1 - 1e-6)
    return math.log(inside / (1 - inside))


def _in_pieces(engine: DraftEngine, prompt: list[int], other: list[int]) -> list[int]:
    engine.reset(prompt[:1], _SAMPLING, _PROMPT_TOKENS)
    first = engine.propose(1).tokens
    for token in prompt[1:]:
        engine.extend([token])
    then = engine.propose(2).tokens
    engine.extend(other)
    return [prompt[0], *first, *prompt[1:], *then, *other]


def _kept_prefix(engine: DraftEngine, prompt: list[int], other: list[int]) -> list[int]:
    engine.reset(prompt, _SAMPLING, _PROMPT_TOKENS)
    engine.propose(2)
    standing = [*prompt[:-2], *other]
    engine.reset(standing, _SAMPLING, _PROMPT_TOKENS)
    return standing


def _rollbacks(engine: DraftEngine, prompt: list[int], other: list[int]) -> list[int]:
    engine.reset(prompt, _SAMPLING, _PROMPT_TOKENS)
    engine.propose(2)
    standing = prompt[:-2]
    engine.rollback(len(standing))  # into the prompt
    engine.extend(other[:2])
    standing += [*other[:2], *engine.propose(3).tokens[:1]]
    engine.rollback(len(standing))  # a rejected draft and its correction
    engine.extend(other[2:3])
    standing += [*other[2:3], *engine.propose(2).tokens[:1]]
    engine.rollback(len(standing))  # on to the next proposal with nothing new
    return standing


_WITHOUT_ROLLBACK: dict[str, _History] = {
    "extending in pieces": _in_pieces,
    "a reset that keeps a prefix": _kept_prefix,
}
_WITH_ROLLBACK: dict[str, _History] = {"rollbacks": _rollbacks}
