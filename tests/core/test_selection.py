import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.errors import LocalProtocolError
from shared.core.messages import Sampling
from shared.core.noise import gumbel
from shared.core.selection import (
    Ids,
    Logits,
    candidates,
    confidences,
    draft_candidates,
    filtered_distribution,
    select,
)


def naive_distribution(logits: Logits, sampling: Sampling, context: Sequence[int], prompt_len: int) -> dict[int, float]:
    """The rule in plain Python, one id at a time: probability of each surviving id."""
    scores = {token: float(logit) for token, logit in enumerate(logits)}
    for token in set(context):
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    generated = list(context[prompt_len:])
    for token in set(generated):
        scores[token] -= sampling.frequency_penalty * generated.count(token) + sampling.presence_penalty
    ranked = sorted((token for token in scores if scores[token] > -math.inf), key=lambda token: (-scores[token], token))
    if sampling.temperature == 0:
        return {ranked[0]: 1.0}
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    peak = scores[ranked[0]]
    weights = {token: math.exp((scores[token] - peak) / sampling.temperature) for token in ranked}
    total, reached, nucleus = math.fsum(weights.values()), 0.0, []
    for token in ranked:
        nucleus.append(token)
        reached += weights[token]
        if sampling.top_p < 1 and reached >= sampling.top_p * total * (1 - 1e-12):
            break
    kept = {token: weights[token] for token in nucleus if weights[token] >= sampling.min_p * (1 - 1e-12)}
    kept_total = math.fsum(kept.values())
    return {token: weight / kept_total for token, weight in sorted(kept.items())}


def naive_score(logits: Logits, sampling: Sampling, token: int, context: Sequence[int]) -> float:
    """A logit after the penalties, of a text with a prompt of two tokens."""
    score, count = float(logits[token]), list(context[2:]).count(token)
    if token in context:
        score = score / sampling.repetition_penalty if score > 0 else score * sampling.repetition_penalty
    return score - sampling.frequency_penalty * count - sampling.presence_penalty * (count > 0)


def rounding_decides(logits: Logits, sampling: Sampling, context: Sequence[int], prompt_len: int) -> bool:
    """Whether a nudge of top_p or min_p by rounding alone changes the survivors."""
    nudged = [
        naive_distribution(
            logits,
            replace(sampling, top_p=min(sampling.top_p * (1 + nudge), 1.0), min_p=sampling.min_p * (1 + nudge)),
            context,
            prompt_len,
        )
        for nudge in (-1e-9, 1e-9)
    ]
    return nudged[0].keys() != nudged[1].keys()


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 1.7]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([1.0, 1.0, 0.99, 0.9, 0.5, 0.1]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**64 - 1),
)
# Few distinct values make ties; large spreads make tiny probabilities. Rounded, because differences that vanish once
# the peak is subtracted (1e-35 beside 1.0) tie in the rule, but not in the oracle's ranking.
logit_values = st.sampled_from([-math.inf, -3.0, 0.0, 0.5, 2.0]) | st.floats(-30, 30, width=32).map(
    lambda value: round(value, 4)
)


@given(st.lists(logit_values, min_size=2, max_size=40), samplings, st.data())
def test_survivors_and_probabilities_are_those_of_the_naive_rule(
    values: list[float], sampling: Sampling, data: st.DataObject
) -> None:
    logits = np.array([*values, 1.0], dtype=np.float32)
    context = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=12))
    prompt_len = data.draw(st.integers(0, len(context)))
    if rounding_decides(logits, sampling, context, prompt_len):
        return
    expected = naive_distribution(logits, sampling, context, prompt_len)
    ids, log_probs = filtered_distribution(logits, sampling, context, prompt_len)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(np.exp(log_probs), list(expected.values()), rtol=1e-9)
    noisy = log_probs + (gumbel(sampling.seed, 7, ids) if sampling.temperature else 0)
    assert select(logits, sampling, 7, context, prompt_len) == ids[np.argmax(noisy)]


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=20),
        Sampling(temperature=0.8, top_p=0.95),
        Sampling(temperature=2.0, top_p=0.999999),
        Sampling(temperature=1.0, top_k=3000, top_p=0.9, min_p=0.01),
    ],
)
def test_a_large_vocabulary_takes_the_same_survivors(spread: float, sampling: Sampling) -> None:
    # Rounded to two digits: hundreds of exact ties, also at the edge of what survives.
    logits = np.round(np.random.default_rng(3).standard_normal(20_011) * spread, 2).astype(np.float32)
    ids, log_probs = filtered_distribution(logits, sampling)
    expected = naive_distribution(logits, sampling, (), 0)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(np.exp(log_probs), list(expected.values()), rtol=1e-8)


