"""The drafts of the benchmarks by name. Real ones are settings of the edge; recorded and instant ones need no model."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.instant import FINGERPRINT, PROMPT_LEN, TEXT, InstantDraft
from edge_agent.config import EdgeConfig
from edge_agent.engines import load_draft
from edge_agent.setup import make_request
from shared.core.messages import Fingerprint, Sampling
from shared.core.settings import Request
from shared.engine import Capabilities, DraftEngine, Proposal
from shared.runtimes.hub import resolve_model
from shared.testing.engines import GarbageDraft
from shared.testing.recorded import RecordedDraft, Recording
from shared.vocabulary import Vocabulary

# What each name changes in the edge's configuration; `configured` is what file and environment say.
REAL: Mapping[str, Mapping[str, object]] = {
    "configured": {},
    "garbage": {},
    "llama_cpp": {"draft.engine": "llama_cpp"},
    "llama_cpp_q8_0": {"draft.engine": "llama_cpp", "draft.quantization": "q8_0"},
    "onnx": {"draft.engine": "onnx"},
    "ngram": {"draft.engine": "ngram"},
    "ngram+onnx": {"draft.engine": "ngram+onnx"},
    "ngram+llama_cpp": {"draft.engine": "ngram+llama_cpp"},
}
RECORDED_DRAFT_MS = 8.0
PROMPT_TOKENS = 64


@dataclass(frozen=True)
class LoadedSource:
    """A draft engine, and what makes a request of a question: its text, or the number of a session without a model."""

    engine: DraftEngine
    vocabulary: Vocabulary
    request: Callable[[Any], Request]


class PacedDraft:
    """A draft engine that takes `token_ms` for each token, without the processor."""

    def __init__(self, engine: DraftEngine, token_ms: float) -> None:
        self._engine = engine
        self._token_ms = token_ms

    @property
    def capabilities(self) -> Capabilities:
        """The engine's."""
        return self._engine.capabilities

    @property
    def fingerprint(self) -> Fingerprint:
        """The engine's."""
        return self._engine.fingerprint

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """See `DraftEngine`."""
        self._engine.reset(tokens, sampling, prompt_len)

    def extend(self, tokens: Sequence[int]) -> None:
        """See `DraftEngine`."""
        self._engine.extend(tokens)

    def propose(self, n: int) -> Proposal:
        """See `DraftEngine`."""
        time.sleep(self._token_ms * n / 1000)
        return self._engine.propose(n)

    def rollback(self, length: int) -> None:
        """See `DraftEngine`."""
        self._engine.rollback(length)

    def close(self) -> None:
        """See `DraftEngine`."""
        self._engine.close()


def load_source(draft: str, config: EdgeConfig) -> LoadedSource:
    """The draft of this name. Raises `EngineError`, `ConfigError`."""
    if draft == "instant":
        return _without_model(InstantDraft(), FINGERPRINT, lambda _: TEXT[:PROMPT_LEN])
    if draft == "recorded":
        recording = Recording.load()
        paced = PacedDraft(RecordedDraft(recording, "q4_1"), RECORDED_DRAFT_MS)
        return _without_model(paced, recording.fingerprint, lambda number: recording.prompt(number, PROMPT_TOKENS))
    loaded = load_draft(config.draft, resolve_model(config.draft.model, "draft.model"))
    engine = GarbageDraft(loaded.engine) if draft == "garbage" else loaded.engine
    return LoadedSource(engine, loaded.model.vocabulary, lambda prompt: make_request(config, loaded, prompt))


def _without_model(
    engine: DraftEngine, fingerprint: Fingerprint, prompt_of: Callable[[int], tuple[int, ...]]
) -> LoadedSource:
    vocabulary = Vocabulary(tuple(b"%d" % token for token in range(fingerprint.size)))
    return LoadedSource(
        engine, vocabulary, lambda number: Request(f"s{number}", prompt_of(number), 1 << 20, fingerprint)
    )
