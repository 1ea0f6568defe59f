"""N-grams before a toy model: what comes out is what the model alone would have drafted, in fewer forwards."""

import random
from collections.abc import Sequence

import pytest

from edge_agent.engines.lookup_draft import MOST_GUESSED, RECYCLED, LookupDraft, guess_length
from edge_agent.engines.ngram import NgramDraft
from edge_agent.engines.row_costs import RowCosts, measure_row_costs
from edge_agent.engines.selftest import check_draft
from shared.core.errors import LocalProtocolError
from shared.core.messages import Sampling
from shared.engine import MODEL_SOURCE, Proposal
from shared.testing.engines import TOY_VOCABULARY, ToyDraft

CHEAP_ROWS = [10.0 + row for row in range(8)]
DEAR_ROWS = [10.0 * (1 + row) for row in range(8)]


class LoopingModel:
    """Tokens count up to `period` and begin again; every `slip`-th position is another one."""

    def __init__(self, period: int = 10, slip: int = 1000) -> None:
        self._period, self._slip = period, slip

    def token(self, prefix_hash: int, last: int, position: int, sampling: Sampling) -> int:
        return 500 + position if position % self._slip == 0 else 1 + position % self._period


class CheckingToy(ToyDraft):
    """A toy that can check guesses, and counts its forwards."""

    def __init__(self, model: LoopingModel, max_context: int = 1000) -> None:
        super().__init__(model, max_context)
        self.num_forwards = 0

    @property
    def num_cached(self) -> int:
        return len(self.log) - 1

    def propose(self, n: int) -> Proposal:
        self.num_forwards += n
        return super().propose(n)

    def propose_checked(self, guess: Sequence[int]) -> Proposal:
        self.num_forwards += 1
        tokens: list[int] = []
        for guessed in (*guess, None):
            tokens += super().propose(1).tokens
            if tokens[-1:] != [guessed]:
                break
        return Proposal(tuple(tokens), (0.9,) * len(tokens))


def lookup(model: CheckingToy, row_ms: Sequence[float] = CHEAP_ROWS) -> LookupDraft:
    return LookupDraft(model, RowCosts(row_ms), NgramDraft(TOY_VOCABULARY, 1000))


def drafted(engine: LookupDraft, n: int) -> list[tuple[int, str]]:
    tokens: list[tuple[int, str]] = []
    while len(tokens) < n and (proposal := engine.propose(n - len(tokens))).tokens:
        tokens += zip(proposal.tokens, proposal.sources, strict=True)
    return tokens


@pytest.mark.parametrize("slip", [1000, 7])
def test_a_text_that_repeats_itself_takes_fewer_forwards(slip: int) -> None:
    model = CheckingToy(LoopingModel(slip=slip))
    alone = ToyDraft(LoopingModel(slip=slip))
    engine = lookup(model)
    for each in (alone, engine):
        each.reset([1, 2, 3], Sampling(), 3)
    found = drafted(engine, 60)
    assert [token for token, _ in found] == list(alone.propose(60).tokens)
    assert model.num_forwards < 50
    assert {source for _, source in found} == {"ngram", MODEL_SOURCE}
    assert {source for _, source in found[:8]} == {MODEL_SOURCE}, "nothing to copy yet"


def test_a_path_that_was_rejected_is_not_drafted_token_by_token_again() -> None:
    model = CheckingToy(LoopingModel(period=400))
    engine = LookupDraft(model, RowCosts(CHEAP_ROWS))
    engine.reset([1, 2, 3], Sampling(), 3)
    path = [token for token, _ in drafted(engine, 20)]
    engine.rollback(5)
    engine.extend([99])  # and then all goes on as before
    before = model.num_forwards
    again = drafted(engine, 17)
    assert [token for token, _ in again] == path[3:]
    assert model.num_forwards - before <= 6
    assert {source for _, source in again} == {RECYCLED, MODEL_SOURCE}
    engine.reset([1, 2, 3], Sampling(), 3)
    assert {source for _, source in drafted(engine, 20)} == {MODEL_SOURCE}, "that was another text"


def test_what_was_ready_when_the_text_went_another_way_is_a_rejected_path() -> None:
    model = CheckingToy(LoopingModel(period=400))
    engine = LookupDraft(model, RowCosts(CHEAP_ROWS))
    engine.reset([1, 2, 3], Sampling(), 3)
    drafted(engine, 20)
    engine.rollback(5)
    engine.extend([99])
    while not engine._ready:
        engine.propose(1)
    engine.extend([98])
    assert engine._rejected.start == len(engine._tokens) - 1


def test_where_rows_cost_as_much_as_forwards_nothing_is_guessed() -> None:
    model = CheckingToy(LoopingModel())
    engine = lookup(model, DEAR_ROWS)
    engine.reset([1, 2, 3], Sampling(), 3)
    assert {source for _, source in drafted(engine, 60)} == {MODEL_SOURCE}
    assert model.num_forwards == 60


