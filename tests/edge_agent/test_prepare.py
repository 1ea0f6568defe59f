"""`prepare` without its makers: what it measures, prints and leaves behind."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_agent import __main__ as cli
from edge_agent import prepare as module
from edge_agent.engines import LoadedDraft
from shared.engine import EngineError
from shared.runtimes.huggingface import Progress, no_progress
from shared.testing.engines import HashModel, NoisyModel, ToyDraft

MODEL = HashModel(salt=3)


def toy(acceptance: float, eog_ids: frozenset[int] = frozenset(), template: str = "") -> LoadedDraft:
    tokenizer: Any = SimpleNamespace(
        chat_template=template, bos_text="", eos_text="", eog_ids=eog_ids, name="toy",
        tokenize=lambda text, **_: [1 + ord(letter) % 900 for letter in text],
    )  # fmt: skip
    return LoadedDraft(ToyDraft(NoisyModel(MODEL, acceptance, salt=1)), tokenizer)


def test_acceptance_is_the_share_of_the_full_models_tokens() -> None:
    texts = [f"text {number}" for number in range(20)]
    for acceptance in (1.0, 0.6, 0.0):
        measured, draft_ms = module.measure(toy(acceptance), toy(1.0), texts, no_progress)
        assert measured == pytest.approx(acceptance, abs=0.06)
        assert draft_ms >= 0


def test_what_follows_the_end_of_an_answer_does_not_count() -> None:
    draft = ToyDraft(MODEL)
    ends = frozenset(range(0, 1000, 2))  # every other token ends a text
    full = toy(1.0, ends, template="{{ messages[0].content }}")
    asked: list[int] = []

    class Counting(ToyDraft):
        def propose(self, n: int) -> Any:
            asked.append(n)
            return super().propose(n)

    module.measure(LoadedDraft(Counting(MODEL), full.model), full, ["one", "two"], no_progress)
    assert len(asked) < 40
    draft.close()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Makers that write a file and load toys; the folders they worked in."""
    folders: list[Path] = []

    def make(model: Path, work: Path, _threads: int, _progress: Progress) -> tuple[Path, LoadedDraft, LoadedDraft]:
        if model.name == "broken":
            raise EngineError("cannot be read")
        folders.append(work)
        (work / "small").mkdir()
        (work / "small" / "toy.gguf").write_bytes(b"12345")
        return work / "small", toy(1.0), toy(1.0)

    monkeypatch.setattr(module, "_make_onnx", make)
    monkeypatch.setattr(module, "_make_gguf", make)
    return folders


def test_the_folder_appears_complete_and_alone(made: list[Path], tmp_path: Path) -> None:
    prepared = module.prepare(Path("model"), "onnx", tmp_path / "deep" / "draft", 1, no_progress)
    assert (prepared.path, prepared.size_bytes, prepared.acceptance) == (tmp_path / "deep" / "draft", 5, 1.0)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["draft"]
    assert not made[0].exists()


@pytest.mark.usefixtures("made")
def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        module.prepare(Path("broken"), "gguf", tmp_path / "draft", 1, no_progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("made")
def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"exists; remove it or name another folder"):
        module.prepare(Path("model"), "onnx", tmp_path, 1, no_progress)


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(("to", "engine"), [("onnx", "onnx"), ("gguf", "llama_cpp")])
def test_the_command_says_what_it_made_and_how_to_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str, engine: str
) -> None:  # fmt: skip
    (tmp_path / "model.gguf").write_bytes(b"")
    out = tmp_path / "draft"
    arguments = ["edge-agent", "prepare", str(tmp_path / "model.gguf"), "--format", to, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    lines = capsys.readouterr().out.splitlines()
    path = out / "toy.gguf" if to == "gguf" else out
    assert lines[0].startswith(f"{path}: 0 MB, right for 100.0% of the full model's tokens, ")
    assert lines[1] == f"use it with: draft: {{engine: {engine}, model: {path}}}"


@pytest.mark.usefixtures("made")
def test_the_command_prints_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    arguments = ["edge-agent", "prepare", str(tmp_path / "model.gguf"), "--out", str(tmp_path / "draft"), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        cli.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"path", "size_bytes", "acceptance", "draft_ms"}
    assert printed["acceptance"] == 1.0
