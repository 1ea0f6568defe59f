import pytest

from shared.core.draft_path import DraftPath
from shared.core.edge_session import EdgeSession
from shared.core.effects import Rollback
from shared.core.messages import Commit
from shared.core.messages import Draft as DraftMessage
from shared.core.siblings import Leaf, PathSiblings
from tests.core.edge import REQUEST, REVISE, SETTINGS, Ahead, redialled, sent, session_of
from tests.core.test_draft_path import NO_STOPS, sure

TWO = ((30, 0.5), (31, 0.5))


def siblings_of(*positions: int) -> PathSiblings:
    siblings = PathSiblings()
    for position in positions:
        siblings.put(position, [TWO])
    return siblings


def path_with_siblings() -> DraftPath:
    """Tokens 5, 6, 7 after a prompt of two, with two siblings each."""
    path = DraftPath((1, 2))
    path.draft(3, now=0.0)
    assert path.drafted((5, 6, 7), sure((5, 6, 7)), NO_STOPS, 0.0, [TWO, (), ((40, 0.4),)]) == []
    return path


def test_sibling_is_worth_what_those_before_it_leave_over() -> None:
    siblings = siblings_of(7)
    table = siblings.calibration.table[4]  # never seen: the prior
    assert table == pytest.approx(0.3)
    first, second = 0.8 * 0.5 * 0.3, 0.8 * 0.5 * 0.7 * 0.3
    both = [Leaf(7, 30, 128), Leaf(7, 31, 128)]
    assert siblings.choose(7, 0.8, [0.5], first + 0.001, 9) == []
    assert siblings.choose(7, 0.8, [0.5], first - 0.001, 9) == both[:1]
    assert siblings.choose(7, 0.8, [0.5], second - 0.001, 9) == both
    assert siblings.choose(7, 0.8, [0.5], 0.0, 1) == both[:1]
    assert siblings.num_sent(7) == 0
    assert siblings.num_sent(8) == 1


def test_further_down_the_path_a_sibling_is_worth_less() -> None:
    siblings = siblings_of(7, 8)
    assert [leaf.position for leaf in siblings.choose(7, 1.0, [0.5, 0.5], 0.14, 9)] == [7]
    assert [leaf.position for leaf in siblings.choose(7, 1.0, [0.5, 0.5], 0.07, 9)] == [7, 7, 8]


def test_good_draft_sends_none() -> None:
    assert siblings_of(7).choose(7, 1.0, [0.97], 0.03, 9) == []


def test_siblings_that_are_right_more_often_are_worth_more() -> None:
    siblings = PathSiblings()
    for position in range(50):
        siblings.put(position, [TWO])
        siblings.judged(position, 30, is_accepted=False)
    assert siblings.calibration.overall > 0.9
    siblings = siblings_of(*range(50))
    for position in range(50):
        siblings.judged(position, 99, is_accepted=False)
    assert siblings.calibration.overall < 0.1


def test_sibling_behind_the_right_one_is_not_judged() -> None:
    siblings, other = siblings_of(7), siblings_of(7)
    siblings.judged(7, 31, is_accepted=False)  # one wrong, one right
    other.judged(7, 30, is_accepted=False)
    assert siblings.calibration.overall < other.calibration.overall


def test_siblings_that_no_step_has_room_for_cease_but_for_the_best() -> None:
    siblings = PathSiblings()
    for position in range(300):
        siblings.put(position, [TWO])
        siblings.choose(position, 1.0, [0.2], 0.0, 9)
        siblings.judged(position, 30, is_accepted=False)
    siblings.put(300, [TWO])
    assert siblings.num_hits == 0
    assert siblings.choose(300, 1.0, [0.2], 0.2, 9) == []
    assert len(siblings.choose(300, 1.0, [0.2], 0.05, 9)) == 1


def test_sibling_that_was_not_sent_says_nothing_of_their_use() -> None:
    siblings, price = siblings_of(7, 8, 9), 0.8 * 0.3 - 0.001
    siblings.judged(7, 30, is_accepted=False)
    siblings.choose(8, 1.0, [0.2], 0.0, 1)
    siblings.judged(8, 31, is_accepted=False)
    siblings.calibration = PathSiblings().calibration
    assert len(siblings.choose(9, 1.0, [0.2], price, 9)) == 1


def test_path_is_sent_with_its_siblings() -> None:
    path = path_with_siblings()
    sent = path.send(2, 99, 0.02, now=0.0)
    assert sent.tokens == (5, 6, 7, 30, 31, 40)
    assert sent.confidence == bytes((255, 255, 255, 128, 128, 102))
    assert sent.parents == (-1, -1, 1)
    assert path.sent_siblings == 3
    assert path.send(2, 99, 0.02, now=0.0) == DraftMessage(5, path.log.hash_at(5), ())


