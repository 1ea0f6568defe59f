from pathlib import Path

import pytest
from benchmarks.processes import BenchError
from benchmarks.prompts import BUILT_IN, Prompt, load_prompts


def test_categories_are_taken_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [
        '{"category": "a", "turns": ["a1", "later"]}',
        '{"category": "a", "turns": ["a2"]}',
        '{"category": "b", "prompt": "b1"}',
        '{"prompt": "no category"}',
    ]
    file.write_text("\n".join(lines))
    assert [prompt.text for prompt in load_prompts(file, 3)] == ["a1", "b1", "no category"]
    assert load_prompts(file, 9)[3] == Prompt("a", "a2")


def test_categories_can_be_chosen() -> None:
    assert [prompt.category for prompt in load_prompts(None, 8, ["qa", "coding"])] == ["qa", "coding"]
    with pytest.raises(BenchError, match=r"no prompts of category poems, rap; there are writing, reasoning, "):
        load_prompts(None, 8, ["rap", "qa", "poems"])


def test_the_built_in_set_has_each_category_once() -> None:
    assert load_prompts(None, 8) == list(BUILT_IN)
    assert len({prompt.category for prompt in BUILT_IN}) == 8


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no prompts"),
        ('{"category": "a"}', ':1: expected {"category": ..., "prompt": ...} or "turns": [...]'),
        ("text", ":1: expected"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(BenchError) as caught:
        load_prompts(file, 1)
    assert complaint in str(caught.value)
    with pytest.raises(BenchError, match="cannot be read"):
        load_prompts(tmp_path / "none", 1)
