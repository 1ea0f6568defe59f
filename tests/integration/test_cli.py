"""The two commands as real processes: one answer, and every mistake in one line."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from cloud_verifier.engines import Target
from shared.testing.engines import HashModel, ToyTarget
from shared.vocabulary import Vocabulary
from tests.integration.pair import run, verifier

pytestmark = pytest.mark.models
BIN = Path(sys.executable).parent


def environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")}


def edge(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    argv = [str(BIN / "edge-agent"), *map(str, arguments)]
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=550, env={**environ(), **variables}, check=False
    )


def the_mistake(result: subprocess.CompletedProcess[str], exit_code: int = 2) -> str:
    """The one line on stderr; no traceback, the right exit code."""
    assert result.returncode == exit_code, result
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("edge-agent: ")
    return line.removeprefix("edge-agent: ")


@asynccontextmanager
async def verifier_process(*arguments: str) -> AsyncIterator[str]:
    """A real verifier; yields its address."""
    process = await asyncio.create_subprocess_exec(
        BIN / "cloud-verifier", "serve", "--address", "127.0.0.1:0", "--threads", "1", *arguments,
        stdout=asyncio.subprocess.PIPE, env=environ(),
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        assert line.startswith("listening on "), line
        yield line.split()[2]
    finally:
        process.terminate()
        assert await process.wait() == 0


def test_answer_through_two_processes() -> None:
    async def main() -> list[dict[str, object]]:
        async with verifier_process("--dtype", "float32") as address:
            process = await asyncio.create_subprocess_exec(
                BIN / "edge-agent", "run", "Why is the sky blue?", "--json",
                "--verifier", address, "--max-new-tokens", "24",
                stdout=asyncio.subprocess.PIPE, env=environ(),
            )  # fmt: skip
            output, _ = await process.communicate()
            assert process.returncode == 0
            return [json.loads(line) for line in output.decode().splitlines()]

    events = run(main(), timeout_s=550)
    tokens = [event for event in events if event["event"] == "tokens"]
    assert sum(len(event["tokens"]) for event in tokens) == 24
    assert {source for event in tokens for source in event["provenance"]} <= {"accepted", "cloud"}
    assert [event["event"] for event in events[-2:]] == ["finished", "statistics"]
    assert events[-1]["tokens"] == 24
    assert "sky" in "".join(text for event in tokens for text in event["text"])


def test_text_goes_to_standard_output_and_nothing_else() -> None:
    own = {"OUTRIDER_EDGE_DRAFT__ENGINE": "llama_cpp", "OUTRIDER_EDGE_DRAFT__QUANTIZATION": "null"}
    result = edge("run", "Why is the sky blue?", "--local", "--max-new-tokens", "8", **own)
    assert (result.returncode, result.stderr) == (0, "")
    # Which words is up to the weights and the CPU's kernels.
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert result.stdout.startswith("The sky" if has_avx512 else "The answer to this question")


def test_prompt_from_standard_input() -> None:
    result = subprocess.run(
        [BIN / "edge-agent", "run", "-", "--local", "--max-new-tokens", "4"],
        input="Why is the sky blue?", capture_output=True, text=True, timeout=550, env=environ(), check=True,
    )  # fmt: skip
    assert result.stdout.strip()


def test_config_prints_the_commented_defaults() -> None:
    result = edge("config")
    assert result.returncode == 0
    assert "max_stall_ms: 600" in result.stdout


class TestMistakes:
    def test_missing_model_file(self) -> None:
        line = the_mistake(edge("run", "hello", OUTRIDER_EDGE_DRAFT__MODEL="/no/such.gguf"))
        assert "/no/such.gguf" in line

    def test_file_that_is_not_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 not a model")
        line = the_mistake(edge("run", "hello", OUTRIDER_EDGE_DRAFT__MODEL=str(tmp_path / "model.gguf")))
        assert "GGUF" in line

    def test_broken_yaml(self, tmp_path: Path) -> None:
        (tmp_path / "edge.yaml").write_text("draft: [1,\n")
        line = the_mistake(edge("run", "hello", "--config", tmp_path / "edge.yaml"))
        assert "edge.yaml:" in line

    def test_unknown_key(self, tmp_path: Path) -> None:
        (tmp_path / "edge.yaml").write_text("link:\n  max_stal_ms: 100\n")
        line = the_mistake(edge("run", "hello", "--config", tmp_path / "edge.yaml"))
        assert "max_stal_ms" in line
        assert "max_stall_ms" in line

    def test_prompt_longer_than_the_context(self) -> None:
        line = the_mistake(edge("run", "word " * 300, OUTRIDER_EDGE_DRAFT__CONTEXT_TOKENS="128"))
        assert "context" in line

    def test_empty_prompt(self) -> None:
        line = the_mistake(edge("run", "", OUTRIDER_EDGE_GENERATION__CHAT="false"))
        assert "empty" in line

    def test_wrong_token_is_said_and_the_answer_stays_local(self) -> None:
        result = refused(token="wrong", server__token="right-token-of-good-length")
        assert "token" in the_mistake(result, exit_code=3)
        assert result.stdout.strip()

    def test_vocabulary_mismatch_names_the_first_differing_ids(self) -> None:
        line = the_mistake(refused(), exit_code=3)
        assert "vocabular" in line
        assert "id 0" in line


def refused(token: str = "", **overrides: object) -> subprocess.CompletedProcess[str]:
    """An edge that meets a verifier with another vocabulary, and perhaps another token."""
    words = Vocabulary(tuple(b"word%d" % token for token in range(1000)))
    toy = Target(ToyTarget(HashModel(1)), words, "toy", "float32", "toys")
    variables = {"OUTRIDER_EDGE_VERIFIER__TOKEN": token} if token else {}

    async def main() -> subprocess.CompletedProcess[str]:
        async with verifier(toy, **overrides) as running:
            arguments = ("run", "Why is the sky blue?", "--verifier", running.address, "--max-new-tokens", "30")
            return await asyncio.to_thread(edge, *arguments, **variables)

    result: subprocess.CompletedProcess[str] = run(main())
    return result
