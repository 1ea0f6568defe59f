"""The target rule: which token follows, given the logits, the sampling setting and the position. The reference.

`select` is penalties, temperature, top-k, top-p, min-p, then `argmax(log_prob + gumbel)` over the ids that survive. By
the Gumbel-max trick (Gumbel 1954; Maddison, Tarlow and Minka 2014) that is an exact sample of the filtered law.
The noise depends on (seed, position, id) alone, so a draft model that selects with the same rule meets the target's
token with probability at least (1 - TV) / (1 + TV), TV the total variation distance of the two (Daliri, Musco and
Ramesh, arXiv 2408.07978), and verification is token equality at any temperature.

Everything is float64 from float32 logits, and every tie goes to the lower id, so equal logits give equal tokens on
both sides. Speed matters (once per draft token on a phone, vocabularies to 150k), so nothing sorts a whole vocabulary
unless the distribution is nearly flat.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shared.core.errors import LocalProtocolError
from shared.core.messages import Sampling
from shared.core.noise import gumbel

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]
Scores = NDArray[np.float64]

_BLOCK = 64  # values a block when top-k looks for a floor
_SHORTLIST = 16  # the best id by 8 bits was among the first 11 by 4, in 2,391 tokens; the fourth, 4 in 1,000 times not
_LEAST_LOG_RATIO = math.log(1e-6)
_LEAST_LOGIT = float(np.finfo(np.float32).min)


def select(logits: Logits, sampling: Sampling, position: int, context: Sequence[int] = (), prompt_len: int = 0) -> int:
    """The token at `position`, from the logits (V,) computed on the tokens before it.

    `context` is those tokens and `prompt_len` how many of them are the prompt; both are read only where
    `sampling.has_penalties`. A logit of -inf forbids its id. Raises `LocalProtocolError` for NaN, +inf, or no id left.
    """
    return int(candidates(logits, sampling, position, 1, context, prompt_len)[0])


def candidates(
    logits: Logits, sampling: Sampling, position: int, count: int, context: Sequence[int] = (), prompt_len: int = 0
) -> Ids:
    """Up to `count` ids, best first: what `select` takes, then what it would take if that were not among the survivors.

    These are the largest `log_prob + gumbel`, a sample without replacement (Gumbel top-k: Kool, van Hoof and Welling,
    arXiv 1903.06059). Arguments and errors are those of `select`.
    """
    penalised = _penalised(logits, sampling, context, prompt_len)
    return _best(penalised, sampling, position, count, -math.inf)


def draft_candidates(
    logits: Logits,
    sampling: Sampling,
    position: int,
    count: int,
    context: Sequence[int] = (),
    prompt_len: int = 0,
    exact: Callable[[Ids], Logits] | None = None,
) -> Ids:
    """`candidates` for drafts, which may err: above temperature 0 from ids at least a millionth as likely as the best.

    Noise for all ids of a large vocabulary takes a tenth of a small model's token, and the target's choice is outside
    once in 3,000 tokens (SmolLM2-135M at temperature 0.8). The target's own law is exact. Where the logits are rough,
    `exact` gives better ones of some ids: they decide among a shortlist by the rough ones, and then stand in `logits`.
    """
    penalised = _penalised(logits, sampling, context, prompt_len)
    floor = sampling.temperature * _LEAST_LOG_RATIO
    if exact is None:
        return _best(penalised, sampling, position, count, floor)
    ids = _best(penalised, sampling, position, _SHORTLIST, floor)
    better = exact(ids)
    scores = better.astype(np.float64)
    if penalised is not logits:
        scores += penalised[ids] - logits[ids]
    logits[ids] = better
    if sampling.temperature > 0:
        with np.errstate(over="ignore"):  # as in `_survivors`
            scores = (scores - scores.max()) / sampling.temperature
        scores += gumbel(sampling.seed, position, ids)
    return ids[np.argsort(-scores, kind="stable")[:count]]


def filtered_distribution(
    logits: Logits, sampling: Sampling, context: Sequence[int] = (), prompt_len: int = 0
) -> tuple[Ids, Scores]:
    """The exact law that `select` samples: surviving ids (ascending) and their log probabilities, both (n,).

    At temperature 0 that is one id. Arguments and errors are those of `select`.
    """
    if sampling.temperature == 0:
        return np.array([select(logits, sampling, 0, context, prompt_len)], dtype=np.int64), np.zeros(1)
    ids, scores = _survivors(_penalised(logits, sampling, context, prompt_len), sampling)
    return ids, scores - math.log(float(np.exp(scores).sum()))


def confidences(logits: Logits, tokens: Sequence[int] | Ids) -> list[float]:
    """Probability of each of these tokens, given that it is none of those before it.

    Under the plain softmax of the logits (V,): a draft's confidence in what it proposes and in each sibling of that.
    Raises as `select`.
    """
    peak = _peak(logits)
    left = float(np.exp(logits - peak).sum(dtype=np.float64))
    given = []
    for weight in np.exp(np.asarray(logits[tokens], dtype=np.float64) - peak):
        given.append(float(weight) / left if left > weight else 1.0)
        left -= float(weight)
    return given


def _best(penalised: Logits | Scores, sampling: Sampling, position: int, count: int, least_log_ratio: float) -> Ids:
    """See `candidates`; above temperature 0 from ids whose logits are no further below the best one's."""
    if sampling.temperature == 0:
        _peak(penalised)
        best = _largest(penalised, count)
        return best if count == 1 else best[penalised[best] > -np.inf]
    ids, scores = _survivors(penalised, sampling, least_log_ratio)
    if len(ids) > 1:
        # The normaliser is left out: it is the same for every id.
        scores += gumbel(sampling.seed, position, ids)
    return ids[_largest(scores, count)]


