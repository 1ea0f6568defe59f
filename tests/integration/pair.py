"""The real pair in one process: llama.cpp drafts, the target decides, gRPC between them."""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_verifier.config import load_cloud_config
from cloud_verifier.engines import Target
from cloud_verifier.serve import RunningVerifier, serving
from edge_agent.config import EdgeConfig, load_edge_config
from edge_agent.engines import LoadedDraft
from edge_agent.setup import make_agent, make_request
from shared.core.effects import Confirm, Emit, Finished, Provenance, Refused, Retract
from shared.core.messages import Sampling
from shared.core.selection import select
from shared.runtimes.huggingface import CausalLM
from shared.runtimes.llama_cpp import LlamaContext, LlamaModel
from shared.testing.engines import GarbageDraft

PROMPTS = (
    "Why is the sky blue?",
    "Tell me a story about a lighthouse keeper who finds a message in a bottle.",
    "Write a Python function that reverses a string.",
    "List the planets of the solar system, nearest first.",
    "Translate to French: the library opens at nine.",
    "What should I check before a long bicycle tour?",
)
GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.8, top_p=0.95, seed=1234)


@dataclass
class Shown:
    """What the user had in front of them at the end, and what was taken back or only local on the way there."""

    tokens: list[int] = field(default_factory=list)
    provenance: list[Provenance] = field(default_factory=list)
    refused: Refused | None = None
    finished: Finished | None = None
    report: dict[str, Any] = field(default_factory=dict)
    retracted: int = 0
    ever_local: int = 0

    def take(self, event: Emit | Confirm | Retract | Refused | Finished, prompt_len: int) -> None:
        """Apply one event; a gap or an overlap fails at once."""
        match event:
            case Emit(start=start, tokens=tokens, provenance=provenance):
                assert start == prompt_len + len(self.tokens), "lost or doubled tokens"
                self.tokens += tokens
                self.provenance += provenance
                self.ever_local += provenance.count(Provenance.LOCAL)
            case Retract(length=length):
                self.retracted += prompt_len + len(self.tokens) - length
                del self.tokens[length - prompt_len :]
                del self.provenance[length - prompt_len :]
            case Refused():
                self.refused = event
            case Finished():
                self.finished = event
            case Confirm():
                pass


class Plain(ABC):
    """The oracle: a runtime's own forward with its own cache, one token at a time, and the reference `select`."""

    @abstractmethod
    def feed(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """Evaluate tokens from position `start` on, 0 for a new text; the logits (vocabulary,) of the last."""

    def stream(self, prompt: tuple[int, ...], sampling: Sampling, n: int, stop_ids: frozenset[int]) -> list[int]:
        """The target stream: up to `n` tokens after the prompt, the stop token included."""
        tokens, fed = list(prompt), 0
        while len(tokens) < len(prompt) + n and not (len(tokens) > len(prompt) and tokens[-1] in stop_ids):
            logits = self.feed(tokens[fed:], fed)
            fed = len(tokens)
            tokens.append(select(logits, sampling, len(tokens), tokens, len(prompt)))
        return tokens[len(prompt) :]


class PlainTarget(Plain):
    """By transformers, a prompt in one forward."""

    def __init__(self, causal_lm: CausalLM) -> None:
        self._causal_lm = causal_lm
        self._cache: Any = None

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """See `Plain.feed`."""
        cache = self._cache if start else None
        ids = torch.tensor([list(tokens)])
        output = self._causal_lm.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        # Padded ids beyond the vocabulary can never be selected.
        size = self._causal_lm.vocabulary.fingerprint.size
        logits: NDArray[np.float32] = output.logits[0, -1, :size].float().numpy()
        return logits


class PlainLlamaCpp(Plain):
    """By llama.cpp, in float32 and one sequence, a prompt token by token too."""

    def __init__(self, file: Path) -> None:
        self._model = LlamaModel(file, gpu_layers=0)
        self._context = LlamaContext(self._model, context_tokens=1024, threads=1, exact=True)

    def feed(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """See `Plain.feed`."""
        if start == 0:
            self._context.remove(0, 0)
        *_, last = (self._context.decode([token], [start + n], [(0,)], (0,)) for n, token in enumerate(tokens))
        logits: NDArray[np.float32] = last[0]
        return logits

    def close(self) -> None:
        """Free the model."""
        self._context.close()
        self._model.close()


@contextlib.asynccontextmanager
async def verifier(target: Target, **overrides: object) -> AsyncIterator[RunningVerifier]:
    """A verifier on a free port; overrides are config keys with `__` for the dot."""
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    config = load_cloud_config(environ={}, overrides={"server.address": "127.0.0.1:0", **keys})
    async with serving(config, target) as running:
        yield running


def edge_config(address: str, **overrides: object) -> EdgeConfig:
    """The default edge with another address; overrides are config keys with `__` for the dot."""
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_edge_config(environ={}, overrides={"verifier.address": address, **keys})


async def answer(
    config: EdgeConfig, loaded: LoadedDraft, prompt: str, sampling: Sampling, garbage: bool = False
) -> Shown:
    """One answer through the real driver and channel; the engine stays open."""
    request = replace(make_request(config, loaded, prompt), sampling=sampling)
    engine = GarbageDraft(loaded.engine) if garbage else loaded.engine
    agent = make_agent(config, LoadedDraft(engine, loaded.model))
    shown = Shown()
    try:
        async for event in agent.answer(request):
            shown.take(event, len(request.prompt))
        shown.report = agent.report()
    finally:
        await agent.close(keep_engine=True)
    return shown


def run(coroutine: Any, timeout_s: float = 550.0) -> Any:
    """A coroutine to its end, or a failure instead of a hang."""
    return asyncio.run(asyncio.wait_for(coroutine, timeout_s))