def test_verifier_that_holds_little_gets_the_path_first() -> None:
    path = path_with_siblings()
    assert path.send(2, 6, 0.02, now=0.0).tokens == (5, 6, 7, 30)
    path.verifier_holds(5)
    assert path.sent_len == 4  # one of four may have been dropped: which, is not known
    assert path.send(2, 5, 0.02, now=0.0).tokens == (7,)


def test_commit_behind_a_sibling_is_a_hit() -> None:
    path = path_with_siblings()
    path.send(2, 99, 0.02, now=0.0)
    assert path.lay(2, (31, 9), 1, 0) == (0, [Rollback(2)])
    assert path.log.tokens() == (1, 2, 31, 9)
    assert path.siblings.num_hits == 1
    assert path.sent_siblings == 0
    assert repr(path.siblings).startswith("<PathSiblings at 0 positions, 1 hits")


def test_commit_along_the_path_keeps_the_siblings_beyond_it() -> None:
    path = path_with_siblings()
    path.send(2, 99, 0.02, now=0.0)
    assert path.lay(2, (5, 6), 1, 0) == (2, [])
    assert path.sent_siblings == 1
    assert path.lay(4, (40, 3), 1, 0) == (0, [Rollback(4)])
    assert path.siblings.num_hits == 1


def test_commit_of_a_position_lets_its_siblings_go() -> None:
    path = path_with_siblings()
    path.send(2, 99, 0.02, now=0.0)
    assert path.lay(2, (5,), 1, 0) == (1, [])
    assert path.sent_siblings == 1


def test_right_sibling_that_no_step_took_is_no_hit() -> None:
    path = path_with_siblings()
    path.send(2, 99, 0.02, now=0.0)
    path.lay(2, (31,), 0, 0)
    assert path.siblings.num_hits == 0


def test_siblings_of_a_draft_that_a_commit_overtook_are_those_that_are_left() -> None:
    path = DraftPath((1, 2))
    path.draft(2, now=0.0)
    path.lay(2, (5,), 0, 0)
    path.drafted((5, 6), sure((5, 6)), NO_STOPS, 0.0, [TWO, ((50, 0.5),)])
    assert path.send(3, 99, 0.0, now=0.0).tokens == (6, 50)


def test_siblings_of_a_path_that_was_cut_are_gone_with_it() -> None:
    path = path_with_siblings()
    path.lay(2, (9,), 0, 0)
    path.draft(2, now=0.0)
    path.drafted((5, 6), sure((5, 6)), NO_STOPS, 0.0)  # this time with none
    assert path.send(3, 99, 0.0, now=0.0).tokens == (5, 6)


def test_session_sends_siblings_that_are_worth_their_price_and_goes_on_behind_the_right_one() -> None:
    session = session_of()
    session.start(0.0)
    session.drafted((5, 6), (1.0, 1.0), 0.1, [TWO, TWO])
    *_, draft = sent(session.connected(1, 0.2))
    assert draft == DraftMessage(
        2, session.path.log.hash_at(2), (5, 6, 30, 31, 30, 31), b"\xff\xff\x80\x80\x80\x80", (-1, -1, 0, 0)
    )
    effects = session.receive(1, Commit(2, (5, 30, 9), num_drafted=5, num_accepted=2), 0.3)
    assert effects[0] == Rollback(3)
    assert session.path.log.tokens() == (1, 2, 5, 30, 9)
    assert session.path.siblings.num_hits == 1


def test_session_whose_siblings_are_not_worth_it_sends_a_chain() -> None:
    session = EdgeSession(REQUEST, SETTINGS, Ahead(2, price=0.1))
    session.start(0.0)
    session.drafted((5, 6), (1.0, 1.0), 0.1, [TWO, TWO])
    *_, draft = sent(session.connected(1, 0.2))
    assert draft == DraftMessage(2, session.path.log.hash_at(2), (5, 6), b"\xff\xff")


def test_siblings_are_sent_again_on_the_next_stream() -> None:
    session = session_of(REVISE)
    session.start(0.0)
    session.drafted((5, 6), (1.0, 1.0), 0.1, [TWO, ()])
    first = sent(session.connected(1, 0.2))[-1]
    session.disconnected(1, 0.3)
    stream = redialled(session, 0.3)
    again = [message for message in sent(session.connected(stream, 1.4)) if isinstance(message, DraftMessage)]
    assert again == [first]


def test_what_the_verifier_holds_counts_siblings() -> None:
    session = session_of(ahead=8)
    session.start(0.0)
    session.drafted((5,), (1.0,), 0.1, [TWO])
    session.connected(1, 0.2)  # 5 and both its siblings are sent
    session.receive(1, Commit(2, (), max_ahead=4), 0.3)
    session.drafted((6, 7), (1.0, 1.0), 0.4, [TWO, TWO])
    assert session.path.sent_len == 4
