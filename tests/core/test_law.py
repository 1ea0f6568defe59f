"""The law: what comes out of coupled speculation is the target's own sample, whatever the draft and the tree."""

import math
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.core.effects import Keep, Rows, Send
from shared.core.messages import Commit, Draft, Open, Sampling
from shared.core.selection import filtered_distribution
from shared.core.session_table import SessionTable
from shared.core.settings import CloudSettings, EdgeSettings, Request, TableSettings
from shared.core.tokens import TokenLog, next_hash
from shared.policy.run_ahead import StopAndWait
from shared.policy.scheduler import BestRate
from shared.testing.engines import TOY_VOCABULARY, TableModel, ToyDraft, ToyTarget
from shared.testing.pair import Pair

VOCABULARY = 12
PROMPT = (3, 1, 4)
LENGTH = 1_120
SEEDS = 6  # a sampling; LENGTH * SEEDS * len(SAMPLINGS) draws make a test
SIGNIFICANT = 0.001
SAMPLINGS = [Sampling(temperature=0.8, top_p=0.9), Sampling(temperature=1.0, top_p=0.95), Sampling(temperature=1.0)]
LOGITS = np.random.default_rng(5).normal(0, 1.2, (VOCABULARY, VOCABULARY)).astype(np.float32)


class Remembering:
    """A `TableModel` that selects once for each question: the same ones come up again in every test."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self._model = TableModel(logits)
        self._known: dict[tuple[int, int, Sampling], int] = {}

    def token(self, prefix_hash: int, last: int, position: int, sampling: Sampling) -> int:
        question = (last, position, sampling)
        if question not in self._known:
            self._known[question] = self._model.token(prefix_hash, last, position, sampling)
        return self._known[question]


TARGET = Remembering(LOGITS)


def draft_model(noise: float) -> Remembering:
    """The target's logits, perturbed."""
    nudge = np.random.default_rng(6).normal(0, noise, LOGITS.shape)
    return Remembering((LOGITS + nudge).astype(np.float32))


def seeded(sampling: Sampling, seed: int) -> Sampling:
    return replace(sampling, seed=1_000 * seed + 17)


def plain(prompt: tuple[int, ...], sampling: Sampling, length: int) -> tuple[int, ...]:
    """The target alone, token by token."""
    tokens = list(prompt)
    while len(tokens) < length:
        tokens.append(TARGET.token(0, tokens[-1], len(tokens), sampling))
    return tuple(tokens)


def table_of(target: ToyTarget) -> TableSettings:
    return TableSettings(CloudSettings(context_length=4096), TOY_VOCABULARY, target.blocks.num_blocks)


def chi_square_survival(statistic: float, freedom: int) -> float:
    """Probability of a larger statistic, by Wilson and Hilferty's cube root (1931); good to 10 %."""
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return math.erfc(z / math.sqrt(2)) / 2


def fit(texts: list[tuple[int, ...]], sampling: Sampling) -> tuple[float, int]:
    """Chi-square statistic and freedom of the tokens against the target's law, given the token before each."""
    seen = Counter((text[at - 1], text[at]) for text in texts for at in range(len(PROMPT), len(text)))
    statistic, freedom = 0.0, 0
    for last in range(VOCABULARY):
        ids, log_probs = filtered_distribution(LOGITS[last], sampling)
        total = sum(seen[last, token] for token in range(VOCABULARY))
        expected = dict(zip(ids.tolist(), (total * np.exp(log_probs)).tolist(), strict=True))
        assert all(token in expected for token in range(VOCABULARY) if seen[last, token])
        common = [token for token in expected if expected[token] >= 5]
        if len(common) > 1:
            statistic += sum((seen[last, token] - expected[token]) ** 2 / expected[token] for token in common)
            freedom += len(common) - (len(common) == len(expected))
    return statistic, freedom


def test_survival_function_meets_published_quantiles() -> None:
    for freedom, quantile in ((10, 29.588), (30, 59.703), (100, 149.449)):
        assert chi_square_survival(quantile, freedom) == pytest.approx(0.001, rel=0.1)
        assert chi_square_survival(freedom - 2 / 3, freedom) == pytest.approx(0.5, abs=0.01)


def assert_lawful(texts: dict[Sampling, list[tuple[int, ...]]]) -> None:
    """At least 20,000 draws follow the target's filtered distribution."""
    assert sum(len(text) - len(PROMPT) for of_one in texts.values() for text in of_one) >= 20_000
    statistics, freedoms = zip(*(fit(of_one, sampling) for sampling, of_one in texts.items()), strict=True)
    assert chi_square_survival(sum(statistics), sum(freedoms)) > SIGNIFICANT


