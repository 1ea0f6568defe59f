from dataclasses import replace

import pytest

from shared.core.effects import Share
from shared.core.messages import Close, Finish, Heartbeat
from tests.core.verifier import SETTINGS, Verifier, draft_after, open_of, target_text


def test_sessions_that_share_go_on_alone() -> None:
    """Each commits its own text, and either may go first."""
    verifier = Verifier()
    system = tuple(range(1, 34))
    verifier.open(1, open_of("a", (*system, 50)))
    verifier.step()
    verifier.open(2, open_of("b", (*system, 60)))
    verifier.open(3, open_of("c", (*system, 50)))
    verifier.step()
    verifier.receive(1, Close())
    for _ in range(40):
        verifier.step()
        verifier.tick(0.1)
    assert [effect for effect in verifier.effects if isinstance(effect, Share)] == [
        Share("me/b", "me/a", 32),
        Share("me/c", "me/a", 32),
    ]
    assert verifier.text(2, (*system, 60)) == target_text((*system, 60), 74)
    assert verifier.text(3, (*system, 50)) == target_text((*system, 50), 74)


def test_two_sessions_that_do_not_fit_together_take_turns_and_both_finish() -> None:
    settings = replace(
        SETTINGS, cache_blocks=6, residency_ms=200.0, session=replace(SETTINGS.session, context_length=90)
    )
    verifier = Verifier(settings)
    prompts = [tuple(range(first, first + 33)) for first in (100, 200)]
    for stream, prompt in enumerate(prompts):
        verifier.open(stream, open_of(f"s{stream}", prompt, 55))
    turns: list[str] = []
    for _ in range(1_000):
        turns += [key for key in verifier.step() if turns[-1:] != [key]]
        verifier.tick(0.02)
        for session in verifier.table.sessions:
            stream = int(session.key[-1])
            verifier.receive(stream, Heartbeat(1, len(session.log)))
    for stream, prompt in enumerate(prompts):
        assert verifier.text(stream, prompt) == target_text(prompt, 88)
    assert 2 <= verifier.table.ledger.num_evicted < 30  # turns, not a fight over every step


def test_verifier_wakes_when_room_may_come() -> None:
    settings = replace(SETTINGS, cache_blocks=2, residency_ms=500.0)
    verifier = Verifier(settings)
    for stream, tokens in enumerate(((1, 2, 3), (4, 5, 6))):
        verifier.open(stream, open_of(f"s{stream}", tokens))
    verifier.step()
    for _ in range(14):  # until one of them needs both blocks
        verifier.step()
    for stream in (0, 1):
        verifier.receive(stream, Heartbeat(1, 3))
    verifier.step()
    wake_at = verifier.table.wake_at()
    assert wake_at == pytest.approx(0.5)
    verifier.tick(0.5)
    assert verifier.step() != []
    assert verifier.table.ledger.num_evicted == 1


def test_thousand_idle_sessions_keep_to_the_budget_and_each_goes_on_rightly() -> None:
    window = replace(SETTINGS.session, window_tokens=4)
    verifier = Verifier(replace(SETTINGS, cache_blocks=64, max_sessions=1_000, session=window))
    prompts = [(1 + stream % 900, 1 + stream // 900, 7) for stream in range(1_000)]
    groups = [range(first, first + 50) for first in range(0, 1_000, 50)]
    for group in groups:
        for stream in group:
            verifier.open(stream, open_of(f"s{stream}", prompts[stream], max_new_tokens=8))
        while verifier.step():
            pass  # until no edge of theirs keeps up
        assert verifier.table.ledger.used_blocks <= 64
    assert len(verifier.table.sessions) == 1_000
    assert verifier.table.ledger.num_evicted >= 1_000 - 64
    for group in groups:
        for stream in group:
            verifier.receive(stream, Heartbeat(1, 7))
            verifier.receive(stream, draft_after(target_text(prompts[stream], 7), target_text(prompts[stream], 9)[7:]))
        while verifier.step():
            pass
    for stream, prompt in enumerate(prompts):
        assert verifier.text(stream, prompt) == target_text(prompt, 11)
        assert verifier.commits(stream)[-1].finish is Finish.LENGTH
