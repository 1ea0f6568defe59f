"""Models that are made once for all tests of this folder."""

from pathlib import Path

import pytest

from edge_agent import prepare
from shared.runtimes.huggingface import no_progress


@pytest.fixture(scope="session")
def prepared_onnx(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> prepare.Prepared:
    """The default draft as `edge-agent prepare` makes it; a minute."""
    return prepare.prepare(default_model_path, "onnx", tmp_path_factory.mktemp("onnx") / "draft", 1, no_progress)