def test_another_law_is_told_apart() -> None:
    sampling = SAMPLINGS[1]
    hotter = replace(sampling, temperature=1.15)
    texts = [plain(PROMPT, seeded(hotter, seed), LENGTH) for seed in range(SEEDS)]
    assert chi_square_survival(*fit(texts, replace(sampling, top_p=1.0))) < SIGNIFICANT


@pytest.mark.parametrize(
    ("noise", "per_round", "least", "most"), [(0.3, 3, 0.7, 1.0), (4.0, 1, 0.0, 0.5)], ids=["good", "bad"]
)
def test_chains_leave_the_law_of_the_target_alone(noise: float, per_round: int, least: float, most: float) -> None:
    draft, commits = draft_model(noise), list[Commit]()
    texts: dict[Sampling, list[tuple[int, ...]]] = {sampling: [] for sampling in SAMPLINGS}
    for sampling in SAMPLINGS:
        for seed in range(SEEDS):
            request = Request(f"s{seed}", PROMPT, LENGTH, TOY_VOCABULARY, seeded(sampling, seed))
            policy, target = StopAndWait(per_round), ToyTarget(TARGET)
            pair = Pair(request, EdgeSettings(), policy, ToyDraft(draft), target, table_of(target))
            pair.run()
            assert pair.shown.tokens() == plain(PROMPT, request.sampling, len(PROMPT) + LENGTH)
            texts[sampling].append(pair.shown.tokens())
            commits += pair.commits
    drafted = sum(commit.num_drafted for commit in commits)
    assert drafted > LENGTH * SEEDS
    assert least < sum(commit.num_accepted for commit in commits) / drafted < most
    assert_lawful(texts)


def test_trees_leave_the_law_of_the_target_alone() -> None:
    models, ranks = (draft_model(noise=0.5), draft_model(noise=4.0)), Counter[int]()
    texts: dict[Sampling, list[tuple[int, ...]]] = {sampling: [] for sampling in SAMPLINGS}
    for sampling in SAMPLINGS:
        for seed in range(SEEDS):
            text = speculate_on_trees(models[seed % 2], seeded(sampling, seed), Random(seed), ranks)
            assert text == plain(PROMPT, seeded(sampling, seed), len(PROMPT) + LENGTH)
            texts[sampling].append(text)
    assert ranks[0] > 100  # the root's first branch was accepted,
    assert ranks[1] > 100  # and another one
    assert_lawful(texts)


def speculate_on_trees(model: Remembering, sampling: Sampling, random: Random, ranks: Counter[int]) -> tuple[int, ...]:
    """One session of hand-sent trees; counts which branch of the root was accepted in `ranks`."""
    target = ToyTarget(TARGET, row_ms=0.0)
    table = SessionTable(table_of(target), BestRate(target.cost_ms, target.limits.max_rows))
    table.opened(1, "", 0.0)
    assert table.receive(1, Open("s", PROMPT, len(PROMPT), LENGTH, TOY_VOCABULARY, sampling), 0.0) == []
    log = TokenLog(PROMPT)
    while len(log) < len(PROMPT) + LENGTH:
        for draft in tree(model, log, sampling, random):
            assert table.receive(1, draft, 0.0) == []
        (rows,) = table.plan(0.0).batch
        keep, commit = table.stepped(target.forward([rows]), 1.0, 0.0)
        assert isinstance(keep, Keep)
        assert isinstance(commit, Send)
        assert isinstance(commit.message, Commit)
        target.keep(keep.session_id, keep.start, keep.rows)
        ranks[accepted_branch(rows, commit.message)] += 1
        log.extend(commit.message.tokens)
        table.sessions[0].acknowledged(len(log), 1.0, 0.0, 0.0)
    return log.tokens()


def tree(model: Remembering, log: TokenLog, sampling: Sampling, random: Random) -> list[Draft]:
    """Three messages: a chain of the coupled draft, a random sibling of its first token, a child of that sibling."""
    position, root = len(log), log.hash_at(len(log))
    first = model.token(0, log[position - 1], position, sampling)
    second = model.token(0, first, position + 1, sampling)
    sibling = (first + 1 + random.randrange(VOCABULARY - 1)) % VOCABULARY
    child = model.token(0, sibling, position + 1, sampling)
    drafts = [
        Draft(position, root, (first, second), bytes((200, 200))),
        Draft(position, root, (sibling,), bytes((150,))),
        Draft(position + 1, next_hash(root, sibling), (child,), bytes((150,))),
    ]
    return drafts if random.random() < 0.9 else [*drafts[::-1], drafts[0]]


def accepted_branch(rows: Rows, commit: Commit) -> int:
    """Which child of the root was accepted, by row order; -1 for none."""
    children = [token for token, parent in zip(rows.tokens, rows.parents, strict=True) if parent == rows.first_selected]
    return children.index(commit.tokens[0]) if commit.num_accepted else -1
