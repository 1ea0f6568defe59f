"""Draft engines by name, loaded only when asked for."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from edge_agent.config import DraftConfig
from edge_agent.engines.cached_draft import CachedDraft
from edge_agent.engines.lookup_draft import MOST_GUESSED, LookupDraft
from edge_agent.engines.ngram import SOURCE as NGRAM
from edge_agent.engines.ngram import NgramDraft
from edge_agent.engines.row_costs import measure_row_costs
from edge_agent.engines.selftest import check_draft
from edge_agent.engines.tokenizer import Tokenizer
from shared.engine import DraftEngine, EngineError
from shared.runtimes.hub import default_cache_dir
from shared.runtimes.llama_cpp import LlamaModel, with_weights


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """An engine, and the model whose tokenizer and chat template go with it."""

    engine: DraftEngine
    model: Tokenizer


_log = structlog.get_logger(__name__)
_MOST_TEXT_BYTES = 4 << 20  # with its index a text takes some 25 times its size in memory
ModelLoader = Callable[[DraftConfig, Path], tuple[CachedDraft, Tokenizer]]


def _llama_cpp(config: DraftConfig, path: Path) -> tuple[CachedDraft, Tokenizer]:
    from edge_agent.engines.llama_cpp import LlamaCppDraft, faster_file

    if config.quantization == "auto":
        path = faster_file(path, default_cache_dir())
    elif config.quantization is not None:
        path = with_weights(path, config.quantization, default_cache_dir())
    engine = LlamaCppDraft(
        path, context_tokens=config.context_tokens, window_tokens=config.window_tokens, threads=_threads(config)
    )
    return engine, engine.model


def _onnx(config: DraftConfig, path: Path) -> tuple[CachedDraft, Tokenizer]:
    from edge_agent.engines.onnx import OnnxDraft

    if path.is_file():
        from edge_agent.engines.onnx_builder import with_onnx

        path = with_onnx(path, default_cache_dir())
    engine = OnnxDraft(
        path,
        context_tokens=config.context_tokens,
        window_tokens=config.window_tokens,
        threads=_threads(config),
        provider=config.provider,
    )
    return engine, engine.model


def _auto(config: DraftConfig, path: Path) -> tuple[CachedDraft, Tokenizer]:
    """The faster one of those installed that can have this model, as far as was measured: see `default.yaml`."""
    from edge_agent.engines.onnx import CPU
    from edge_agent.engines.onnx_builder import can_be_onnx, is_installed

    if path.is_dir() or config.provider != CPU or not _has_llama_cpp():
        return _onnx(config, path)
    from edge_agent.engines.llama_cpp import is_slow

    if not is_installed():
        return _llama_cpp(config, path)
    if not is_slow(path):
        as_it_is = None if config.quantization == "auto" else config.quantization  # or the file would be asked again
        return _llama_cpp(config.model_copy(update={"quantization": as_it_is}), path)
    try:
        if can_be_onnx(path, default_cache_dir()):
            return _onnx(config, path)
    except (EngineError, OSError) as error:
        _log.warning("no faster draft can be made; llama.cpp drafts", file=str(path), error=str(error))
    return _llama_cpp(config, path)


def _has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def _threads(config: DraftConfig) -> int:
    return config.threads or os.cpu_count() or 1


MODELS: dict[str, ModelLoader] = {"auto": _auto, "llama_cpp": _llama_cpp, "onnx": _onnx}


def load_draft(config: DraftConfig, path: Path) -> LoadedDraft:
    """Load `draft.model` by `draft.engine` and check it. Raises `EngineError`."""
    if config.engine == NGRAM:
        tokenizer = _tokenizer(path)
        return LoadedDraft(_ngrams(config, tokenizer, config.context_tokens), tokenizer)
    *before, name = config.engine.split("+")
    model, tokenizer = MODELS[name](config, path)
    if not model.capabilities.can_rollback:
        model.close()
        raise EngineError(f"{path.name} cannot roll back its cache, so it cannot draft; use another draft model")
    check_draft(model)
    if not before and not model.can_check:
        return LoadedDraft(model, tokenizer)
    lookup = _ngrams(config, tokenizer, model.capabilities.max_context) if before else None
    return LoadedDraft(LookupDraft(model, measure_row_costs(model, 1 + MOST_GUESSED), lookup), tokenizer)


def _ngrams(config: DraftConfig, tokenizer: Tokenizer, max_context: int) -> NgramDraft:
    text, file = "", config.texts_file
    if file is not None:
        if file.stat().st_size > _MOST_TEXT_BYTES:
            raise EngineError(
                f"draft.texts_file {file} has more than {_MOST_TEXT_BYTES >> 20} MB; keep the latest part"
            )
        text = file.read_text(encoding="utf-8", errors="replace")
    return NgramDraft(tokenizer.vocabulary.fingerprint, max_context, tokenizer.tokenize(text))


def _tokenizer(path: Path) -> Tokenizer:
    """The text side of a model that does not run."""
    if path.is_file() and _has_llama_cpp():
        return LlamaModel(path, vocabulary_only=True)
    from edge_agent.engines.onnx_builder import with_onnx
    from edge_agent.engines.onnx_folder import OnnxFolder

    return OnnxFolder(with_onnx(path, default_cache_dir()) if path.is_file() else path)
