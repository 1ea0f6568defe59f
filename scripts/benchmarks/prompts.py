"""Prompts for the benchmarks, each of a category: the short set that the doctor tries, or a file."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from benchmarks.processes import BenchError
from edge_agent.texts import TEXTS


@dataclass(frozen=True)
class Prompt:
    """One question."""

    category: str
    text: str


BUILT_IN = tuple(Prompt(category, text) for category, text in TEXTS.items())


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
