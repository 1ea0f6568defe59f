from dataclasses import replace

import pytest

from shared.core.cache_ledger import CacheLedger
from shared.core.cloud_session import CloudSession
from shared.core.effects import CloudEffect, Release, Share, Truncate
from shared.core.errors import LocalProtocolError
from shared.core.messages import Finish
from shared.core.tokens import TokenLog
from tests.core.verifier import SETTINGS, open_of

PROMPT = tuple(range(1, 41))  # two whole blocks and a half


def ledger_of(cache_blocks: int = 64, **changes: object) -> CacheLedger:
    changed = replace(SETTINGS, cache_blocks=cache_blocks, **changes)  # type: ignore[arg-type]  # by field
    return CacheLedger(changed)


def opened(
    ledger: CacheLedger, key: str, tokens: tuple[int, ...], now: float = 0.0, max_new_tokens: int = 40
) -> tuple[CloudSession, list[CloudEffect]]:
    """A session opens; its key says whose it is."""
    log = TokenLog(tokens)
    cached_len, effects = ledger.find(key, key.split("/")[0], log, now)
    session = CloudSession(key, open_of(key, tokens, max_new_tokens), log, cached_len, SETTINGS.session, now)
    return session, effects + ledger.opened(session)


def served(ledger: CacheLedger, session: CloudSession, now: float = 0.0, num_rows: int = 0) -> list[CloudEffect]:
    """A step that evaluates all that is uncached (or so many rows), and commits one token where that is all."""
    effects: list[CloudEffect] = []
    num_rows = num_rows or len(session.log) - session.cached_len
    assert ledger.make_room(session, num_rows, now, effects)
    assert session.offer(now) is not None
    session.take(num_rows, now)
    session.stepped((9,), 1.0, 8, now)
    ledger.served(session)
    ledger.check_integrity()
    return effects


def running(ledger: CacheLedger, key: str, tokens: tuple[int, ...] = PROMPT, now: float = 0.0) -> CloudSession:
    """A session that has been served once."""
    session, _ = opened(ledger, key, tokens, now)
    served(ledger, session, now)
    return session


def finished(ledger: CacheLedger, key: str, tokens: tuple[int, ...], now: float = 0.0) -> CloudSession:
    """A live session that has nothing more to do, and a cache."""
    session, _ = opened(ledger, key, tokens, now, max_new_tokens=1)
    served(ledger, session, now)
    assert session.finish is Finish.LENGTH
    return session


# -- its own cache ---------------------------------------------------------------------------------------------------


def test_parked_cache_is_found_again() -> None:
    ledger = ledger_of()
    session = running(ledger, "me/a")
    assert ledger.park(session, 1.0) == []
    assert (ledger.live, ledger.num_parked, ledger.used_blocks) == ([], 1, 3)
    assert ledger.parked_log("me/a").tokens() == (*PROMPT, 9)
    again, effects = opened(ledger, "me/a", (*PROMPT, 9, 5))
    assert (again.cached_len, effects, ledger.num_parked) == (40, [], 0)
    assert ledger.session("me/a") is again
    assert len(ledger.parked_log("me/a")) == 0


@pytest.mark.parametrize(
    ("tokens", "cached_len"),
    [
        ((*PROMPT[:30], 900, 901), 30),  # differs from there
        (PROMPT[:20], 19),  # never the last token: it is the next input
        ((*PROMPT, 8, 8, 8), 40),
    ],
)
def test_parked_cache_is_cut_to_what_is_the_same(tokens: tuple[int, ...], cached_len: int) -> None:
    ledger = ledger_of()
    ledger.park(running(ledger, "me/a"), 0.0)
    session, effects = opened(ledger, "me/a", tokens)
    assert session.cached_len == cached_len
    assert effects == ([] if cached_len == 40 else [Truncate("me/a", cached_len)])


def test_parked_cache_of_other_tokens_is_released() -> None:
    ledger = ledger_of()
    ledger.park(running(ledger, "me/a"), 0.0)
    session, effects = opened(ledger, "me/a", (900, 901))
    assert (session.cached_len, effects, ledger.used_blocks) == (0, [Release("me/a")], 0)


