"""Every plot is drawn from plain figures; what it looks like is for people to judge."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks import plots
from benchmarks.plots import WAYS

PNG = b"\x89PNG\r\n"


def case(rtt_ms: float) -> dict[str, Any]:
    tpots = {f"{way}_tpot_ms": 20.0 + index for index, way in enumerate(WAYS)}
    return {
        "link": f"{rtt_ms:g} ms",
        "rtt_ms": rtt_ms,
        "draft": "toy",
        "limit_tpot_ms": 15.0,
        "mean_acceptance_length": 2.5,
        "accepted_per_position": [0.9, 0.5],
        "spread": {name: [value - 2, value + 3] for name, value in tpots.items()},
        **tpots,
    }


def answer(**more: Any) -> dict[str, Any]:
    shown_at = [100.0 + 0.1 * index for index in range(8)]
    return {
        "began": 99.5,
        "prompt_tokens": 3,
        "shown_at": shown_at,
        "provenance": ["cloud", "accepted", "accepted", "local", "local", "local", "cloud", "accepted"],
        **more,
    }


def test_time_per_token_over_the_round_trip(tmp_path: Path) -> None:
    plots.tpot_by_rtt([case(50.0), case(10.0)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_of_several_drafts_the_one_on_most_links_is_shown_or_the_fastest() -> None:
    slow, fast = ({**case(50.0), "draft": name, "outrider_tpot_ms": tpot} for name, tpot in (("a", 30.0), ("b", 20.0)))
    assert plots.best_draft([slow, fast]) == "b"
    assert plots.best_draft([slow, fast, {**slow, "rtt_ms": 150.0}]) == "a"


def test_a_timeline_of_an_answer(tmp_path: Path) -> None:
    commit = {"event": "commit", "start": 3, "tokens": 2, "queue_ms": 0, "verify_ms": 30}
    notes = [
        {"event": "drafted", "began": 99.9, "at": 99.95, "start": 3, "tokens": 4},
        {"event": "sent", "at": 99.96, "start": 3, "tokens": 4},
        commit | {"at": 100.0, "num_drafted": 4, "num_accepted": 1},
        {"event": "rollback", "at": 100.001, "start": 5, "end": 7},
        {"event": "drafted", "began": 105.0, "at": 105.1, "start": 9, "tokens": 1},
    ]
    plots.timeline(answer(timeline=notes), 25.0, 500.0, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_acceptance_by_position(tmp_path: Path) -> None:
    plots.acceptance([case(50.0)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("back_at", [100.55, 200.0])
def test_an_outage_rejoined_or_not(tmp_path: Path, back_at: float) -> None:
    plots.outage(answer(), 100.25, back_at, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_capacity_over_the_number_of_sessions(tmp_path: Path) -> None:
    names = ("tpot_p50_ms", "tpot_p95_ms", "tokens_per_s", "goodput_tokens_per_s")
    points = [
        {"want": want, "sessions": sessions, **dict.fromkeys(names, 10.0 * sessions)}
        for want in ("STREAM", "SPECULATE")
        for sessions in (1, 4, 16)
    ]
    plots.capacity(points, 40.0, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
