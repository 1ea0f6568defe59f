"""A draft of 8-bit weights made from a GGUF file."""

from pathlib import Path

import pytest
import structlog.testing
from benchmarks.pruned import without_layers

from edge_agent import prepare
from edge_agent.config import DraftConfig, load_edge_config
from edge_agent.engines import load_draft
from edge_agent.engines.llama_cpp import faster_file
from shared.core.messages import Sampling
from shared.engine import EngineError
from shared.runtimes.huggingface import no_progress
from shared.runtimes.llama_cpp import LlamaModel, quantize, with_weights

pytestmark = pytest.mark.models


def llama_cpp(**settings: str) -> DraftConfig:
    overrides = {"engine": "llama_cpp", "context_tokens": 256, **settings}
    return load_edge_config(environ={}, overrides={f"draft.{key}": value for key, value in overrides.items()}).draft


def test_requantized_copy_is_made_once_and_drafts(
    default_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = llama_cpp(quantization="q8_0")
    for _ in range(2):
        loaded = load_draft(config, default_model_path)
        tokens = loaded.model.tokenize("The capital of France is")
        loaded.engine.reset(tokens, Sampling(), len(tokens))
        assert loaded.model.token_piece(loaded.engine.propose(1).tokens[0]) == b" Paris"
        loaded.engine.close()
    (copy,) = (tmp_path / "outrider").iterdir()
    assert copy.name.endswith(".q8_0.gguf")


def weights_of(config: DraftConfig, path: Path) -> str:
    """The file that this configuration drafts with."""
    loaded = load_draft(config, path)
    loaded.engine.close()
    assert isinstance(loaded.model, LlamaModel)
    return loaded.model.name


@pytest.mark.parametrize(
    ("processor", "gpu", "is_copied"),
    [("x86_64", False, True), ("x86_64", True, False), ("aarch64", False, False)],
)
def test_slow_weights_are_copied_where_they_are_slow(
    default_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processor: str,
    gpu: bool,
    is_copied: bool,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr("edge_agent.engines.llama_cpp.has_gpu", lambda: gpu)
    config = llama_cpp()
    assert config.quantization == "auto"
    name = weights_of(config, default_model_path)
    assert name.endswith(".q8_0.gguf") == is_copied
    assert (tmp_path / "outrider").exists() == is_copied
    if is_copied:
        copy = tmp_path / "outrider" / name
        assert weights_of(config, copy) == name, "8 bits are fast"
        own = config.model_copy(update={"quantization": None})
        assert weights_of(own, default_model_path) == default_model_path.name


def test_a_slow_file_serves_where_no_copy_can_be_kept(
    default_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "file").write_text("no folder")
    with structlog.testing.capture_logs() as logs:
        assert faster_file(default_model_path, tmp_path / "file") == default_model_path
    (line,) = logs
    assert line["event"] == "no copy for faster drafts can be kept"
    assert str(tmp_path / "file") in line["error"]


def test_files_whose_names_differ_behind_a_dot_have_copies_of_their_own(
    default_model_path: Path, tmp_path: Path
) -> None:
    """They shared one: a pruned draft's copy in 8 bits was that of the whole model."""
    pruned = without_layers(default_model_path, (24, 25, 26), tmp_path)
    copies = [with_weights(path, "q8_0", tmp_path) for path in (default_model_path, pruned)]
    sizes = [copy.stat().st_size for copy in copies]
    assert sizes[1] < sizes[0]
    assert all(copy.name.endswith(".q8_0.gguf") for copy in copies)


def test_what_is_not_gguf_is_not_requantized(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no")
    with pytest.raises(EngineError, match="not GGUF"):
        quantize(tmp_path / "model.gguf", "q8_0", tmp_path / "copy.gguf")
    assert not (tmp_path / "copy.gguf").exists()


def test_prepare_makes_a_gguf_file_of_8_bits_and_measures_it(
    default_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_TEXTS", prepare._TEXTS[:2])
    prepared = prepare.prepare(default_model_path, "gguf", tmp_path / "draft", 1, no_progress)
    assert [path.name for path in (tmp_path / "draft").iterdir()] == [prepared.path.name]
    assert prepared.path.name.endswith(".q8_0.gguf")
    assert prepared.acceptance >= 0.9  # of 96 tokens
    with pytest.raises(EngineError, match=r"a GGUF draft is made of a GGUF file"):
        prepare.prepare(tmp_path, "gguf", tmp_path / "other", 1, no_progress)