def test_one_call_is_one_forward_at_most() -> None:
    model = CheckingToy(LoopingModel(period=3))
    engine = lookup(model)
    engine.reset([1, 2, 3] * 4, Sampling(), 12)
    sizes = []
    for _ in range(8):
        before = model.num_forwards
        sizes.append(len(engine.propose(3).tokens))
        assert model.num_forwards - before <= 1
    assert 3 in sizes
    assert engine.propose(0) == Proposal((), ())


def test_any_history_is_as_good_as_a_fresh_start() -> None:
    """Rollbacks, corrections that agree with what is ready or do not, drafts in pieces."""
    chance = random.Random(5)
    engine = lookup(CheckingToy(LoopingModel(period=4, slip=11)))
    text = [1, 2, 3]
    engine.reset(text, Sampling(), 3)
    for _ in range(400):
        match chance.randrange(4):
            case 0 | 1:
                text += engine.propose(chance.randint(1, 5)).tokens
            case 2 if len(text) > 5:
                length = chance.randint(len(text) - 4, len(text))
                engine.rollback(length)
                del text[length:]
            case _:
                follows = ToyDraft(LoopingModel(period=4, slip=11))
                follows.reset(text, Sampling(), 3)
                given = [*follows.propose(chance.randint(0, 3)).tokens, *[77] * chance.randint(0, 1)]
                engine.extend(given)
                text += given
        alone = ToyDraft(LoopingModel(period=4, slip=11))
        alone.reset(text, Sampling(), 3)
        expected = alone.propose(2).tokens
        found = [token for token, _ in drafted(engine, 2)]
        engine.rollback(len(text))
        assert tuple(found) == expected
        if len(text) > 300:
            text = [1, 2, 3]
            engine.reset(text, Sampling(), 3)


def test_the_self_test_takes_it() -> None:
    check_draft(lookup(CheckingToy(LoopingModel())))


def test_the_end_of_the_context() -> None:
    engine = lookup(CheckingToy(LoopingModel(), max_context=5))
    engine.reset([1, 2, 3], Sampling(), 3)
    assert len(drafted(engine, 9)) == 2
    assert engine.propose(1).tokens == ()
    with pytest.raises(LocalProtocolError, match="cannot roll back to 6 tokens, there are 5"):
        engine.rollback(6)


def test_it_is_the_models_kind_and_says_what_it_holds() -> None:
    model = CheckingToy(LoopingModel())
    engine = lookup(model)
    engine.reset([1, 2, 3], Sampling(), 3)
    assert (engine.fingerprint, engine.capabilities) == (model.fingerprint, model.capabilities)
    assert repr(engine).startswith("<LookupDraft 3 tokens, 0 ready, <RejectedPath of 0 tokens")
    engine.close()
    assert len(model.log) == 0


def test_the_length_of_a_guess_is_what_pays() -> None:
    assert guess_length([1.0] * 9, CHEAP_ROWS) == (7, 8 / 17.0), "as far as costs are known"
    assert guess_length([0.9, 0.9, 0.1, 0.9], CHEAP_ROWS)[0] == 2
    assert guess_length([0.2, 0.2], [10.0, 12.0, 14.0]) == (0, 0.1)
    assert guess_length([0.2, 1.0, 1.0], [10.0, 12.1, 13.0, 13.5])[0] == 3, "a poor first one may be worth what follows"
    assert guess_length([], CHEAP_ROWS)[0] == 0


def test_rows_are_measured_as_one_forward_each() -> None:
    row_ms = measure_row_costs(CheckingToy(LoopingModel()), 1 + MOST_GUESSED).with_guesses(1, 0)
    assert len(row_ms) == 8
    assert min(row_ms) > 0


def test_behind_a_long_text_a_guess_must_be_worth_what_its_rows_take_there() -> None:
    """Each cached token adds 0.1 ms to a forward of several rows: behind 900 of them no guess is worth that."""
    now_s = 0.0

    class Slow(CheckingToy):
        def propose_checked(self, guess: Sequence[int]) -> Proposal:
            nonlocal now_s
            now_s += (CHEAP_ROWS[len(guess)] + (0.1 * self.num_cached if guess else 0.0)) / 1000
            return super().propose_checked(guess)

    num_forwards = []
    for length in (30, 900):
        model = Slow(LoopingModel(slip=7))
        costs, lookup = RowCosts(CHEAP_ROWS), NgramDraft(TOY_VOCABULARY, 1000)
        engine = LookupDraft(model, costs, lookup, clock_s=lambda: now_s)
        engine.reset([1 + position % 10 for position in range(length)], Sampling(), 3)
        drafted(engine, 90)
        num_forwards.append(model.num_forwards)
    assert num_forwards[0] < 70
    assert 80 < num_forwards[1] < 90, "a few teach it"
