"""What a draft window costs and saves: acceptance, time and memory of the draft on a long prompt, by window size.

The target reads each prompt whole and answers once. Then the draft follows that answer, token by token, with its cache
cut to each window in turn, in a process of its own whose memory is read after a short prompt and after the long one.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.processes import BenchError, Child, edge, machine, verifier
from benchmarks.prompts import Prompt, load_prompts
from edge_agent.config import load_edge_config
from shared.runtimes.hub import resolve_model
from shared.runtimes.llama_cpp import LlamaModel

SHORT_TOKENS = 1000
_QUESTION = "\n\nSummarize the text above."
_FRAME_TOKENS = 64  # of the chat template and the question
_DOCUMENTS = ("LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")  # what never changes first
_ROOT = Path(__file__).resolve().parents[2]


async def window(
    draft: str, windows: Sequence[int], file: Path | None, num_texts: int, tokens: tuple[int, int],
    progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The figures of `bench window`; `tokens`: of the prompt and of its answer. Raises `BenchError`."""
    prompt_tokens, max_new_tokens = tokens
    texts = _texts(file, num_texts, prompt_tokens)
    context = {"draft.context_tokens": prompt_tokens + _FRAME_TOKENS + max_new_tokens, "link.patience_ms": 600_000}
    answers = []
    target = {"target.context_tokens": context["draft.context_tokens"]}
    async with verifier("torch", target) as running, edge(draft, context) as asking:
        for text in texts:
            question = {"do": "answer", "way": "cloud_only", "address": running.hello["address"], "question": text}
            answers.append(answer := await asking.ask({**question, "max_new_tokens": max_new_tokens}))
            if answer["error"] or "local" in answer["provenance"]:
                raise BenchError(f"the target did not answer: {answer['error'] or 'the link was lost'}")
            progress(f"the target answered a prompt of {answer['prompt_tokens']} tokens")
    cases = []
    for size in windows:
        async with edge(draft, {**context, "draft.window_tokens": size}) as following:
            cases.append({"window_tokens": size, **await _case(following, texts, answers)})
        progress(f"window of {size or 'all'}: {cases[-1]['right_rate']:.1%} right")
    whole = next((case["right_rate"] for case in cases if not case["window_tokens"]), None)
    for case in cases:
        case["acceptance_loss"] = None if whole is None else round(whole - case["right_rate"], 4)
    return {
        "draft": draft,
        "prompt_tokens": [answer["prompt_tokens"] for answer in answers],
        "answer_tokens": [len(answer["tokens"]) for answer in answers],
        "cases": cases,
        **machine(0, "llama-cpp-python"),
    }


async def _case(following: Child, texts: Sequence[str], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    short = texts[0][: len(texts[0]) * SHORT_TOKENS // answers[0]["prompt_tokens"]]
    await following.ask({"do": "pattern", "question": short, "tokens": answers[0]["tokens"]})
    after_short_mb = _resident_mb(following)
    patterns = [
        await following.ask({"do": "pattern", "question": text, "tokens": answer["tokens"]})
        for text, answer in zip(texts, answers, strict=True)
    ]
    return {
        "right_rate": round(mean([right for pattern in patterns for right in pattern["right"]]), 4),
        "draft_ms": round(median(pattern["draft_ms"] for pattern in patterns), 2),
        "prompt_ms": round(median(pattern["prompt_ms"] for pattern in patterns)),
        f"resident_mb_{SHORT_TOKENS}": after_short_mb,
        "resident_mb": _resident_mb(following),
    }


def _resident_mb(child: Child) -> float:
    """Memory of the process that is not its files', 10^6 bytes: weights are mapped from theirs."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
    return round(int(status["RssAnon"].split()[0]) * 1024 / 1e6, 1)


def _texts(file: Path | None, count: int, tokens: int) -> list[str]:
    """Questions about long texts: the file's longest prompts one after the other, or this project's own documents."""
    if file is None:
        parts = [(_ROOT / name).read_text(encoding="utf-8") for name in _DOCUMENTS]
    else:
        prompts = load_prompts(file, 1 << 20)
        parts = [prompt.text for prompt in sorted(prompts, key=_length, reverse=True)]
    model = LlamaModel(resolve_model(load_edge_config(environ=os.environ, overrides={}).draft.model, "draft.model"))
    ids = model.tokenize("\n\n".join(parts))
    room = tokens - _FRAME_TOKENS // 2
    if len(ids) < count * room:
        raise BenchError(f"{file or 'the documents'}: {len(ids)} tokens are too few for {count} prompts of {tokens}")
    pieces = [ids[start : start + room] for start in range(0, count * room, room)]
    texts = [b"".join(map(model.token_piece, piece)).decode(errors="replace") for piece in pieces]
    model.close()
    return [text + _QUESTION for text in texts]


def _length(prompt: Prompt) -> int:
    return len(prompt.text)