def test_exactly_k_survive_and_ties_go_to_the_lower_id() -> None:
    logits = np.array([1, 5, 5, 2, 5, 5], dtype=np.float32)
    assert filtered_distribution(logits, Sampling(temperature=1.0, top_k=3))[0].tolist() == [1, 2, 4]
    assert filtered_distribution(logits, Sampling(temperature=1.0, top_p=0.3))[0].tolist() == [1, 2]
    assert select(logits, Sampling(), 0) == 1


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_at_least_one_id_survives(top_p: float) -> None:
    logits = np.array([0, 1, 3, 3], dtype=np.float32)
    assert filtered_distribution(logits, Sampling(temperature=1.0, top_p=top_p))[0].tolist() == [2]
    assert select(logits, Sampling(temperature=1.0, min_p=1.0, top_k=1), 4) == 2


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_temperatures_do_not_overflow(temperature: float) -> None:
    logits = np.array([-3e38, 0, 3e38], dtype=np.float32)
    ids, log_probs = filtered_distribution(logits, Sampling(temperature=temperature, top_p=0.9999))
    assert np.isfinite(log_probs).all()
    assert ids.tolist() == ([2] if temperature < 1 else [0, 1, 2])


def test_forbidden_ids_are_never_selected() -> None:
    logits = np.full(64, -np.inf, dtype=np.float32)
    logits[[3, 9]] = (0.0, 0.0)
    for sampling in (Sampling(temperature=2.0), Sampling(temperature=2.0, top_k=40), Sampling()):
        assert {select(logits, sampling, position) for position in range(40)} <= {3, 9}
    assert filtered_distribution(logits, Sampling(temperature=1.0, top_k=40))[0].tolist() == [3, 9]


@given(st.lists(logit_values, min_size=2, max_size=40), samplings, st.integers(1, 9), st.data())
def test_where_all_ids_are_likely_drafts_are_the_candidates(
    values: list[float], sampling: Sampling, count: int, data: st.DataObject
) -> None:
    logits = np.array([*values, 1.0], dtype=np.float32)
    context = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=12))
    drafts, drawn = (
        [choose(logits, sampling, 5, most, context, 2).tolist() for most in (count, len(logits))]
        for choose in (draft_candidates, candidates)
    )
    if len(drafts[1]) == len(drawn[1]):  # none was too unlikely
        assert drafts == drawn
    else:
        assert sampling.temperature > 0
        assert set(drafts[1]) < set(drawn[1])


