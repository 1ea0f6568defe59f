"""Two checkouts, or two drafts, in turn, each with processes of its own; mostly on engines that cost nothing."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.latency import Plan
from benchmarks.link import LinkSpec
from benchmarks.processes import ROOT, BenchError
from benchmarks.versions import versions


def instant_plan(tmp_path: Path) -> Plan:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1"}\n{"prompt": "2"}\n')
    return Plan([LinkSpec(0.0)], ["instant"], "instant", "float32", prompts, [], 2, 96, 1, 0.0, 0, ("outrider",))


def test_a_folder_that_is_no_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=rf"^{tmp_path} is no checkout of this project; make one with git worktree"):
        asyncio.run(versions(instant_plan(tmp_path), tmp_path, print))


@pytest.mark.parametrize(("factor", "num_identical"), [("7919", 2), ("7907", 0)])
def test_each_version_runs_its_own_code(tmp_path: Path, factor: str, num_identical: int) -> None:
    """The other checkout's engines have a text of their own, unless it is this one's."""
    other = tmp_path / "other"
    shutil.copytree(ROOT / "scripts" / "benchmarks", other / "scripts" / "benchmarks")
    for package in ("shared", "edge_agent", "cloud_verifier"):
        (other / package).symlink_to(ROOT / package)
    instant = other / "scripts" / "benchmarks" / "instant.py"
    assert "7919" in instant.read_text()
    instant.write_text(instant.read_text().replace("7919", factor))
    found = asyncio.run(versions(instant_plan(tmp_path), other, print))
    assert (found["pairs"], found["identical_pairs"]) == (2, num_identical)
    assert min(found["tpot_ms"]) > 0.0


def test_answers_without_a_time_per_token_are_no_pairs(tmp_path: Path) -> None:
    said = list[str]()
    with pytest.raises(BenchError, match=r"^0 pair\(s\) of answers with 16 tokens and more; give more prompts$"):
        asyncio.run(versions(replace(instant_plan(tmp_path), max_new_tokens=1), ROOT, said.append))
    assert [line.split(": ")[1] for line in said] == ["a short answer"] * 2


@pytest.mark.models
def test_two_drafts_of_one_checkout(tmp_path: Path) -> None:
    """Copies of what never came before are few; a model always drafts. The text is the target's with both."""
    plan = replace(instant_plan(tmp_path), drafts=["ngram", "llama_cpp"], engine="torch", max_new_tokens=32)
    found = asyncio.run(versions(plan, ROOT, print))
    assert (found["draft"], found["against_draft"]) == ("ngram", "llama_cpp")
    assert (found["pairs"], found["identical_pairs"]) == (2, 2)
    ours, theirs = found["num_accepted_tokens"]
    assert ours < theirs
