"""A draft of 8-bit weights made from a GGUF file."""

from pathlib import Path

import pytest

from edge_agent.config import DraftConfig
from edge_agent.engines import load_draft
from shared.core.messages import Sampling
from shared.engine import EngineError
from shared.runtimes.llama_cpp import quantize

pytestmark = pytest.mark.models


def test_requantized_copy_is_made_once_and_drafts(
    default_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = DraftConfig(engine="llama_cpp", model="unused", quantization="q8_0", threads=1, context_tokens=256)
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
