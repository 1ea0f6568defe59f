"""Confidence calibrated on what a real pair did: two drafts of a real target on two dozen prompts."""

import numpy as np
import pytest

from shared.core.acceptance import Calibration
from shared.testing.recorded import Recording

WARM_UP_TOKENS, BINS = 200, 10


def calibration_error(predicted: list[float], accepted: list[bool]) -> float:
    """ECE: the gap between predicted and observed acceptance in ten ranges of prediction, weighted by their share."""
    probabilities, outcomes = np.array(predicted), np.array(accepted, dtype=float)
    ranges = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = [
        abs(probabilities[ranges == index].mean() - outcomes[ranges == index].mean()) * (ranges == index).mean()
        for index in np.unique(ranges)
    ]
    return float(sum(gaps))


@pytest.mark.parametrize("draft", ["q4_1", "q4_0"])
def test_calibrated_confidence_is_right_on_real_prompts_after_two_hundred_tokens(draft: str) -> None:
    recording = Recording.load()
    raw, calibrated, accepted = list[float](), list[float](), list[bool]()
    for tokens, drafts, confidences in zip(
        recording.tokens, recording.drafts[draft], recording.confidences[draft], strict=True
    ):
        calibration = Calibration()
        for position, (is_right, confidence) in enumerate(zip(tokens == drafts, confidences.tolist(), strict=True)):
            if position >= WARM_UP_TOKENS:
                raw.append(confidence / 255)
                calibrated.append(calibration.reach([confidence]))
                accepted.append(bool(is_right))
            judged = bytes((confidence,))
            calibration.observe(judged if is_right else b"", b"" if is_right else judged)
            calibration.refresh()
    assert len(accepted) > 1000
    assert calibration_error(calibrated, accepted) < 0.05 < calibration_error(raw, accepted)
