"""Confidence calibrated on what a real pair did: two drafts of a real target on two dozen prompts."""

from collections.abc import Iterator

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


def judged_prompts(draft: str, carries: bool = False) -> Iterator[tuple[list[float], list[float], list[bool]]]:
    """Of each prompt: confidence as it is, as it was calibrated when its token came, and whether that was accepted."""
    recording = Recording.load()
    calibration = Calibration()
    for tokens, drafts, confidences in zip(
        recording.tokens, recording.drafts[draft], recording.confidences[draft], strict=True
    ):
        calibration = calibration.carried() if carries else Calibration()
        raw, calibrated = list[float](), list[float]()
        for is_right, confidence in zip(tokens == drafts, confidences.tolist(), strict=True):
            raw.append(confidence / 255)
            calibrated.append(calibration.reach([confidence]))
            judged = bytes((confidence,))
            calibration.observe(judged if is_right else b"", b"" if is_right else judged)
            calibration.refresh()
        yield raw, calibrated, (tokens == drafts).tolist()


def pooled_error(draft: str, which: int, part: slice, carries: bool = False, least: int = 1000) -> float:
    """Of that part of every prompt, `least` tokens in all; `which` is 0 for raw confidence, 1 for calibrated."""
    prompts = list(judged_prompts(draft, carries))
    assert sum(len(prompt[2][part]) for prompt in prompts) > least
    return calibration_error(
        [p for prompt in prompts for p in prompt[which][part]],
        [right for prompt in prompts for right in prompt[2][part]],
    )


@pytest.mark.parametrize("draft", ["q4_1", "q4_0"])
@pytest.mark.parametrize("carries", [False, True])
def test_calibrated_confidence_is_right_on_real_prompts_after_two_hundred_tokens(draft: str, carries: bool) -> None:
    warm = slice(WARM_UP_TOKENS, None)
    assert pooled_error(draft, 1, warm, carries) < 0.05 < pooled_error(draft, 0, warm)


@pytest.mark.parametrize("carries", [False, True])
def test_it_is_right_on_each_single_prompt_with_the_draft_that_is_shipped(carries: bool) -> None:
    for _, calibrated, accepted in judged_prompts("q4_1", carries):
        assert calibration_error(calibrated[WARM_UP_TOKENS:], accepted[WARM_UP_TOKENS:]) < 0.05


@pytest.mark.parametrize(("draft", "at_first", "carried"), [("q4_1", 0.05, 0.015), ("q4_0", 0.07, 0.06)])
def test_what_one_answer_taught_serves_the_next_from_its_first_token(
    draft: str, at_first: float, carried: float
) -> None:
    first, least = slice(0, 20), 450  # 24 prompts
    assert pooled_error(draft, 1, first, True, least) < carried < at_first < pooled_error(draft, 1, first, least=least)