@pytest.mark.parametrize("bad", [[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_refused(bad: list[float], temperature: float) -> None:
    logits = np.array(bad, dtype=np.float32)
    with pytest.raises(LocalProtocolError, match="cannot be selected from"):
        select(logits, Sampling(temperature=temperature), 0)
    with pytest.raises(LocalProtocolError, match="cannot be selected from"):
        filtered_distribution(logits, Sampling(temperature=temperature))
    with pytest.raises(LocalProtocolError, match="cannot be selected from"):
        confidences(logits, [0])


class TestPenalties:
    """vLLM's semantics: repetition over prompt and text, presence and frequency over the text alone."""

    logits = np.array([2.0, -1.0, 0.5, 0.0], dtype=np.float32)
    context = (0, 1, 2, 2)  # prompt: 0, 1; generated: 2 twice

    def scores(self, sampling: Sampling) -> list[float]:
        """Log probabilities relative to id 3, which nothing penalises: the penalised logits."""
        ids, log_probs = filtered_distribution(self.logits, sampling, self.context, prompt_len=2)
        assert ids.tolist() == [0, 1, 2, 3]
        return [float(log_prob - log_probs[3]) for log_prob in log_probs]

    def test_repetition_shrinks_positive_and_grows_negative_logits(self) -> None:
        scores = self.scores(Sampling(temperature=1.0, repetition_penalty=2.0))
        np.testing.assert_allclose(scores, [1.0, -2.0, 0.25, 0.0])

    def test_presence_counts_a_generated_token_once(self) -> None:
        scores = self.scores(Sampling(temperature=1.0, presence_penalty=0.75))
        np.testing.assert_allclose(scores, [2.0, -1.0, -0.25, 0.0])

    def test_frequency_counts_it_each_time(self) -> None:
        scores = self.scores(Sampling(temperature=1.0, frequency_penalty=0.75))
        np.testing.assert_allclose(scores, [2.0, -1.0, -1.0, 0.0])

    def test_greedy_selection_is_penalised_too(self) -> None:
        sampling = Sampling(repetition_penalty=10.0)
        assert select(self.logits, sampling, 4, self.context, 2) == 0
        assert select(self.logits, replace(sampling, presence_penalty=5.0), 4, (0,), 0) == 2

    def test_logits_are_left_as_they_were(self) -> None:
        before = self.logits.copy()
        self.scores(Sampling(temperature=1.0, repetition_penalty=2.0, frequency_penalty=1.0))
        assert (self.logits == before).all()


def toy_logits(seed: int, vocabulary: int = 40) -> Logits:
    return (np.random.default_rng(seed).standard_normal(vocabulary) * 1.5).astype(np.float32)


def counts(logits: Logits, sampling: Sampling, positions: range) -> Ids:
    chosen = [select(logits, sampling, position) for position in positions]
    return np.bincount(chosen, minlength=len(logits))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1.3, top_k=12, seed=2**63 + 5),
        Sampling(temperature=0.8, top_p=0.9, min_p=0.02, seed=3),
    ],
)
def test_selections_follow_the_distribution_by_chi_square(sampling: Sampling) -> None:
    logits = toy_logits(4)
    n = 20_000
    ids, log_probs = filtered_distribution(logits, sampling)
    observed, expected = counts(logits, sampling, range(n)), n * np.exp(log_probs)
    assert observed.sum() == observed[ids].sum() == n
    statistic = float(((observed[ids] - expected) ** 2 / expected).sum())
    df = len(ids) - 1
    # Wilson and Hilferty's approximation of the 0.999 quantile (z = 3.09).
    assert statistic < df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3


def test_two_near_distributions_select_alike_as_the_bound_says() -> None:
    target = toy_logits(5)
    draft = target + np.random.default_rng(6).standard_normal(len(target)).astype(np.float32) * np.float32(0.5)
    sampling = Sampling(temperature=1.0, seed=8)
    target_probs = np.exp(filtered_distribution(target, sampling)[1])
    draft_probs = np.exp(filtered_distribution(draft, sampling)[1])
    distance = float(np.abs(target_probs - draft_probs).sum() / 2)
    assert 0.05 < distance < 0.5
    n = 10_000
    agreed = sum(select(target, sampling, at) == select(draft, sampling, at) for at in range(n)) / n
    noise = 4 * math.sqrt(0.25 / n)
    assert (1 - distance) / (1 + distance) - noise < agreed < 1 - distance + noise


@pytest.mark.parametrize("other", [(1, range(10_000, 20_000)), (2, range(10_000))])
def test_other_positions_and_other_seeds_select_independently(other: tuple[int, range]) -> None:
    logits, n = toy_logits(7), 10_000
    sampling = Sampling(temperature=1.0, seed=1)
    first = [select(logits, sampling, position) for position in range(n)]
    again = [select(logits, sampling, position) for position in range(n)]
    second = [select(logits, replace(sampling, seed=other[0]), position) for position in other[1]]
    assert first == again
    by_chance = float(np.exp(2 * filtered_distribution(logits, sampling)[1]).sum())
    agreed = sum(one == two for one, two in zip(first, second, strict=True)) / n
    assert abs(agreed - by_chance) < 4 * math.sqrt(by_chance * (1 - by_chance) / n)


