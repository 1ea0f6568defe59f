import numpy as np
import pytest

from shared.core.effects import Rows
from shared.core.errors import LocalProtocolError
from shared.core.messages import Sampling
from shared.core.selection import select
from shared.core.tokens import TokenLog
from shared.engine import DraftEngine, TargetEngine
from shared.testing.engines import TOY_VOCABULARY, GarbageDraft, HashModel, NoisyModel, TableModel, ToyDraft, ToyTarget

GREEDY = Sampling()
MODEL = HashModel(salt=3)


def stream(model: HashModel, prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    log = TokenLog(prompt)
    while len(log) < length:
        log.extend((model.token(log.hash_at(len(log)), log[len(log) - 1], len(log), GREEDY),))
    return log.tokens()


def chain(start: int, tokens: tuple[int, ...], first_selected: int = 0) -> Rows:
    return Rows("s", start, tokens, tuple(range(-1, len(tokens) - 1)), first_selected, GREEDY, 2)


def test_hash_model_reads_the_whole_prefix() -> None:
    assert stream(MODEL, (1, 2), 20) != stream(MODEL, (9, 2), 20)
    assert stream(MODEL, (1, 2), 20) == stream(MODEL, (1, 2), 20)
    assert 0 not in stream(MODEL, (1, 2), 500)


def test_hash_model_stops_as_often_as_asked() -> None:
    text = stream(HashModel(salt=3, stop_rate=0.1), (1, 2), 2_000)
    assert 140 < text.count(0) < 260


@pytest.mark.parametrize("acceptance", [0.0, 0.7, 1.0])
def test_noisy_model_agrees_as_often_as_asked(acceptance: float) -> None:
    noisy, text = NoisyModel(HashModel(salt=3, stop_rate=0.1), acceptance, salt=4), TokenLog((1, 2))
    right = 0
    for position in range(2, 2_002):
        token = noisy.target.token(text.hash_at(position), text[position - 1], position, GREEDY)
        right += token == noisy.token(text.hash_at(position), text[position - 1], position, GREEDY)
        text.extend((token,))
    assert right / 2_000 == pytest.approx(acceptance, abs=0.05)


def test_table_model_selects_by_the_reference() -> None:
    logits = np.random.default_rng(1).normal(size=(7, 7)).astype(np.float32)
    sampling = Sampling(temperature=1.0, seed=5)
    tokens = [TableModel(logits).token(0, 4, position, sampling) for position in range(50)]
    assert tokens == [select(logits[4], sampling, position) for position in range(50)]


def test_toys_are_engines() -> None:
    draft: DraftEngine = ToyDraft(MODEL)
    target: TargetEngine = ToyTarget(MODEL, base_ms=30.0, row_ms=2.0)
    assert draft.fingerprint == target.fingerprint == TOY_VOCABULARY
    assert draft.capabilities.can_rollback
    assert target.capabilities.can_tree
    assert target.cost_ms(5) == 40.0


def test_draft_proposes_on_what_it_was_fed_and_rolls_back() -> None:
    draft, text = ToyDraft(MODEL), stream(MODEL, (1, 2), 8)
    draft.reset((1, 2), GREEDY, 2)
    assert draft.propose(3).tokens == text[2:5]
    draft.rollback(4)
    draft.extend(text[4:6])
    proposal = draft.propose(2)
    assert (proposal.tokens, len(proposal.confidence)) == (text[6:8], 2)
    draft.close()
    assert len(draft.log) == 0


def test_draft_has_fewer_tokens_at_the_end_of_its_context() -> None:
    draft = ToyDraft(MODEL, max_context=4)
    draft.reset((1, 2), GREEDY, 2)
    assert len(draft.propose(5).tokens) == 2
    assert draft.propose(5).tokens == ()
    assert draft.propose(5).confidence == ()


def test_draft_refuses_to_roll_back_to_what_it_never_had() -> None:
    draft = ToyDraft(MODEL)
    draft.reset((1, 2), GREEDY, 2)
    with pytest.raises(LocalProtocolError, match="rollback to 3 of a draft engine with 2 tokens"):
        draft.rollback(3)


def test_garbage_draft_is_never_right_and_follows_its_own_path() -> None:
    inner = ToyDraft(MODEL)
    garbage = GarbageDraft(inner)
    garbage.reset((1, 2), GREEDY, 2)
    tokens = garbage.propose(3).tokens
    assert tokens[0] == stream(MODEL, (1, 2), 3)[2] + 1
    assert inner.log.tokens() == (1, 2, *tokens)
    garbage.rollback(3)
    garbage.extend((7,))
    assert inner.log.tokens() == (1, 2, tokens[0], 7)
    assert (garbage.capabilities, garbage.fingerprint) == (inner.capabilities, inner.fingerprint)
    garbage.close()
    assert len(inner.log) == 0


def test_target_selects_after_each_row_asked_for() -> None:
    target, text = ToyTarget(MODEL), stream(MODEL, (1, 2), 6)
    assert target.forward([chain(0, text[:4], first_selected=1)]) == [text[2:5]]
    target.keep("s", 0, (0, 1, 2, 3))
    assert target.forward([chain(4, text[4:5])]) == [text[5:6]]


def test_target_follows_each_branch_of_a_tree() -> None:
    target = ToyTarget(MODEL)
    tree = Rows("s", 0, (1, 2, 5, 6, 7), (-1, 0, 1, 1, 3), 1, GREEDY, 2)
    (selected,) = target.forward([tree])
    branches = [(1, 2), (1, 2, 5), (1, 2, 6), (1, 2, 6, 7)]
    assert selected == tuple(stream(MODEL, branch, len(branch) + 1)[-1] for branch in branches)
    target.keep("s", 0, (0, 1, 3))
    assert target.caches["s"].tokens() == (1, 2, 6)


def test_target_refuses_rows_that_are_no_path() -> None:
    target = ToyTarget(MODEL)
    target.forward([Rows("s", 0, (1, 2, 3), (-1, 0, 0), 0, GREEDY, 1)])
    with pytest.raises(LocalProtocolError, match=r"rows \(0, 1, 2\) are no path"):
        target.keep("s", 0, (0, 1, 2))


def test_target_refuses_rows_that_do_not_start_at_its_cache() -> None:
    with pytest.raises(LocalProtocolError, match="s: rows start at 1, the cache holds 0"):
        ToyTarget(MODEL).forward([chain(1, (1,))])


def test_target_forgets_what_it_is_told_to() -> None:
    target = ToyTarget(MODEL)
    target.forward([chain(0, (1, 2, 3))])
    target.keep("s", 0, (0, 1, 2))
    target.truncate("s", 1)
    assert target.caches["s"].tokens() == (1,)
    target.release("s")
    target.release("s")
    assert target.caches == {}
