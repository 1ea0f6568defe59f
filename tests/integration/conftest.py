from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cloud_verifier.engines import Target
from cloud_verifier.engines.llama_cpp_engine import LlamaCppTarget
from cloud_verifier.engines.torch_engine import TorchTarget
from edge_agent.config import load_edge_config
from edge_agent.engines import LoadedDraft, load_draft
from shared.runtimes.hub import default_cache_dir
from shared.runtimes.huggingface import load_causal_lm
from shared.runtimes.llama_cpp import with_weights
from tests.integration.pair import PlainLlamaCpp, PlainTarget


@pytest.fixture(scope="session")
def target(default_model_path: Path) -> Target:
    engine = TorchTarget.load(str(default_model_path), dtype="float32", threads=1, context_tokens=1024)
    return Target(engine, engine.vocabulary, "SmolLM2", "float32", "torch")


@pytest.fixture(scope="session")
def llama_cpp_target(default_model_path: Path) -> Iterator[Target]:
    engine = LlamaCppTarget.load(default_model_path, dtype="float32", threads=1, context_tokens=1024, kv_cache_mb=256)
    yield Target(engine, engine.vocabulary, "SmolLM2", "float32", "llama_cpp")
    engine.close()


@pytest.fixture(scope="session")
def plain_llama_cpp_target(default_model_path: Path) -> Iterator[PlainLlamaCpp]:
    plain = PlainLlamaCpp(with_weights(default_model_path, "float32", default_cache_dir()))
    yield plain
    plain.close()


@pytest.fixture(scope="session")
def plain_target(default_model_path: Path) -> PlainTarget:
    torch.set_num_threads(1)
    return PlainTarget(load_causal_lm(default_model_path, "float32"))


@pytest.fixture(scope="session")
def draft(default_model_path: Path) -> Iterator[LoadedDraft]:
    config = load_edge_config(environ={}, overrides={"draft.context_tokens": 1024}).draft
    loaded = load_draft(config, default_model_path)
    yield loaded
    loaded.engine.close()
