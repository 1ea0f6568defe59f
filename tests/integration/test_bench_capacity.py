"""The capacity benchmark from the command line: processes, real gRPC, and figures that can be read by a program."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), "capacity", *arguments], capture_output=True, text=True, timeout=550, check=False
    )


def test_capacity_of_a_recorded_target_is_printed_as_one_object() -> None:
    ran = bench("--sessions", "4", "--seconds", "3", "--search-seconds", "1", "--json")
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout)
    for name in ("tpot_p50_ms", "tpot_p95_ms", "goodput_tokens_per_s", "jain_index_all", "scheduler_ms_per_step"):
        assert figures[name] > 0
    for name in ("overhead_fraction", "sessions_in_slo_speculative", "sessions_in_slo_cloud_only", "capacity_ratio"):
        assert name in figures
    assert figures["label"].startswith("emulated")
    assert figures["sessions"] == 4
    assert (figures["wrong_tokens"], figures["local_tokens"], figures["refused"]) == (0, 0, 0)
    assert figures["cloud_only"]["tokens_per_s"] > 0


def test_run_that_shows_too_little_says_what_to_do() -> None:
    ran = bench("--sessions", "1", "--seconds", "1", "--json")
    assert ran.returncode == 2
    assert ran.stderr == "bench: no answer was completed in time; give more --seconds or fewer --sessions\n"