def test_cut_inside_of_a_shared_block_gives_the_block_up() -> None:
    ledger = ledger_of()
    session = running(ledger, "me/a")
    _, effects = opened(ledger, "me/b", PROMPT)
    assert effects == [Share("me/b", "me/a", 32)]
    ledger.park(session, 0.0)
    session, effects = opened(ledger, "me/a", (*PROMPT[:20], 900))
    assert (session.cached_len, effects) == (16, [Truncate("me/a", 16)])
    ledger.check_integrity()


# -- prefixes of others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "shared"), [(PROMPT, 32), (PROMPT[:33], 32), (PROMPT[:32], 16), (PROMPT[:17], 16)])
def test_whole_blocks_of_a_live_session_are_shared_but_never_the_last_token(
    tokens: tuple[int, ...], shared: int
) -> None:
    ledger = ledger_of()
    running(ledger, "me/a")
    session, effects = opened(ledger, "me/b", tokens)
    assert (session.cached_len, effects) == (shared, [Share("me/b", "me/a", shared)])
    assert ledger.used_blocks == 3


@pytest.mark.parametrize("tokens", [PROMPT[:16], (900, *PROMPT[1:]), (*PROMPT[:15], 900, *PROMPT[16:])])
def test_less_than_a_block_in_common_is_not_shared(tokens: tuple[int, ...]) -> None:
    ledger = ledger_of()
    running(ledger, "me/a")
    assert opened(ledger, "me/b", tokens)[1] == []


def test_longest_of_several_prefixes_is_shared() -> None:
    ledger = ledger_of()
    long = tuple(range(1, 101))
    for name, common in (("a", 20), ("b", 70), ("c", 50), ("d", 64)):
        running(ledger, f"me/{name}", (*long[:common], *range(500, 530)))
    _, effects = opened(ledger, "me/e", long)
    assert effects == [Share("me/e", "me/b", 64)]


@pytest.mark.parametrize("common", [16, 17, 31, 32, 47, 48, 79, 80, 95, 96])
def test_common_prefix_is_found_to_the_block(common: int) -> None:
    ledger = ledger_of()
    long = tuple(range(1, 101))
    running(ledger, "me/a", (*long[:common], *range(500, 600 - common)))
    assert opened(ledger, "me/b", long)[0].cached_len == common // 16 * 16


def test_only_what_is_cached_is_shared() -> None:
    ledger = ledger_of()
    session, _ = opened(ledger, "me/a", PROMPT)
    assert opened(ledger, "me/b", PROMPT)[1] == []
    served(ledger, session, num_rows=20)
    assert opened(ledger, "me/c", PROMPT)[1] == [Share("me/c", "me/a", 16)]


def test_parked_session_gives_its_prefix_and_so_do_the_tokens_it_committed() -> None:
    ledger = ledger_of()
    session = running(ledger, "me/a", (1, 2, 3))
    for _ in range(30):
        session.acknowledged(len(session.log), 0.0, 0.0, 0.0)
        served(ledger, session)
    turn = session.log.tokens()
    assert len(turn) == 34
    ledger.park(session, 0.0)
    assert opened(ledger, "me/b", (*turn, 5))[1] == [Share("me/b", "me/a", 32)]


def test_better_prefix_of_another_session_replaces_an_own_cache() -> None:
    ledger = ledger_of()
    ledger.park(running(ledger, "me/a", PROMPT[:10]), 0.0)
    running(ledger, "me/b")
    session, effects = opened(ledger, "me/a", PROMPT)
    assert (session.cached_len, effects) == (32, [Release("me/a"), Share("me/a", "me/b", 32)])


def test_own_cache_that_is_nearly_as_long_is_kept() -> None:
    ledger = ledger_of()
    running(ledger, "me/b")
    ledger.park(running(ledger, "me/a", PROMPT[:18]), 0.0)
    session, effects = opened(ledger, "me/a", PROMPT)
    assert (session.cached_len, effects) == (18, [])


def test_prefix_is_never_shared_across_identities_unless_the_operator_says_so() -> None:
    for shares, expected in ((False, []), (True, [Share("you/b", "me/a", 32)])):
        ledger = ledger_of(share_across_identities=shares)
        running(ledger, "me/a")
        assert opened(ledger, "you/b", PROMPT)[1] == expected


