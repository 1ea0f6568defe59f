"""Faults planted in the core: a simulator that misses one of them proves nothing about it."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from shared.core import cloud_session, draft_path, draft_tree, edge_session, link, step_in_flight, transcript
from shared.core import effects as fx
from shared.core.errors import ProtocolError
from shared.core.messages import CloudMessage, Commit, Draft
from shared.core.tokens import TokenLog
from shared.testing.scenarios import play

Plant = Callable[[pytest.MonkeyPatch], None]
Judged = tuple[list[int], tuple[int, ...]]


def accept_one_too_many(patch: pytest.MonkeyPatch) -> None:
    judge = step_in_flight.StepInFlight.judge

    def fault(self: step_in_flight.StepInFlight, selected: tuple[int, ...], stop_ids: frozenset[int]) -> Judged:
        accepted, tokens = judge(self, selected, stop_ids)
        following = accepted[-1] + 1 if accepted else 0
        if following < len(self.nodes):
            return [*accepted, following], (*tokens[:-1], self.nodes[following].token, selected[1 + following])
        return accepted, tokens

    patch.setattr(step_in_flight.StepInFlight, "judge", fault)


def forget_next_token(patch: pytest.MonkeyPatch) -> None:
    judge = step_in_flight.StepInFlight.judge

    def fault(self: step_in_flight.StepInFlight, selected: tuple[int, ...], stop_ids: frozenset[int]) -> Judged:
        accepted, tokens = judge(self, selected, stop_ids)
        return accepted, tokens[: len(accepted) or 1]

    patch.setattr(step_in_flight.StepInFlight, "judge", fault)


def graft_on_any_prefix(patch: pytest.MonkeyPatch) -> None:
    graft = draft_tree.DraftTree.graft

    def fault(self: draft_tree.DraftTree, draft: Draft) -> draft_tree.Grafted:
        stands = draft.start <= len(self._log)
        return graft(self, replace(draft, parent_hash=self._log.hash_at(draft.start)) if stands else draft)

    patch.setattr(draft_tree.DraftTree, "graft", fault)


def listen_to_any_stream(patch: pytest.MonkeyPatch) -> None:
    receive = edge_session.EdgeSession.receive

    def fault(self: edge_session.EdgeSession, _stream: int, message: CloudMessage, now: float) -> list[fx.EdgeEffect]:
        return receive(self, self._dialler.stream, message, now)

    patch.setattr(edge_session.EdgeSession, "receive", fault)


def never(_link: link.Link) -> float:
    return float("inf")


def trust_silence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(link.Link, "stalled_at", property(never))


def forget_to_roll_back(patch: pytest.MonkeyPatch) -> None:
    cut = draft_path.DraftPath._cut

    def fault(self: draft_path.DraftPath, length: int) -> list[fx.Rollback]:
        cut(self, length)
        return []

    patch.setattr(draft_path.DraftPath, "_cut", fault)


def show_local_tokens_again(patch: pytest.MonkeyPatch) -> None:
    show_committed = transcript.Transcript.show_committed

    def fault(
        self: transcript.Transcript, log: TokenLog, commit: Commit, start: int, differs_at: int
    ) -> list[fx.Confirm | fx.Retract | fx.Emit]:
        self.shown_len = min(self.shown_len, start)
        return show_committed(self, log, commit, start, differs_at)

    patch.setattr(transcript.Transcript, "show_committed", fault)


def miscount_the_cache(patch: pytest.MonkeyPatch) -> None:
    stepped = cloud_session.CloudSession.stepped

    def fault(
        self: cloud_session.CloudSession, selected: tuple[int, ...], verify_ms: float, max_ahead: int, now: float
    ) -> cloud_session.Stepped:
        result = stepped(self, selected, verify_ms, max_ahead, now)
        self.cached_len -= 1
        return result

    patch.setattr(cloud_session.CloudSession, "stepped", fault)


def retract_verified_tokens(patch: pytest.MonkeyPatch) -> None:
    show_committed = transcript.Transcript.show_committed

    def fault(
        self: transcript.Transcript, log: TokenLog, commit: Commit, start: int, differs_at: int
    ) -> list[fx.Confirm | fx.Retract | fx.Emit]:
        effects = show_committed(self, log, commit, start, differs_at)
        return [fx.Retract(start - 1) if isinstance(effect, fx.Retract) else effect for effect in effects]

    patch.setattr(transcript.Transcript, "show_committed", fault)


def verify_without_bound(patch: pytest.MonkeyPatch) -> None:
    init = cloud_session.CloudSession.__init__

    def fault(self: cloud_session.CloudSession, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]  # passed through untouched
        self._settings = replace(self._settings, max_draft_rows=100)

    patch.setattr(cloud_session.CloudSession, "__init__", fault)


def keep_the_first_rows(patch: pytest.MonkeyPatch) -> None:
    stepped = cloud_session.CloudSession.stepped

    def fault(
        self: cloud_session.CloudSession, selected: tuple[int, ...], verify_ms: float, max_ahead: int, now: float
    ) -> cloud_session.Stepped:
        result = stepped(self, selected, verify_ms, max_ahead, now)
        return replace(result, kept_rows=tuple(range(len(result.kept_rows))))

    patch.setattr(cloud_session.CloudSession, "stepped", fault)


def wait_for_commits_for_ever(patch: pytest.MonkeyPatch) -> None:
    tick = edge_session.EdgeSession.tick

    def fault(self: edge_session.EdgeSession, now: float) -> list[fx.EdgeEffect]:
        self._patience_until = float("inf")
        return tick(self, now)

    patch.setattr(edge_session.EdgeSession, "tick", fault)


def hang_siblings_one_token_later(patch: pytest.MonkeyPatch) -> None:
    send = draft_path.DraftPath.send

    def fault(self: draft_path.DraftPath, settled_len: int, held_len: int, price: float, now: float) -> Draft:
        draft = send(self, settled_len, held_len, price, now)
        return replace(draft, parents=tuple([parent + 1 for parent in draft.parents]))

    patch.setattr(draft_path.DraftPath, "send", fault)


PLANTS: list[tuple[Plant, int]] = [
    (accept_one_too_many, 5),
    (forget_next_token, 5),
    (graft_on_any_prefix, 60),
    (listen_to_any_stream, 600),
    (trust_silence, 200),
    (forget_to_roll_back, 5),
    (show_local_tokens_again, 60),
    (miscount_the_cache, 5),
    (retract_verified_tokens, 200),
    (verify_without_bound, 20),
    (keep_the_first_rows, 40),
    (wait_for_commits_for_ever, 500),
    (hang_siblings_one_token_later, 20),
]


@pytest.mark.parametrize(("plant", "seeds"), PLANTS, ids=[plant.__name__ for plant, _ in PLANTS])
def test_planted_fault_is_noticed(plant: Plant, seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert any(is_noticed(seed) for seed in range(seeds))


def is_noticed(seed: int) -> bool:
    """Whether a check of the simulator, of a toy engine or of the core itself speaks up."""
    try:
        return bool(play(seed).violations)
    except (AssertionError, IndexError, KeyError, ProtocolError):
        return True
