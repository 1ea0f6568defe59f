"""Prompts for the benchmarks, each of a category: a short set of our own, or a file."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from benchmarks.processes import BenchError


@dataclass(frozen=True)
class Prompt:
    """One question."""

    category: str
    text: str


BUILT_IN = (
    Prompt("writing", "Tell me a long story about a lighthouse keeper who finds a message in a bottle."),
    Prompt("reasoning", "A farmer has 17 sheep and all but 9 run away. How many are left? Explain step by step."),
    Prompt("coding", "Write a Python function that returns the n-th Fibonacci number, and explain how it works."),
    Prompt(
        "summarization",
        "Summarize in three sentences: The first lighthouses were open fires on hilltops. Later the fires were put on"
        " platforms, then on towers, so that ships could see them from afar. In the nineteenth century lenses gathered"
        " the light into beams that reached the horizon. Keepers lived in the towers, trimmed the wicks and wound the"
        " clockworks that turned the lens. Today most lights are electric, switch themselves on at dusk, and nobody"
        " lives there any more.",
    ),
    Prompt("roleplay", "You are a friendly librarian. A child asks for a book about dinosaurs. What do you say?"),
    Prompt("math", "What is the sum of the first 50 even numbers? Show how you get there."),
    Prompt("translation", "Translate into French: The weather is nice today, so we will walk along the river."),
    Prompt("qa", "Why is the sky blue during the day and red in the evening?"),
)


def load_prompts(file: Path | None, count: int, categories: Sequence[str] = ()) -> list[Prompt]:
    """The first `count` prompts of these categories (or of all), in turn; None takes the built-in set.

    A file has one JSON object a line with `category` and `turns` (as Spec-Bench; the first turn counts) or `prompt`.
    Raises `BenchError`.
    """
    prompts = list(BUILT_IN) if file is None else _read(file)
    by_category: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        by_category[prompt.category].append(prompt)
    if unknown := set(categories) - set(by_category):
        raise BenchError(f"no prompts of category {', '.join(sorted(unknown))}; there are {', '.join(by_category)}")
    by_category = {name: by_category[name] for name in categories or by_category}
    in_turn = chain.from_iterable(zip_longest(*by_category.values()))
    return [prompt for prompt in in_turn if prompt is not None][:count]


def _read(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BenchError(f"{file}: cannot be read: {error.strerror}") from None
    if not lines:
        raise BenchError(f"{file}: no prompts")
    return [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]


def _parse(line: str, where: str) -> Prompt:
    try:
        found = json.loads(line)
        text = found["prompt"] if "prompt" in found else found["turns"][0]
        return Prompt(str(found.get("category", "all")), str(text))
    except (ValueError, LookupError, TypeError):
        raise BenchError(f'{where}: expected {{"category": ..., "prompt": ...}} or "turns": [...]') from None
