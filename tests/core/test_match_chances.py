"""How often a copy is right: over all texts, and in the one at hand."""

import pytest

from shared.core.match_chances import MatchChances, TextChances

PRIOR = (0.0, 0.4, 0.8)


def test_a_new_text_is_like_all_others() -> None:
    assert [TextChances(PRIOR).after(length) for length in range(4)] == [0.0, 0.4, 0.8, 0.8]


@pytest.mark.parametrize(("was_right", "at_most", "at_least"), [(False, 0.55, 0.0), (True, 1.0, 0.95)])
def test_what_one_length_of_match_shows_tells_on_the_others_in_this_text(
    was_right: bool, at_most: float, at_least: float
) -> None:
    chances = TextChances(PRIOR)
    for _ in range(20):
        chances.observe(1, was_right)
    assert at_least <= chances.after(2) <= at_most


def test_the_next_text_keeps_only_what_was_learned_by_length() -> None:
    chances, plain = TextChances(PRIOR), MatchChances(PRIOR)
    for number in range(12):
        chances.observe(2, number % 3 == 0)
        plain.observe(2, number % 3 == 0)
    assert chances.after(2) < plain.after(2)
    chances.begin_text()
    assert [chances.after(length) for length in range(3)] == [plain.after(length) for length in range(3)]
    assert repr(chances).startswith("<TextChances 0.00, 0.40, ")


def test_a_chance_is_never_above_one() -> None:
    chances = TextChances((0.0, 0.4, 0.95))
    for _ in range(20):
        chances.observe(1, True)
    assert chances.after(2) == 1.0
