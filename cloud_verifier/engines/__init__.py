"""The target engines by name. A runtime is imported only where it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cloud_verifier.config import TargetConfig
from cloud_verifier.engines.cost import CostKey, load_or_measure_cost
from shared.engine import EngineError, TargetEngine
from shared.runtimes.hub import resolve_model
from shared.vocabulary import Vocabulary

Progress = Callable[[str, float | None], None]
"""Told the stage (a few words for people) and how much of it is done, 0 to 1, or None where that is not known."""


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded, checked and measured engine and what is said about it to the edges; `vocabulary` is the engine's."""

    engine: TargetEngine
    vocabulary: Vocabulary
    model: str
    dtype: str
    runtime: str


def load_target(config: TargetConfig, progress: Progress) -> Target:
    """Load, self-test and measure the configured target; takes seconds to minutes. Raises `EngineError`."""
    return _FACTORIES[config.engine](config, progress)


def _torch(config: TargetConfig, progress: Progress) -> Target:
    path = resolve_model(config.model, "target model")  # a wrong name is told before the seconds of importing torch
    try:
        from cloud_verifier.engines.torch_engine import TorchTarget
    except ModuleNotFoundError as error:
        raise EngineError(
            f"engine torch needs the Python package {error.name!r}; pip install 'outrider[cloud]'"
        ) from error
    engine = TorchTarget.load(
        str(path),
        dtype=config.dtype,
        device=config.device,
        threads=config.threads,
        context_tokens=config.context_tokens,
        kv_cache_mb=config.kv_cache_mb,
        cache_dir=config.cache_dir,
        progress=progress,
        cost_of=partial(load_or_measure_cost, key=CostKey.of(config), cache_dir=config.cache_dir),
    )
    return Target(engine, engine.vocabulary, _public_name(config.model), config.dtype, "torch")


def _llama_cpp(config: TargetConfig, progress: Progress) -> Target:
    path = resolve_model(config.model, "target model")
    from cloud_verifier.engines.llama_cpp_engine import LlamaCppTarget

    engine = LlamaCppTarget.load(
        path,
        dtype=config.dtype,
        device=config.device,
        threads=config.threads,
        context_tokens=config.context_tokens,
        kv_cache_mb=config.kv_cache_mb,
        cache_dir=config.cache_dir,
        progress=progress,
        cost_of=partial(load_or_measure_cost, key=CostKey.of(config), cache_dir=config.cache_dir),
    )
    return Target(engine, engine.vocabulary, _public_name(config.model), config.dtype, "llama_cpp")


def _public_name(model: str) -> str:
    """The configured name; of a path only its end, for the folders of this machine are nobody's business."""
    path = Path(model).expanduser()
    return path.name if path.exists() else model


_FACTORIES: dict[str, Callable[[TargetConfig, Progress], Target]] = {"llama_cpp": _llama_cpp, "torch": _torch}
