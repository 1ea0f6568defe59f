"""Draft engines by name, loaded only when asked for."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_agent.config import DraftConfig
from edge_agent.engines.tokenizer import Tokenizer
from shared.engine import DraftEngine, EngineError
from shared.runtimes.hub import default_cache_dir
from shared.runtimes.llama_cpp import with_weights


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """An engine, and the model whose tokenizer and chat template go with it."""

    engine: DraftEngine
    model: Tokenizer


def _llama_cpp(config: DraftConfig, path: Path) -> LoadedDraft:
    from edge_agent.engines.llama_cpp import LlamaCppDraft

    if config.quantization is not None:
        path = with_weights(path, config.quantization, default_cache_dir())
    engine = LlamaCppDraft(path, context_tokens=config.context_tokens, threads=_threads(config))
    return LoadedDraft(engine, engine.model)


def _onnx(config: DraftConfig, path: Path) -> LoadedDraft:
    from edge_agent.engines.onnx import OnnxDraft

    engine = OnnxDraft(path, context_tokens=config.context_tokens, threads=_threads(config), provider=config.provider)
    return LoadedDraft(engine, engine.model)


def _threads(config: DraftConfig) -> int:
    return config.threads or os.cpu_count() or 1


ENGINES: dict[str, Callable[[DraftConfig, Path], LoadedDraft]] = {"llama_cpp": _llama_cpp, "onnx": _onnx}


def load_draft(config: DraftConfig, path: Path) -> LoadedDraft:
    """Load `draft.model` by `draft.engine` and check it. Raises `EngineError`."""
    from edge_agent.engines.selftest import check_draft

    loaded = ENGINES[config.engine](config, path)
    if not loaded.engine.capabilities.can_rollback:
        loaded.engine.close()
        raise EngineError(f"{path.name} cannot roll back its cache, so it cannot draft; use another draft model")
    check_draft(loaded.engine)
    return loaded
