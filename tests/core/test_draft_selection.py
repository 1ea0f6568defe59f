"""Selection for drafts, which may err: from likely ids only, and in two looks where logits are rough."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.messages import Sampling
from shared.core.noise import gumbel
from shared.core.selection import draft_candidates, select


@pytest.mark.parametrize("temperature", [1e-300, 0.3, 1.0, 1e300])
def test_drafts_come_from_the_ids_above_a_millionth_of_the_best(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(0, 6, 1000).astype(np.float32)
    found = draft_candidates(logits, Sampling(temperature=temperature), 5, len(logits))
    with np.errstate(over="ignore"):
        ratios = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)
    assert set(np.flatnonzero(ratios > 1.001e-6)) <= set(found.tolist()) <= set(np.flatnonzero(ratios > 0.999e-6))


def test_drafts_are_nearly_always_those_from_all_ids() -> None:
    chance = np.random.default_rng(0)
    other = 0
    for position in range(400):
        logits = chance.normal(0, 3, 20_000).astype(np.float32)
        sampling = Sampling(temperature=0.8, seed=5)
        other += draft_candidates(logits, sampling, position, 1)[0] != select(logits, sampling, position)
    assert other <= 2


@given(
    st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=31),
    st.sampled_from([0.0, 0.8, 1e300]),
    st.sampled_from([0.0, 0.7]),
    st.integers(1, 9),
    st.integers(0, 9),
)
def test_rough_logits_are_decided_by_exact_ones(
    values: list[float], temperature: float, presence_penalty: float, count: int, roughness: int
) -> None:
    exact = np.array(values, dtype=np.float32)
    rough = exact + np.random.default_rng(0).normal(0, 0.03 * roughness, len(exact)).astype(np.float32)
    sampling = Sampling(temperature=temperature, presence_penalty=presence_penalty, seed=3)
    drafted = draft_candidates(rough, sampling, 5, count, (0, 1), 1, lambda ids: exact[ids])
    assert (rough[drafted] == exact[drafted]).all(), "they stand there then"
    scores = exact.astype(np.float64)
    scores[1] -= presence_penalty
    if temperature:
        scores = scores / temperature + gumbel(3, 5, np.arange(len(exact)))
    expected = -np.sort(-scores)[:count]
    found = scores[drafted]
    assert len(found) <= len(expected)
    if temperature != 0.8:  # there an unlikely id may not be on the shortlist
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (np.diff(found) < 1e-5).all()
    assert found[0] > expected[0] - 1e-5


def test_a_shortlist_finds_what_noise_chooses_from_far_below() -> None:
    chance = np.random.default_rng(0)
    others = [0, 0]
    for position in range(300):
        exact = chance.normal(0, 3, 20_000).astype(np.float32)
        rough = exact + chance.normal(0, 0.3, len(exact)).astype(np.float32)
        sampling = Sampling(temperature=0.8, seed=5)
        right = select(exact, sampling, position)
        others[0] += draft_candidates(rough.copy(), sampling, position, 1)[0] != right
        others[1] += draft_candidates(rough, sampling, position, 1, exact=exact.__getitem__)[0] != right
    assert others[0] > 30, "rough logits alone choose other ids"
    assert others[1] <= 3


def test_a_penalty_leaves_something_to_draft_at_the_least_temperature() -> None:
    """Penalised logits are float64: the best one's floor must not be rounded above it."""
    logits = np.random.default_rng(0).normal(0, 6, 100).astype(np.float32)
    for penalty in np.linspace(1.01, 2, 50):
        sampling = Sampling(temperature=1e-300, repetition_penalty=penalty)
        drafted = draft_candidates(logits, sampling, 5, 1, range(100))
        assert drafted.tolist() == [select(logits, sampling, 5, range(100))]


def test_forbidden_ids_are_never_drafted() -> None:
    logits = np.full(64, -np.inf, dtype=np.float32)
    logits[[3, 9]] = (0.0, 0.0)
    for temperature in (0.0, 2.0, 1e300):
        assert set(draft_candidates(logits, Sampling(temperature=temperature), 5, 8).tolist()) == {3, 9}
