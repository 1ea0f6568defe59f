"""The draft engine on llama.cpp: one GGUF model, one sequence."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.engines.cached_draft import CachedDraft
from shared.core.messages import Fingerprint
from shared.engine import Capabilities, EngineError
from shared.runtimes.llama_cpp import LlamaContext, LlamaModel

_SEQUENCE = 0


class LlamaCppDraft(CachedDraft):
    """`DraftEngine` over a GGUF file."""

    def __init__(
        self, path: Path, *, context_tokens: int = 0, threads: int = 1, batch_tokens: int = 512, gpu_layers: int = -1
    ) -> None:
        """Load the model, with room for `context_tokens` (0: what it was trained for). Raises `EngineError`."""
        self.model = LlamaModel(path, gpu_layers=gpu_layers)
        trained = self.model.trained_context_tokens
        max_context = min(context_tokens or trained, trained)
        try:
            self._context = LlamaContext(
                self.model, context_tokens=max_context, threads=threads, batch_tokens=batch_tokens
            )
        except EngineError:
            self.model.close()
            raise
        capabilities = Capabilities(self._probe_rollback(), can_tree=False, max_context=max_context)
        super().__init__(path.name, batch_tokens, capabilities)

    @property
    def fingerprint(self) -> Fingerprint:
        """The vocabulary that its token ids belong to."""
        return self.model.vocabulary.fingerprint

    def close(self) -> None:
        """Free the model; no other call may follow."""
        self._context.close()
        self.model.close()

    def _evaluate(self, start: int, stop: int, num_logits: int) -> NDArray[np.float32]:
        rows = range(start, stop)
        wanted = range(len(rows) - num_logits, len(rows))
        return self._context.decode(self._tokens[start:stop], rows, [(_SEQUENCE,)] * len(rows), wanted)

    def _remove(self, length: int) -> bool:
        return self._context.remove(_SEQUENCE, length)

    def _probe_rollback(self) -> bool:
        """Whether this model's cache can drop its last token: tried out, for the answer depends on the architecture.

        Recurrent state is refused without trying: llama.cpp may say yes and not restore it (llama.cpp issue 26695).
        """
        token = max(self.model.bos_id, 0)
        self._context.decode((token, token), (0, 1), [(_SEQUENCE,)] * 2, ())
        can_rollback = not self.model.is_recurrent and self._context.remove(_SEQUENCE, 1)
        self._context.remove(_SEQUENCE, 0)
        return can_rollback
