"""`edge-agent prepare`: a draft made of a model, and what it is worth on this machine.

The worth is measured, not promised: the full-precision model continues a few texts, and the draft says at each position
what it would have proposed (acceptance at temperature 0) and how long that takes.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from edge_agent.doctor import right_drafts
from edge_agent.engines import LoadedDraft
from edge_agent.engines.chat import chat_prompt
from shared.core.messages import Sampling
from shared.core.settings import Request
from shared.engine import EngineError
from shared.runtimes.huggingface import Progress

Format = Literal["onnx", "gguf"]

_TEXTS = (  # of several kinds, short: most of the time goes to the full model's answers
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Translate into French: The train to Paris leaves at nine in the morning.",
    "A shop sells pens at 3 dollars and notebooks at 5. What do 4 pens and 2 notebooks cost? Think step by step.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Summarize: The committee met on Tuesday to discuss the budget. After a long debate about road repairs and the new "
    "library, it voted to raise the property tax by two percent and to review the decision in a year.",
    "Give three tips for a job interview.",
    "What were the main causes of the First World War?",
)
_ANSWER_TOKENS = 48
_CONTEXT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Prepared:
    """A draft on disk. `acceptance` is the share of the full model's tokens that it proposes, `draft_ms` its time."""

    path: Path
    size_bytes: int
    acceptance: float
    draft_ms: float


def prepare(model: Path, to: Format, out: Path, threads: int, progress: Progress) -> Prepared:
    """Make the folder `out` with a draft of `model` and measure it. Raises `EngineError`; then there is no folder."""
    if out.exists():
        raise EngineError(f"{out} exists; remove it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        work = Path(name)
        make = _make_onnx if to == "onnx" else _make_gguf
        folder, draft, full = make(model, work, threads, progress)
        try:
            acceptance, draft_ms = measure(draft, full, _TEXTS, progress)
        finally:
            draft.engine.close()
            full.engine.close()
        folder.rename(out)
    (file,) = out.glob("*.gguf") if to == "gguf" else [out]
    size = sum(path.stat().st_size for path in out.iterdir())
    return Prepared(file, size, acceptance, draft_ms)


def measure(draft: LoadedDraft, full: LoadedDraft, texts: Sequence[str], progress: Progress) -> tuple[float, float]:
    """The draft's acceptance on the full model's greedy answers to these texts, and its time for a token, ms."""
    right, took_ms, model = list[bool](), list[float](), full.model
    for index, text in enumerate(texts):
        progress("measuring", index / len(texts))
        prompt = (
            chat_prompt(model, [{"role": "user", "content": text}]) if model.chat_template else model.tokenize(text)
        )
        full.engine.reset(prompt, Sampling(), len(prompt))
        answer = full.engine.propose(_ANSWER_TOKENS).tokens
        ending = next((at + 1 for at, token in enumerate(answer) if token in model.eog_ids), len(answer))
        request = Request("measure", tuple(prompt), _ANSWER_TOKENS, full.engine.fingerprint)
        agreed, draft_ms = right_drafts(draft.engine, request, answer[:ending])
        right += agreed
        took_ms.append(draft_ms)
    return sum(right) / len(right), median(took_ms)


def _make_onnx(model: Path, work: Path, threads: int, progress: Progress) -> tuple[Path, LoadedDraft, LoadedDraft]:
    from edge_agent.engines.onnx import OnnxDraft
    from edge_agent.engines.onnx_builder import build

    folders = build(model, work, progress)
    small, full = (OnnxDraft(folder, context_tokens=_CONTEXT_TOKENS, threads=threads) for folder in folders)
    return folders[0], LoadedDraft(small, small.model), LoadedDraft(full, full.model)


def _make_gguf(model: Path, work: Path, threads: int, progress: Progress) -> tuple[Path, LoadedDraft, LoadedDraft]:
    from edge_agent.engines.llama_cpp import LlamaCppDraft
    from shared.runtimes.llama_cpp import quantize

    if model.is_dir():
        raise EngineError(f"{model}: a GGUF draft is made of a GGUF file; llama.cpp's convert_hf_to_gguf.py makes one")
    folder = work / "small"
    folder.mkdir()
    small, full = folder / f"{model.stem}.q8_0.gguf", work / "float32.gguf"
    progress("making the weights small", None)
    quantize(model, "q8_0", small)
    quantize(model, "float32", full)
    engines = [LlamaCppDraft(file, context_tokens=_CONTEXT_TOKENS, threads=threads) for file in (small, full)]
    drafts = [LoadedDraft(engine, engine.model) for engine in engines]
    return folder, drafts[0], drafts[1]
