"""The draft engine on llama.cpp: one GGUF model, one sequence.

The engine keeps the token list and how many of its tokens the cache holds. The cache is always a proper prefix: the
last token of the list is never in it, so there is always one to evaluate and it yields the logits of what follows. (The
last proposed token is in the list but not in the cache; a rollback to length n leaves at most n - 1.)
"""

from collections.abc import Sequence
from pathlib import Path

from shared.core.errors import LocalProtocolError
from shared.core.messages import Fingerprint, Sampling
from shared.core.selection import probability, select
from shared.engine import Capabilities, EngineError, Proposal
from shared.runtimes.llama_cpp import LlamaContext, LlamaModel

_SEQUENCE = 0


class LlamaCppDraft:
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
        self._tokens: list[int] = []
        self._cached = 0
        self._sampling = Sampling()
        self._prompt_len = 0
        self._capabilities = Capabilities(self._probe_rollback(), can_tree=False, max_context=max_context)

    def __repr__(self) -> str:
        return f"<LlamaCppDraft {self.model.path.name}, {len(self._tokens)} tokens, {self._cached} cached>"

    @property
    def capabilities(self) -> Capabilities:
        """What this engine can do."""
        return self._capabilities

    @property
    def fingerprint(self) -> Fingerprint:
        """The vocabulary that its token ids belong to."""
        return self.model.vocabulary.fingerprint

    def reset(self, tokens: Sequence[int], sampling: Sampling, prompt_len: int) -> None:
        """Start on `tokens`; select with `sampling` from now on. Keeps what the cache shares with the old tokens."""
        kept = 0
        for old, new in zip(self._tokens[: self._cached], tokens[:-1], strict=False):
            if old != new:
                break
            kept += 1
        if not self._cut(kept):
            self._cut(0)
        self._tokens = list(tokens)
        self._sampling, self._prompt_len = sampling, prompt_len

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that are now part of the text; they are evaluated at the next `propose`."""
        self._tokens.extend(tokens)

    def propose(self, n: int) -> Proposal:
        """Draft up to `n` tokens after the list and append them to it. Fewer come at the end of the context.

        Raises `EngineError` if llama.cpp fails; the list and the cache still fit each other then.
        """
        if not self._tokens:
            raise LocalProtocolError("nothing to draft from: reset the engine to at least one token first")
        start = len(self._tokens)
        confidence: list[float] = []
        while len(confidence) < n and len(self._tokens) < self._capabilities.max_context:
            token, chance = self._next_token()
            self._tokens.append(token)
            confidence.append(chance)
        return Proposal(tuple(self._tokens[start:]), tuple(confidence))

    def rollback(self, length: int) -> None:
        """Forget every token from position `length` on. Raises `EngineError` if the cache cannot."""
        if not 0 <= length <= len(self._tokens):
            raise LocalProtocolError(f"cannot roll back to {length} tokens, there are {len(self._tokens)}")
        if not self._cut(length - 1):
            raise EngineError(
                f"model {self.model.path.name} cannot roll back (recurrent state); use another draft model"
            )
        del self._tokens[length:]

    def close(self) -> None:
        """Free the model; no other call may follow."""
        self._context.close()
        self.model.close()

    def _next_token(self) -> tuple[int, float]:
        """Evaluate the tokens that the cache lacks; the selected token and its probability."""
        assert self._cached < len(self._tokens), f"nothing left to evaluate in {self!r}"
        while self._cached < len(self._tokens):
            stop = min(self._cached + self._context.batch_tokens, len(self._tokens))
            rows = range(self._cached, stop)
            logits = self._context.decode(
                self._tokens[self._cached : stop],
                rows,
                [(_SEQUENCE,)] * len(rows),
                [len(rows) - 1] if stop == len(self._tokens) else [],
            )
            self._cached = stop
        # Padded ids beyond the vocabulary mean nothing to the verifier, which would refuse them.
        known = logits[0][: self.fingerprint.size]
        token = select(known, self._sampling, len(self._tokens), self._tokens, self._prompt_len)
        return token, probability(known, token)

    def _cut(self, length: int) -> bool:
        """Keep at most `length` tokens in the cache; False, and nothing changed, if the model cannot."""
        length = max(length, 0)
        if length >= self._cached:
            return True
        if not self._context.remove(_SEQUENCE, length):
            return False
        self._cached = length
        return True

    def _probe_rollback(self) -> bool:
        """Whether this model's cache can drop its last token: tried out, for the answer depends on the architecture.

        Recurrent state is refused without trying: llama.cpp may say yes and not restore it (llama.cpp issue 26695).
        """
        token = max(self.model.bos_id, 0)
        self._context.decode((token, token), (0, 1), [(_SEQUENCE,)] * 2, ())
        can_rollback = not self.model.is_recurrent and self._context.remove(_SEQUENCE, 1)
        self._context.remove(_SEQUENCE, 0)
        return can_rollback
