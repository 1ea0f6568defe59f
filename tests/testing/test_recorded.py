"""The recorded pair keeps the engines' contracts and plays what was recorded, whatever shape the steps have."""

from pathlib import Path

import numpy as np
import pytest

from shared.core.effects import Rows
from shared.core.errors import LocalProtocolError
from shared.core.messages import Sampling
from shared.testing.recorded import RecordedDraft, RecordedTarget, Recording

RECORDING = Recording.load()
PROMPT = RECORDING.prompt(3, 20, offset=7)


def target_of(cache_tokens: int = 1 << 20) -> RecordedTarget:
    return RecordedTarget(RECORDING, lambda _rows, _sessions: 0.0, cache_tokens)


def rows(start: int, tokens: tuple[int, ...], parents: tuple[int, ...] | None = None, first: int | None = None) -> Rows:
    chain = tuple(range(-1, len(tokens) - 1))
    return Rows("s", start, tokens, parents or chain, len(tokens) - 1 if first is None else first, Sampling(), 20)


def test_acceptance_of_the_shipped_drafts_is_what_the_real_pair_has() -> None:
    assert RECORDING.acceptance("q4_1") == pytest.approx(0.97, abs=0.02)
    assert RECORDING.acceptance("q4_0") == pytest.approx(0.81, abs=0.01)


def test_recording_is_the_same_after_it_was_kept(tmp_path: Path) -> None:
    RECORDING.save(tmp_path / "copy.npz")
    copy = Recording.load(tmp_path / "copy.npz")
    assert copy.fingerprint == RECORDING.fingerprint
    assert (copy.tokens == RECORDING.tokens).all()
    assert all((copy.drafts[name] == drafts).all() for name, drafts in RECORDING.drafts.items())
    assert all((copy.confidences[name] == sure).all() for name, sure in RECORDING.confidences.items())


def test_prompts_of_a_million_sessions_differ() -> None:
    prompts = {RECORDING.prompt(number, 4) for number in range(0, 1_000_000, 997)}
    assert len(prompts) == len(range(0, 1_000_000, 997))
    assert max(max(prompt) for prompt in prompts) < RECORDING.vocabulary_size


def test_prompt_that_cannot_say_what_to_play_is_refused() -> None:
    with pytest.raises(ValueError, match="4 tokens or more"):
        RECORDING.prompt(1, 3)


def test_text_begins_again_behind_its_end() -> None:
    length = RECORDING.tokens.shape[1]
    text = RECORDING.text(PROMPT, length + 5)
    assert text[:5] == text[length:]
    assert text[0] == RECORDING.tokens[3, 7]


def test_target_says_the_recorded_text_in_steps_of_any_shape() -> None:
    target, text, said = target_of(), RECORDING.text(PROMPT, 60), list[int]()
    assert target.forward([rows(0, PROMPT[:1], first=1)]) == [()]  # chunks of a prompt, the first too short to tell
    assert target.forward([rows(1, PROMPT[1:12], first=11)]) == [()]
    said += target.forward([rows(12, PROMPT[12:])])[0]
    random = np.random.default_rng(0)
    while len(said) < 50:
        tokens = (*PROMPT, *said)
        drafted = text[len(said) : len(said) + int(random.integers(0, 6))]
        (selected,) = target.forward([rows(len(tokens) - 1, (tokens[-1], *drafted), first=0)])
        target.keep("s", len(tokens) - 1, range(len(selected)))
        said += selected
    assert tuple(said) == text[: len(said)]


def test_branches_of_a_tree_get_what_their_depth_gets() -> None:
    target, text = target_of(), RECORDING.text(PROMPT, 3)
    (selected,) = target.forward([rows(0, (*PROMPT, 1, 2, 3), (*range(-1, 19), 19, 19, 21), first=19)])
    assert selected == (text[0], text[1], text[1], text[2])
    target.keep("s", 0, (*range(20), 21, 22))
    with pytest.raises(LocalProtocolError, match="22 tokens are cached"):
        target.forward([rows(20, (5,))])


def test_target_refuses_what_breaks_the_cache_rule() -> None:
    target = target_of()
    with pytest.raises(LocalProtocolError, match="0 tokens are cached"):
        target.forward([rows(1, PROMPT[1:])])
    target.forward([rows(0, (*PROMPT, 1, 2), (*range(-1, 19), 19, 19))])
    with pytest.raises(LocalProtocolError, match="no path"):
        target.keep("s", 0, (*range(20), 20, 21))
    with pytest.raises(LocalProtocolError, match="truncated to 23"):
        target.truncate("s", 23)
    with pytest.raises(LocalProtocolError, match="cannot share"):
        target.share("t", "s", 32)
    target.truncate("s", 16)
    target.share("t", "s", 16)
    with pytest.raises(LocalProtocolError, match="cannot share"):
        target.share("t", "s", 16)
    target.release("s")
    assert target.forward([Rows("t", 16, PROMPT[16:], (-1, 0, 1, 2), 3, Sampling(), 20)]) == [RECORDING.text(PROMPT, 1)]


def test_target_has_the_cost_and_the_room_that_it_was_given() -> None:
    target = RecordedTarget(RECORDING, lambda rows, sessions: rows + 100.0 * sessions, cache_tokens=100, max_rows=50)
    assert target.cost_ms(3) == 303.0
    assert target.cost_ms(100) == 6_500.0
    assert (target.limits.cache_tokens, target.limits.max_rows) == (96, 50)


def test_draft_is_right_where_the_recorded_one_was() -> None:
    draft, text = RecordedDraft(RECORDING, "q4_0"), RECORDING.text(PROMPT, 40)
    draft.reset(PROMPT, Sampling(), len(PROMPT))
    right, sure = list[bool](), list[float]()
    for index, token in enumerate(text):
        proposed = draft.propose(1)
        right.append(proposed.tokens == (token,))
        sure += proposed.confidence
        if not right[-1]:
            draft.rollback(len(PROMPT) + index)
            draft.extend((token,))
    recorded = np.roll(RECORDING.drafts["q4_0"][3] == RECORDING.tokens[3], -7)
    assert right == recorded[:40].tolist()
    assert sure == pytest.approx((np.roll(RECORDING.confidences["q4_0"][3], -7) / 255)[:40])


def test_behind_a_wrong_token_the_draft_never_comes_back_to_the_text() -> None:
    draft, text = RecordedDraft(RECORDING, "q4_0"), RECORDING.text(PROMPT, 40)
    draft.reset(PROMPT, Sampling(), len(PROMPT))
    proposed = draft.propose(40).tokens
    wrong = next(index for index, token in enumerate(text) if proposed[index] != token)
    assert wrong < 30
    assert set(proposed[wrong + 1 :]) == {0}
    draft.rollback(len(PROMPT) + wrong + 1)
    assert draft.propose(1).tokens == (0,), "the wrong one is still there"
    draft.rollback(len(PROMPT) + wrong)
    draft.extend(text[wrong : wrong + 1])
    assert draft.propose(1).tokens != (0,)


def test_draft_goes_on_from_where_it_is_after_rollback_and_extend() -> None:
    draft = RecordedDraft(RECORDING, "q4_1")
    draft.reset(PROMPT, Sampling(), len(PROMPT))
    proposed = draft.propose(10).tokens
    draft.rollback(len(PROMPT) + 4)
    assert draft.propose(2).tokens == proposed[4:6]
    draft.extend((1, 2))
    assert draft.propose(2).tokens == proposed[8:]
    with pytest.raises(LocalProtocolError, match="rollback to 99"):
        draft.rollback(99)
