"""The fast simulations: what the machines reach, what fixed settings reach, and that the two agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import pytest

from shared.core.messages import Want
from shared.core.policies import Allotment, DraftObservation, Offer
from shared.core.settings import CloudSettings, SelfDecode
from shared.policy.run_ahead import RunAhead
from shared.policy.scheduler import BestRate
from shared.testing.fixed import CLOUD_ONLY, Setting, all_settings, stop_and_wait, tpot_ms
from shared.testing.limit import best_reachable
from shared.testing.speed import MARGIN, WRONG, Script, Situation, Speed, TimedPair
from shared.testing.sweep import CURVES, SLOW_RATE, Cell, cells, compare

TOKENS, WARM_UP = 600, 100


@dataclass(frozen=True)
class FixedDrafts:
    """The edge's half of a fixed setting."""

    setting: Setting

    def draft_tokens(self, seen: DraftObservation) -> int:
        return int(seen.ahead_tokens < self.setting.depth)

    def send_in_ms(self, seen: DraftObservation, is_drafting: bool) -> float:
        return 0.0 if seen.unsent_tokens >= self.setting.chunk or not is_drafting else inf

    def sibling_price(self, seen: DraftObservation) -> float:
        return inf


class FixedSteps:
    """The verifier's half; its patience begins with its last step."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def allot(self, offers: Sequence[Offer]) -> Allotment:
        (offer,), setting = offers, self._setting
        left_ms = min(setting.patience_ms, 250.0) - offer.waited_ms  # at the end of the text the edge stops
        if len(offer.worth) < setting.hold and left_ms > 1e-6 and offer.outlook is not None and not offer.prefill_rows:
            return Allotment([0], left_ms, setting.hold)
        return Allotment([offer.prefill_rows + 1 + min(len(offer.worth), setting.rows)])


def script_of(acceptance: float) -> tuple[Script, list[bool]]:
    script = Script.of_acceptance(acceptance, WARM_UP + TOKENS + MARGIN, seed=3)
    return script, [token == draft for token, draft in zip(script.tokens, script.drafts, strict=True)]


def test_a_long_script_repeats_nothing() -> None:
    """Or the verifier would look the rest of the text up in its beginning, which no fixed setting can."""
    script = Script.of_acceptance(0.9, 5000, seed=1)
    assert len({*script.tokens, WRONG}) == 5001


def machines(setting: Setting, situation: Situation, acceptance: float) -> Speed:
    script, _ = script_of(acceptance)
    cloud = CloudSettings(context_length=1 << 20, self_decode=SelfDecode.ALWAYS, max_draft_rows=48)
    pair = TimedPair(situation, script, FixedDrafts(setting), FixedSteps(setting), cloud)
    return pair.run(WARM_UP)


@pytest.mark.parametrize(
    ("setting", "situation", "acceptance"),
    [
        (stop_and_wait(4), Situation(5.0, 20.0, CURVES["flat"]), 0.8),
        (stop_and_wait(8), Situation(1.0, 50.0, CURVES["steep"]), 0.9),
        (Setting(16, 8, 0, 0.0), Situation(5.0, 50.0, CURVES["flat"]), 0.8),
        (Setting(48, 16, 0, 0.0), Situation(1.0, 20.0, CURVES["steep"]), 0.9),
        (Setting(16, 8, 4, inf), Situation(1.0, 5.0, CURVES["flat"]), 0.8),
        (Setting(8, 4, 4, 20.0), Situation(0.5, 5.0, CURVES["flat"]), 0.6),
        (Setting(4, 2, 0, 0.0), Situation(20.0, 20.0, CURVES["flat"]), 0.6),
        (Setting(16, 8, 0, 0.0, 4), Situation(5.0, 50.0, CURVES["flat"], SLOW_RATE), 0.8),
        (CLOUD_ONLY, Situation(5.0, 50.0, CURVES["flat"]), 0.8),
    ],
    ids=str,
)
def test_fast_model_agrees_with_the_machines(setting: Setting, situation: Situation, acceptance: float) -> None:
    _, is_right = script_of(acceptance)
    expected_ms = tpot_ms(setting, situation, is_right, WARM_UP)
    assert machines(setting, situation, acceptance).tpot_ms == pytest.approx(expected_ms, rel=0.05)


def test_cloud_only_takes_a_step_a_token() -> None:
    situation = Situation(5.0, 50.0, CURVES["steep"])
    script, is_right = script_of(0.9)
    assert tpot_ms(CLOUD_ONLY, situation, is_right, WARM_UP) == pytest.approx(14.0)
    streamed = TimedPair(situation, script, RunAhead(), BestRate(lambda rows: 14.0 * rows, 64), want=Want.STREAM)
    assert streamed.run(WARM_UP).tpot_ms == pytest.approx(14.0)


def test_stop_and_wait_takes_what_its_rounds_take() -> None:
    """Four right drafts a round: 4 * 5 ms to draft, 20 ms of link, a step of five rows; five tokens."""
    is_right = [True] * (WARM_UP + 400 + MARGIN)
    found = tpot_ms(stop_and_wait(4), Situation(5.0, 20.0, CURVES["flat"]), is_right, WARM_UP)
    assert found == pytest.approx((20 + 20 + 30 * 1.12) / 5)


def test_slow_link_delays_every_message_by_its_bytes() -> None:
    is_right = [True] * (WARM_UP + 400 + MARGIN)
    situation = Situation(5.0, 20.0, CURVES["flat"], SLOW_RATE)
    assert tpot_ms(stop_and_wait(4), situation, is_right, WARM_UP) == pytest.approx(
        (20 + 20 + 30 * 1.12 + (76 + 18 + 4 * 4) / SLOW_RATE) / 5
    )


def test_settings_have_names() -> None:
    names = [str(setting) for setting in all_settings(inf)]
    assert names[:2] == ["cloud-only", "stop-and-wait 1"]
    assert "16 ahead, 8 rows, 1 a message" in names
    assert "48 ahead, 16 rows, holds inf ms for 8, 1 a message" in names
    assert len(set(names)) == len(names) == 139
    assert len(list(all_settings(SLOW_RATE))) == 165


def test_limit_is_the_best_fixed_setting() -> None:
    _, is_right = script_of(0.8)
    situation = Situation(5.0, 50.0, CURVES["flat"])
    limit = best_reachable(situation, is_right, WARM_UP)
    assert limit.cloud_only_ms == pytest.approx(30.0)
    assert limit.tpot_ms == tpot_ms(limit.setting, situation, is_right, WARM_UP) < 21.0


def test_grid_covers_what_is_promised() -> None:
    grid = list(cells())
    assert len(set(grid)) == len(grid) == 180
    assert {cell.draft_ms for cell in grid} >= {0.05, 20.0}
    assert {cell.rtt_ms for cell in grid} >= {5.0, 150.0}
    assert CURVES["steep"][1:3] + CURVES["steep"][8:9] == (14.0, 29.0, 45.0)
    assert CURVES["flat"][16] == pytest.approx(30 + 15 * 0.9)


@pytest.mark.parametrize(
    "cell",
    [
        Cell("flat", 0.05, 5.0, inf, 0.8),
        Cell("flat", 1.0, 20.0, inf, 0.6),
        Cell("flat", 5.0, 50.0, inf, 0.8),
        Cell("steep", 0.05, 5.0, inf, 0.3),
        Cell("steep", 20.0, 50.0, inf, 0.9),
        Cell("flat", 5.0, 50.0, SLOW_RATE, 0.6),
        Cell("flat", 5.0, 20.0, inf, 0.97),
        # Worth asking ahead for: on these the edge aimed at a step and missed it (1.12 to 1.17).
        Cell("flat", 1.0, 20.0, inf, 0.97),
        Cell("flat", 1.0, 50.0, inf, 0.97),
        Cell("flat", 0.05, 50.0, SLOW_RATE, 0.97),
    ],
    ids=str,
)
def test_controllers_are_near_the_limit_and_never_below_cloud_only(cell: Cell) -> None:
    compared = compare(cell, seed=1)
    assert compared.vs_best_fixed < 1.07
    assert compared.vs_cloud_only > 0.97


class Silent(RunAhead):
    """Answers nothing after the first tokens, although its drafts were good."""

    def draft_tokens(self, seen: DraftObservation) -> int:
        return super().draft_tokens(seen) if seen.settled_tokens < WARM_UP else 0


@pytest.mark.parametrize(("curve", "rtt_ms"), [("flat", 20.0), ("flat", 50.0), ("steep", 20.0), ("steep", 5.0)])
def test_an_edge_that_falls_silent_costs_no_more_than_cloud_only(curve: str, rtt_ms: float) -> None:
    compared = compare(Cell(curve, 1.0, rtt_ms, inf, 0.97), seed=1, policy=Silent(), warm_up_tokens=WARM_UP + 50)
    assert compared.vs_cloud_only > 0.97


def test_energy_knob_trades_drafts_for_time() -> None:
    cell = Cell("flat", 5.0, 50.0, inf, 0.6)
    full, saving = (compare(cell, 1, policy=RunAhead(draft_duty=duty)).ours for duty in (1.0, 0.5))
    assert saving.drafted_tokens < 0.6 * full.drafted_tokens
    assert saving.tpot_ms < 31.0