def test_evicted_or_forgotten_session_gives_no_prefix() -> None:
    ledger = ledger_of(park_timeout_ms=1_000.0)
    session = running(ledger, "me/a")
    session.failed()
    assert ledger.dropped(session) == [Release("me/a")]
    assert ledger.dropped(session) == []
    assert opened(ledger, "me/b", PROMPT)[1] == []
    ledger.park(running(ledger, "you/a"), 0.0)
    assert ledger.expire(1.0) == [Release("you/a")]
    assert opened(ledger, "you/b", PROMPT)[1] == []


# -- who makes room --------------------------------------------------------------------------------------------------


def test_room_is_made_by_the_longest_parked_then_the_idle_then_the_resident() -> None:
    ledger = ledger_of(cache_blocks=6, residency_ms=1_000.0)
    idle = finished(ledger, "me/idle", (1, 2), now=0.0)
    busy = running(ledger, "me/busy", (3, 4), now=0.1)
    late = running(ledger, "me/late", (5, 6), now=0.9)
    for name in ("p", "q"):
        ledger.park(running(ledger, f"me/{name}", (7, 8)), 0.0)
    session, _ = opened(ledger, "me/a", tuple(range(100, 195)))
    room: list[tuple[int, bool, list[CloudEffect]]] = []
    for num_rows in (16, 32, 48, 64, 80):
        effects: list[CloudEffect] = []
        room.append((num_rows, ledger.make_room(session, num_rows, 1.1, effects), effects))
    assert room == [
        (16, True, []),
        (32, True, [Release("me/p")]),
        (48, True, [Release("me/q")]),
        (64, True, [Release("me/idle")]),
        (80, True, [Release("me/busy")]),
    ]
    assert ledger.num_evicted == 4
    assert (idle.cached_len, busy.cached_len, late.cached_len) == (0, 0, 2)
    assert ledger.make_room(session, 96, 1.1, []) is False  # me/late has not had its time yet
    assert ledger.room_at(session) == pytest.approx(1.9)
    assert late.offer(1.9) is not None
    late.take(1, 1.9)
    assert ledger.make_room(session, 96, 1.9, []) is False  # it is in the same step
    late.failed()
    assert ledger.make_room(session, 96, 1.9, []) is True


def test_least_recently_served_makes_room_first() -> None:
    ledger = ledger_of(cache_blocks=3, residency_ms=0.0)
    sessions = [running(ledger, f"me/{name}", (1, 2)) for name in "abc"]
    served(ledger, sessions[0])
    assert [session.key for session in ledger.live] == ["me/b", "me/c", "me/a"]
    session, _ = opened(ledger, "me/d", (1, 2))
    assert served(ledger, session) == [Release("me/b")]


def test_session_whose_edge_does_not_keep_up_makes_room_before_its_time() -> None:
    ledger = ledger_of(cache_blocks=1, session=replace(SETTINGS.session, window_tokens=1))
    log = TokenLog((1, 2))
    cached_len, _ = ledger.find("me/a", "me", log, 0.0)
    window = replace(SETTINGS.session, window_tokens=1)
    slow = CloudSession("me/a", open_of("a", (1, 2)), log, cached_len, window, 0.0)
    ledger.opened(slow)
    served(ledger, slow)
    assert not slow.is_active
    session, _ = opened(ledger, "me/b", (1, 2))
    assert served(ledger, session) == [Release("me/a")]


def test_place_in_the_engine_is_room_too() -> None:
    ledger = ledger_of(cache_sessions=2)
    ledger.park(running(ledger, "me/a", (1, 2)), 0.0)
    finished(ledger, "me/b", (1, 2))
    third, effects = opened(ledger, "me/c", (1, 2))
    assert effects == []
    assert served(ledger, third) == [Release("me/a")]
    fourth, _ = opened(ledger, "me/d", (1, 2))
    assert served(ledger, fourth) == [Release("me/b")]
    assert opened(ledger, "me/e", (1, 2))[1] == []
    assert ledger.make_room(ledger.live[-1], 1, 0.0, []) is False