def _survivors(
    penalised: Logits | Scores, sampling: Sampling, least_log_ratio: float = -math.inf
) -> tuple[Ids, Scores]:
    """Ids that pass the filters, ascending, and their scores: log probability at this temperature, up to a constant."""
    peak = _peak(penalised)
    ids, kept = _allowed(penalised, peak + least_log_ratio)
    if 0 < sampling.top_k < len(ids):
        best = _top_k(kept, sampling.top_k)
        ids, kept = ids[best], kept[best]
    scores = np.subtract(kept, peak, dtype=np.float64)
    with np.errstate(over="ignore"):  # at a tiny temperature the others sink to -inf: right, for the best stays at 0
        scores /= sampling.temperature
    if sampling.top_p < 1:
        nucleus = _top_p(scores, sampling.top_p)
        ids, scores = ids[nucleus], scores[nucleus]
    if sampling.min_p > 0:
        likely = scores >= math.log(sampling.min_p)  # relative to the best id, whose score is 0
        ids, scores = ids[likely], scores[likely]
    return ids, scores


def _penalised(logits: Logits, sampling: Sampling, context: Sequence[int], prompt_len: int) -> Logits | Scores:
    """Logits after the penalties, by vLLM's rules: repetition reads prompt and text, the other two only the text."""
    if not sampling.has_penalties:
        return logits
    penalised = logits.astype(np.float64)
    if sampling.repetition_penalty != 1:
        seen = np.unique(np.asarray(context, dtype=np.int64))
        values = penalised[seen]
        penalised[seen] = np.where(
            values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
        )
    generated, counts = np.unique(np.asarray(context[prompt_len:], dtype=np.int64), return_counts=True)
    penalised[generated] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return penalised


def _peak(logits: Logits | Scores) -> float:
    peak = float(logits.max())  # NaN if any is
    if not math.isfinite(peak):
        raise LocalProtocolError(f"logits cannot be selected from: the largest of {len(logits)} is {peak}")
    return peak


def _allowed(logits: Logits | Scores, floor: float) -> tuple[Ids, Logits | Scores]:
    """Ids that are neither forbidden nor below the floor, ascending, and their logits."""
    is_allowed = logits > -np.inf if floor == -math.inf else logits >= logits.dtype.type(max(floor, _LEAST_LOGIT))
    if is_allowed.all():
        return np.arange(len(logits)), logits
    ids = np.flatnonzero(is_allowed)
    return ids, logits[ids]


def _largest(values: Logits | Scores, count: int) -> Ids:
    """Indices of the `count` largest values, the largest first; the first of equals."""
    if count == 1:
        return np.array([values.argmax()])
    largest = _top_k(values, count) if count < len(values) else np.arange(len(values))
    return largest[np.argsort(-values[largest], kind="stable")]


def _top_k(values: Logits | Scores, k: int) -> Ids:
    """Indices of the k largest, ascending; the first of equals. k is below the number of values."""
    floor = -np.inf
    if k < len(values) // _BLOCK:
        # Each of the k best blocks holds a value of at least the k-th best maximum, so nothing below that is among the
        # k largest; partition the few that remain.
        maxima = values[: len(values) // _BLOCK * _BLOCK].reshape(_BLOCK, -1).max(axis=0)
        floor = np.partition(maxima, len(maxima) - k)[len(maxima) - k]
    candidates = np.flatnonzero(values >= floor)
    best = values[candidates]
    kth = np.partition(best, len(best) - k)[len(best) - k]
    above, equal = candidates[best > kth], candidates[best == kth]
    return np.sort(np.concatenate((above, equal[: k - len(above)])))


def _top_p(scores: Scores, top_p: float) -> Ids:
    """Indices, ascending, of the smallest set whose probability reaches `top_p`: the best ones, the first of equals."""
    weights = np.exp(scores)
    total = float(weights.sum())
    for floor in (total / 2**10, total / 2**18):  # only what is above the floor is sorted, if that reaches `top_p`
        candidates = np.flatnonzero(weights >= floor)
        if float(weights[candidates].sum()) >= top_p * total:
            break
    else:
        candidates = np.arange(len(scores))
    order = candidates[np.argsort(-scores[candidates], kind="stable")]
    size = int(np.searchsorted(np.cumsum(weights[order]), top_p * total)) + 1
    return np.sort(order[:size])