@given(st.lists(logit_values, min_size=2, max_size=40), samplings, st.integers(1, 9), st.data())
def test_candidates_are_the_best_sums_of_log_probability_and_noise(
    values: list[float], sampling: Sampling, count: int, data: st.DataObject
) -> None:
    logits = np.array([*values, 1.0], dtype=np.float32)
    context = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=12))
    ids = candidates(logits, sampling, 5, count, context, 2)
    assert ids[0] == select(logits, sampling, 5, context, 2)
    if sampling.temperature == 0:
        penalised = {token: naive_score(logits, sampling, token, context) for token in range(len(logits))}
        ranked = sorted(
            (one for one in penalised if penalised[one] > -math.inf), key=lambda one: (-penalised[one], one)
        )
        assert [penalised[one] for one in ids] == pytest.approx([penalised[one] for one in ranked[:count]])
        return
    survivors, scores = filtered_distribution(logits, sampling, context, 2)
    sums = dict(zip(survivors.tolist(), (scores + gumbel(sampling.seed, 5, survivors)).tolist(), strict=True))
    expected = sorted(sums, key=lambda one: (-sums[one], one))[:count]
    assert [sums[one] for one in ids.tolist()] == pytest.approx([sums[one] for one in expected])
    assert len(set(ids.tolist())) == len(expected)


def test_candidates_of_a_whole_vocabulary() -> None:
    logits = np.random.default_rng(3).normal(size=20_000).astype(np.float32)
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=5)):
        sums = logits.astype(np.float64)
        if sampling.temperature:
            sums = sums + gumbel(sampling.seed, 9, np.arange(len(logits)))
        assert candidates(logits, sampling, 9, 4).tolist() == np.argsort(-sums)[:4].tolist()


def test_candidates_are_drawn_without_replacement() -> None:
    """The second candidate has the law of the first, given that it is another: chi-square over many positions."""
    logits, n = toy_logits(6), 6000
    law = np.exp(filtered_distribution(logits, Sampling(temperature=1.0))[1])
    pairs = [tuple(candidates(logits, Sampling(temperature=1.0, seed=8), position, 2)) for position in range(n)]
    chi_square = 0.0
    for first in range(6):
        for second in range(6):
            expected = n * law[first] * law[second] / (1 - law[first]) if first != second else 0.0
            seen = pairs.count((first, second))
            assert expected or not seen
            chi_square += (seen - expected) ** 2 / expected if expected else 0.0
    assert chi_square < 58.3  # 29 degrees of freedom, one run in a thousand


def test_confidence_of_a_sibling_is_given_that_those_before_it_are_wrong() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.2, 0.05], dtype=np.float32))
    assert confidences(logits, [0, 1, 2, 3]) == pytest.approx([0.5, 0.5, 0.8, 1.0], rel=1e-5)
    assert confidences(logits, [2, 0]) == pytest.approx([0.2, 0.625], rel=1e-5)


def test_probability_is_the_plain_softmax() -> None:
    logits = toy_logits(9)
    weights = np.exp(logits.astype(np.float64))
    for token in range(len(logits)):
        assert confidences(logits, [token])[0] == pytest.approx(weights[token] / weights.sum(), rel=1e-5)
    logits[4] = -np.inf
    assert confidences(logits, [4]) == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_ids_are_no_candidates_however_few_are_left(temperature: float) -> None:
    logits = np.full(200, -np.inf, dtype=np.float32)
    logits[[7, 90, 150]] = (2.0, 3.0, 1.0)
    found = candidates(logits, Sampling(temperature=temperature), 5, 5)
    assert sorted(found.tolist()) == [7, 90, 150]
    assert temperature or found.tolist() == [90, 7, 150]