def test_prefix_is_not_shared_where_the_engine_takes_no_more_sessions() -> None:
    ledger = ledger_of(cache_sessions=1)
    running(ledger, "me/a")
    session, effects = opened(ledger, "me/b", PROMPT)
    assert (session.cached_len, effects) == (0, [])


def test_room_for_what_is_there_already_costs_nobody_anything() -> None:
    ledger = ledger_of(cache_blocks=2, residency_ms=0.0)
    session = running(ledger, "me/a", (1, 2))
    running(ledger, "me/b", (1, 2))
    assert served(ledger, session) == []
    assert ledger.num_evicted == 0


def test_residency_begins_with_the_first_block_and_not_with_each_step() -> None:
    ledger = ledger_of(cache_blocks=1, residency_ms=1_000.0)
    session = running(ledger, "me/a", (1, 2), now=0.0)
    served(ledger, session, now=0.9)
    other, _ = opened(ledger, "me/b", (1, 2), now=0.9)
    assert ledger.make_room(other, 2, 0.9, []) is False
    assert ledger.room_at(other) == pytest.approx(1.0)
    assert ledger.make_room(other, 2, 1.0, []) is True
    assert ledger.room_at(session) == pytest.approx(2.0)


def test_without_residents_room_never_comes_by_itself() -> None:
    ledger = ledger_of()
    session, _ = opened(ledger, "me/a", (1, 2))
    assert ledger.room_at(session) == float("inf")
    served(ledger, session)
    assert ledger.room_at(session) == float("inf")  # its own residency gives it no room


# -- what is kept, and for how long ----------------------------------------------------------------------------------


def test_parked_sessions_are_forgotten_when_their_time_is_over() -> None:
    ledger = ledger_of(park_timeout_ms=1_000.0)
    assert ledger.wake_at() is None
    ledger.park(running(ledger, "me/a"), 1.0)
    ledger.park(running(ledger, "me/b", (900,)), 1.5)
    never_cached, _ = opened(ledger, "me/c", (901,))
    ledger.park(never_cached, 1.6)
    assert ledger.wake_at() == pytest.approx(2.0)
    assert ledger.expire(1.9) == []
    assert ledger.expire(2.0) == [Release("me/a")]
    assert ledger.wake_at() == pytest.approx(2.5)
    assert ledger.expire(9.0) == [Release("me/b")]  # there is nothing of me/c in the engine
    assert (ledger.num_parked, ledger.used_blocks, ledger.wake_at()) == (0, 0, None)
    assert repr(ledger) == "<CacheLedger 0 live, 0 parked, <KvBlocks 64 of 64 free, 0 sessions>>"


def test_longest_parked_are_forgotten_where_there_are_too_many() -> None:
    ledger = ledger_of(max_sessions=2)
    first, second = running(ledger, "me/a"), running(ledger, "me/b", (900,))
    assert ledger.park(first, 0.0) == []
    assert opened(ledger, "me/c", (901,))[1] == [Release("me/a")]
    assert opened(ledger, "me/d", (902,))[1] == []
    assert ledger.park(second, 0.0) == [Release("me/b")]  # no place for it at all
    assert ledger.num_parked == 0


def test_source_of_a_prefix_that_is_trimmed_is_released_after_the_share() -> None:
    ledger = ledger_of(max_sessions=1)
    ledger.park(running(ledger, "me/a"), 0.0)
    assert opened(ledger, "me/b", PROMPT)[1] == [Share("me/b", "me/a", 32), Release("me/a")]
    assert ledger.used_blocks == 2
    ledger.check_integrity()


def test_only_active_sessions_count_against_the_room_for_another() -> None:
    ledger = ledger_of(cache_blocks=4)
    running(ledger, "me/a")  # three blocks
    finished(ledger, "me/b", (900,))
    ledger.park(running(ledger, "me/c", (901,)), 0.0)
    assert ledger.has_room(16)
    assert not ledger.has_room(17)


def test_step_that_wrote_into_shared_blocks_is_our_bug() -> None:
    ledger = ledger_of()
    session = running(ledger, "me/a")
    opened(ledger, "me/b", PROMPT)
    session.cached_len = 20
    with pytest.raises(LocalProtocolError, match=r"me/a .* wrote into shared blocks"):
        ledger.served(session)
