"""The benchmarks from the command line: processes, real gRPC, and figures that can be read by a program."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), *arguments], capture_output=True, text=True, timeout=550, check=False
    )


def figures(*arguments: str) -> dict[str, Any]:
    ran = bench(*arguments, "--json")
    assert ran.returncode == 0, ran.stderr
    printed: dict[str, Any] = json.loads(ran.stdout)
    return printed


def test_overhead_is_measured_per_commit() -> None:
    measured = figures("overhead", "--tokens", "600", "--rounds", "2")
    assert measured["commit_overhead_ms"] > 0
    assert measured["tokens_per_s"] > 0
    assert measured["tokens_per_commit"] >= 1
    assert measured["versions"]["protobuf"]


def test_an_outage_loses_and_doubles_nothing() -> None:
    measured = figures("outage", "--outages", "1")
    for name in ("lost_tokens", "doubled_tokens", "wrong_tokens", "never_rejoined"):
        assert measured[name] == 0, name
    assert measured["stall_ms_p95"] > 0
    assert measured["each"][0]["for_s"] == 0.3


@pytest.mark.models
def test_latency_compares_the_ways_on_one_link() -> None:
    arguments = ("--rtt-ms", "20", "--num-prompts", "1", "--max-new-tokens", "24", "--dtype", "float32")
    report = figures("latency", *arguments, "--drafts", "llama_cpp,ngram")
    model, copies = report["cases"]
    assert (model["draft"], copies["draft"]) == ("llama_cpp", "ngram")
    names = ("cloud_only_tpot_ms", "stop_and_wait_tpot_ms", "outrider_tpot_ms", "limit_tpot_ms")
    for measured in (model, copies):
        assert all(measured[name] > 0 for name in names)
        assert measured["limit_fraction"] > 0  # over so few tokens it says nothing more
        assert measured["limit_beside_fraction"] > 0
        assert measured["identical"] is True
        assert list(measured["by_category"]) == ["writing"]
    assert model["cloud_only_tpot_ms"] == copies["cloud_only_tpot_ms"], "one answer serves both"
    assert model["local_tpot_ms"] > 0
    assert copies["local_tpot_ms"] is None
    assert list(model["draft_sources"]) == ["model"]
    assert model["bytes_up_per_token"] <= 16
    assert model["bytes_down_per_token"] <= 16


@pytest.mark.parametrize(
    "arguments", [("latency", "--drafts", "llama_cpp,oracle"), ("versions", ".", "--draft", "oracle")]
)
def test_a_draft_that_there_is_not_is_named(arguments: tuple[str, ...]) -> None:
    ran = bench(*arguments)
    assert ran.returncode == 2
    assert ran.stderr.startswith("bench: no draft is called oracle; there are configured, ")


def test_a_link_on_the_command_line_says_where_it_listens(tmp_path: Path) -> None:
    script = tmp_path / "link.yaml"
    script.write_text("steps: [{at_s: 0, up: {delay_ms: 5}}]")
    command = [sys.executable, str(BENCH), "link", "127.0.0.1:9", "--script", str(script), "--rtt-ms", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        said = running.stdout.readline()
        running.terminate()
    assert said.startswith("listening on 127.0.0.1:")
    assert said.endswith("for 127.0.0.1:9: 25 ms up, 25 ms down\n")
    assert bench("link", "nowhere").stderr == "bench: expected host:port of the verifier, got 'nowhere'\n"


@pytest.mark.models
def test_a_draft_window_keeps_memory_flat() -> None:
    arguments = ("--windows", "0,256", "--prompt-tokens", "1600", "--max-new-tokens", "16", "--num-texts", "1")
    whole, cut = figures("window", *arguments, "--draft", "llama_cpp")["cases"]
    assert (whole["window_tokens"], whole["acceptance_loss"]) == (0, 0)
    assert whole["right_rate"] > 0.8
    assert cut["resident_mb"] < whole["resident_mb"] - 10
    assert cut["resident_mb"] - cut["resident_mb_1000"] < 2
    assert cut["acceptance_loss"] == round(whole["right_rate"] - cut["right_rate"], 4)


def test_a_window_that_is_no_number_is_named() -> None:
    assert bench("window", "--windows", "0,big").stderr.startswith("bench: --windows 0,big: expected numbers")


@pytest.mark.models
@pytest.mark.slow  # it installs packages
def test_an_onnx_edge_answers_without_torch_and_without_a_compiler() -> None:
    measured = figures("footprint")
    assert measured["imports_torch"] is False
    assert len(measured["answer"].split()) > 10
    assert measured["installed_mb"] < 300
