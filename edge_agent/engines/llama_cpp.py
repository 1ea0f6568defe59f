"""The draft engine on llama.cpp: one GGUF model, one sequence."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from edge_agent.engines.cached_draft import CachedDraft, context_room
from shared.core.messages import Fingerprint
from shared.engine import Capabilities, EngineError
from shared.processor import is_x86
from shared.runtimes.llama_cpp import LlamaContext, LlamaModel, has_gpu, with_weights

_SEQUENCE = 0
_log = structlog.get_logger(__name__)


class LlamaCppDraft(CachedDraft):
    """`DraftEngine` over a GGUF file."""

    def __init__(
        self,
        path: Path,
        *,
        context_tokens: int = 0,
        window_tokens: int = 0,
        threads: int = 1,
        batch_tokens: int = 512,
        gpu_layers: int = -1,
    ) -> None:
        """Load the model, for texts of `context_tokens` (0: what it was trained for), `window_tokens` of them cached.

        Raises `EngineError`.
        """
        self.model = LlamaModel(path, gpu_layers=gpu_layers)
        trained = self.model.trained_context_tokens
        max_context, room = context_room(context_tokens, window_tokens, trained)
        try:
            self._context = LlamaContext(self.model, context_tokens=room, threads=threads, batch_tokens=batch_tokens)
        except EngineError:
            self.model.close()
            raise
        if window_tokens and not self._context.can_shift:
            self.close()
            raise EngineError(f"{path.name} cannot move its cache, so it has no window; set draft.window_tokens: 0")
        capabilities = Capabilities(self._probe_rollback(), can_tree=False, max_context=max_context)
        super().__init__(path.name, batch_tokens, capabilities, room)

    @property
    def fingerprint(self) -> Fingerprint:
        """The vocabulary that its token ids belong to."""
        return self.model.vocabulary.fingerprint

    def close(self) -> None:
        """Free the model; no other call may follow."""
        self._context.close()
        self.model.close()

    def _evaluate(self, tokens: Sequence[int], start: int, num_logits: int) -> NDArray[np.float32]:
        rows = len(tokens)
        wanted = range(rows - num_logits, rows)
        return self._context.decode(tokens, range(start, start + rows), [(_SEQUENCE,)] * rows, wanted)

    def _remove(self, length: int) -> bool:
        return self._context.remove(_SEQUENCE, length)

    def _shift(self, start: int, count: int, length: int) -> None:
        self._context.shift(_SEQUENCE, start, count)

    def _probe_rollback(self) -> bool:
        """Whether this model's cache can drop its last token: tried out, for the answer depends on the architecture.

        Recurrent state is refused without trying: llama.cpp may say yes and not restore it (llama.cpp issue 26695).
        """
        token = max(self.model.bos_id, 0)
        self._context.decode((token, token), (0, 1), [(_SEQUENCE,)] * 2, ())
        can_rollback = not self.model.is_recurrent and self._context.remove(_SEQUENCE, 1)
        self._context.remove(_SEQUENCE, 0)
        return can_rollback


def is_slow(path: Path) -> bool:
    """Whether llama.cpp has no fast kernels for the file's weights on this processor: Q4_1 on x86.

    Raises `EngineError` if the file cannot be loaded.
    """
    if not is_x86() or has_gpu():
        return False
    model = LlamaModel(path)
    try:
        return model.is_q4_1
    finally:
        model.close()


def faster_file(path: Path, cache_dir: Path) -> Path:
    """The file, or the copy of it with 8-bit weights where its own are slow (`is_slow`).

    The file itself serves where no copy can be kept. Raises `EngineError` if the file cannot be loaded.
    """
    if not is_slow(path):
        return path
    try:
        return with_weights(path, "q8_0", cache_dir)
    except (EngineError, OSError) as error:
        _log.warning("no copy for faster drafts can be kept", file=str(path), error=str(error))
        return path
