import pytest

from shared.core.effects import Confirm, Emit, Provenance, Retract
from shared.core.messages import Commit
from shared.core.tokens import TokenLog
from shared.core.transcript import Transcript

ACCEPTED, CLOUD, LOCAL = Provenance.ACCEPTED, Provenance.CLOUD, Provenance.LOCAL


def test_local_tokens_are_shown_once() -> None:
    transcript, log = Transcript(2), TokenLog((1, 2, 3, 4))
    assert transcript.show_local(log) == [Emit(2, (3, 4), (LOCAL, LOCAL))]
    assert transcript.show_local(log) == []
    assert transcript.shown_len == 4


def test_committed_tokens_are_shown_with_where_they_came_from() -> None:
    transcript, log = Transcript(2), TokenLog((1, 2, 3, 4, 5))
    commit = Commit(2, (3, 4, 5), num_drafted=4, num_accepted=2)
    assert transcript.show_committed(log, commit, 2, 5) == [Emit(2, (3, 4, 5), (ACCEPTED, ACCEPTED, CLOUD))]
    assert transcript.shown_len == 5


def test_rest_of_a_commit_that_was_seen_in_part_is_shown() -> None:
    transcript, log = Transcript(3), TokenLog((1, 2, 3, 4, 5))
    commit = Commit(2, (3, 4, 5), num_drafted=2, num_accepted=2)
    assert transcript.show_committed(log, commit, 3, 5) == [Emit(3, (4, 5), (ACCEPTED, CLOUD))]


def test_repeated_commit_shows_nothing() -> None:
    transcript, log = Transcript(4), TokenLog((1, 2, 3, 4))
    assert transcript.show_committed(log, Commit(2, (3, 4)), 4, 4) == []


@pytest.mark.parametrize(
    ("tokens", "differs_at", "effects", "shown_len"),
    [
        ((3, 4), 4, [Confirm(4)], 5),  # right so far: the fifth stays unverified
        ((3, 4, 5), 5, [Confirm(5)], 5),
        ((3, 4, 5, 6), 5, [Confirm(5), Emit(5, (6,), (CLOUD,))], 6),
        ((3, 9), 3, [Confirm(3), Retract(3), Emit(3, (9,), (CLOUD,))], 4),
        ((9,), 2, [Retract(2), Emit(2, (9,), (CLOUD,))], 3),
    ],
)
def test_local_tokens_are_confirmed_or_taken_back(
    tokens: tuple[int, ...], differs_at: int, effects: list[Confirm | Retract | Emit], shown_len: int
) -> None:
    transcript, local = Transcript(2), TokenLog((1, 2, 3, 4, 5))
    transcript.show_local(local)
    log = TokenLog((1, 2, *tokens))
    assert transcript.show_committed(log, Commit(2, tokens), 2, differs_at) == effects
    assert transcript.shown_len == shown_len


def test_confirmed_token_of_a_later_path_is_not_shown_again() -> None:
    transcript, log = Transcript(2), TokenLog((1, 2, 3, 4))
    transcript.show_local(log)
    log.extend((5,))
    assert transcript.show_committed(log, Commit(2, (3, 4, 5), 3, 2), 2, 5) == [Confirm(4), Emit(4, (5,), (CLOUD,))]
