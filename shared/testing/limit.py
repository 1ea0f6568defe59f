"""How fast a pair could be: the best of all fixed settings, by simulation.

The limit is clairvoyant in its setting, not in its tokens: the setting is chosen with hindsight for this very text,
draft, link and target, but it must verify what it cannot know. A controller that changes its mind within a text may
be faster; an oracle that knew which drafts will be accepted would say nothing about what can be reached.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.testing.fixed import CLOUD_ONLY, Setting, all_settings, tpot_ms
from shared.testing.speed import Situation


@dataclass(frozen=True, slots=True)
class Limit:
    """Best reachable time per output token, ms, the setting that reaches it, and what cloud-only takes."""

    tpot_ms: float
    setting: Setting
    cloud_only_ms: float


def best_reachable(situation: Situation, is_right: Sequence[bool], warm_up_tokens: int) -> Limit:
    """The limit for measured durations and a text where the draft at each position is right or not.

    `is_right` must go on for `speed.MARGIN` tokens behind the end of what is measured.
    """
    by_setting = {
        setting: tpot_ms(setting, situation, is_right, warm_up_tokens) for setting in all_settings(situation.rate)
    }
    best = min(by_setting, key=lambda setting: by_setting[setting])
    return Limit(by_setting[best], best, by_setting[CLOUD_ONLY])
