import pytest

from shared.core.match_chances import MatchChances
from shared.core.rejected_path import RejectedPath

WRONG = 90


def rejected(*tokens: int, start: int = 10) -> RejectedPath:
    path = RejectedPath()
    path.replace(start, (WRONG, *tokens), end_hash=5)
    return path


@pytest.mark.parametrize(
    ("text", "match", "guess"),
    [
        ((80,), 0, (1, 2, 3)),  # in place of the wrong token: perhaps all goes on as it would have
        ((80, 1), 1, (2, 3, 4)),
        ((80, 81, 2), 1, (3, 4, 5)),  # shifted
        ((80, 1, 2, 3), 3, (4, 5)),
        ((80, 1, 2, 3, 4, 5), 0, ()),  # nothing follows
        ((80, 81), 0, ()),
        ((), 0, ()),
        ((WRONG,), 1, (1, 2, 3)),  # it came at another place
    ],
)
def test_text_that_comes_back_to_the_path_is_expected_to_follow_it(
    text: tuple[int, ...], match: int, guess: tuple[int, ...]
) -> None:
    assert rejected(1, 2, 3, 4, 5).guess(text, 3) == (match, guess)


def test_longest_match_counts_and_then_the_one_nearest_in_place() -> None:
    path = rejected(7, 1, 5, 5, 5, 8, 1, 6)
    assert path.guess((80, 8, 1), 1) == (2, (6,))
    assert path.guess((80, 81, 82, 1), 1) == (1, (5,))
    assert path.guess((80, 81, 82, 83, 84, 85, 1), 1) == (1, (6,))


def test_far_behind_a_rejection_nothing_is_guessed() -> None:
    path = rejected(1, 2, 3)
    assert path.guess((80,) * 63 + (2,), 2) == (1, (3,))
    assert path.guess((80,) * 64 + (2,), 2) == (0, ())


def test_path_goes_on_with_what_was_on_its_way() -> None:
    path = rejected(1, 2)
    path.follow(13, 4, (3,), 6)  # another hash
    path.follow(12, 5, (3,), 6)  # another place
    assert len(path) == 3
    path.follow(13, 5, (3, 4), 6)
    path.follow(13, 5, (3, 4), 6)  # again
    path.follow(15, 6, (5,), 7)
    assert path.guess((80, 2), 9) == (1, (3, 4, 5))


def test_path_is_bounded() -> None:
    path = rejected(*range(100))
    assert len(path) == 64
    path.follow(74, 5, (1,), 6)
    assert len(path) == 64
    path = rejected(*range(60))
    path.follow(71, 5, range(60), 6)
    assert len(path) == 64


def test_nothing_follows_no_path() -> None:
    path = RejectedPath()
    path.follow(0, 0, (1, 2), 3)
    assert not path
    assert path.guess((1,), 3) == (0, ())


def test_offer_is_worth_what_the_chances_say_and_is_learnt_from() -> None:
    path = rejected(1, 2, 3, 4)
    after = path.chances.after
    tokens, worth = path.offer((80, 1), 2)
    assert tokens == (2, 3)
    assert worth == pytest.approx([after(1), after(1) * after(2)])
    before = [after(length) for length in range(4)]
    path.judge((2, 9))
    assert after(1) > before[1]
    assert after(2) < before[2]
    assert (after(0), after(3)) == (before[0], before[3])
    path.judge((2, 3))  # no offer was made
    assert after(2) < before[2]
    assert RejectedPath(path.chances).chances.after(1) == after(1)


def test_what_comes_behind_a_wrong_guess_teaches_nothing() -> None:
    chances = MatchChances((0.5, 0.5, 0.5))
    chances.learn(0, (1, 2, 3), (9, 2, 3))
    assert [chances.after(length) for length in range(3)] == [pytest.approx(4 / 9), 0.5, 0.5]
    chances.learn(7, (1,), (1,))  # longer than known: as the longest
    assert chances.after(2) == chances.after(99) == pytest.approx(5 / 9)
    assert repr(chances) == "<MatchChances 0.44, 0.50, 0.56>"
