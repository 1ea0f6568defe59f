"""A draft of 8-bit weights made from a GGUF file."""

from pathlib import Path

import pytest

from edge_agent import prepare
from edge_agent.config import load_edge_config
from edge_agent.engines import load_draft
from shared.core.messages import Sampling
from shared.engine import EngineError
from shared.runtimes.huggingface import no_progress
from shared.runtimes.llama_cpp import quantize

pytestmark = pytest.mark.models


def test_requantized_copy_is_made_once_and_drafts(
    default_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_edge_config(environ={}, overrides={"draft.quantization": "q8_0", "draft.context_tokens": 256}).draft
    for _ in range(2):
        loaded = load_draft(config, default_model_path)
        tokens = loaded.model.tokenize("The capital of France is")
        loaded.engine.reset(tokens, Sampling(), len(tokens))
        assert loaded.model.token_piece(loaded.engine.propose(1).tokens[0]) == b" Paris"
        loaded.engine.close()
    (copy,) = (tmp_path / "outrider").iterdir()
    assert copy.name.endswith(".q8_0.gguf")


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
