"""A draft cache of constant size: the first tokens of the text and the latest ones.

In a model of one layer a cached key and value depend on their token and position alone. So there, and only there, what
a draft with a window proposes is exactly what one without proposes on the tokens that the window holds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.engines.cached_draft import SINK_TOKENS, CachedDraft
from edge_agent.engines.llama_cpp import LlamaCppDraft
from edge_agent.engines.onnx import OnnxDraft
from edge_agent.engines.onnx_folder import PREFILL_FILE
from edge_agent.engines.rotary import Rotary
from edge_agent.engines.selftest import check_draft
from shared.core.messages import Sampling
from shared.engine import EngineError
from tests.models.tiny import SIZE, write_tiny_gguf
from tests.models.tiny_onnx import build_tiny

pytestmark = pytest.mark.models

WINDOW_TOKENS, LONG_TOKENS, BATCH_TOKENS = 64, 200, 16
GREEDY = Sampling()
TEXT = [2 + (7 * n * n + 3 * n + n // 5) % (SIZE - 2) for n in range(LONG_TOKENS)]


@pytest.fixture(scope="module", params=["llama_cpp", "onnx"])
def drafts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[CachedDraft, CachedDraft]]:
    """Of one layer: with a window, and without."""
    work = tmp_path_factory.mktemp("tiny")
    room: dict[str, Any] = {"context_tokens": 2 * LONG_TOKENS, "batch_tokens": BATCH_TOKENS}
    one: CachedDraft
    other: CachedDraft
    if request.param == "onnx":
        folder = build_tiny(work, num_hidden_layers=1)[0]
        (folder / PREFILL_FILE).unlink()  # it rounds otherwise than the drafting graph, and only long pieces are for it
        one, other = (OnnxDraft(folder, window_tokens=size, **room) for size in (WINDOW_TOKENS, 0))
    else:
        file = write_tiny_gguf(work / "tiny.gguf", layers=1)
        one, other = (LlamaCppDraft(file, window_tokens=size, **room) for size in (WINDOW_TOKENS, 0))
    yield one, other
    one.close()
    other.close()


def assert_sees_the_window(drafts: tuple[CachedDraft, CachedDraft], text: list[int]) -> None:
    """The first one's next token, on a text that stands in it, is the other's on what the window holds."""
    window, whole = drafts
    proposal = window.propose(1)
    held = [*text[:SINK_TOKENS], *text[SINK_TOKENS + window.dropped_tokens :]]
    assert len(held) <= WINDOW_TOKENS
    whole.reset([text[0] + 1], GREEDY, 1)
    whole.reset(held, GREEDY, 1)
    expected = whole.propose(1)
    assert proposal.tokens == expected.tokens
    assert proposal.confidence == pytest.approx(expected.confidence, abs=0.02)


class TestWindow:
    def test_a_long_prompt_is_evaluated_only_where_the_window_is(self, drafts: tuple[CachedDraft, CachedDraft]) -> None:
        window, _ = drafts
        window.reset([TEXT[0] + 1], GREEDY, 1)
        window.reset(TEXT, GREEDY, 1)
        assert_sees_the_window(drafts, TEXT)
        assert window.dropped_tokens == LONG_TOKENS - WINDOW_TOKENS

    def test_it_slides_as_the_text_grows_and_after_rollbacks(self, drafts: tuple[CachedDraft, CachedDraft]) -> None:
        window, _ = drafts
        window.reset(TEXT[:50], GREEDY, 1)
        text, dropped = TEXT[:50], set[int]()
        for number in range(40):
            assert_sees_the_window(drafts, text)
            window.rollback(len(text) - number % 3)
            del text[len(text) - number % 3 :]
            added = TEXT[len(text) : len(text) + 2 + number % 4]
            window.extend(added)
            text += added
            dropped.add(window.dropped_tokens)
        assert len(dropped) > 5  # times that it slid

    def test_a_text_that_goes_on_elsewhere_is_evaluated_anew(self, drafts: tuple[CachedDraft, CachedDraft]) -> None:
        window, _ = drafts
        for common in (2, SINK_TOKENS, 80, 140, 199):
            window.reset(TEXT, GREEDY, 1)
            window.propose(1)
            text = [*TEXT[:common], *reversed(TEXT[: 220 - common])]
            window.reset(text, GREEDY, 1)
            assert_sees_the_window(drafts, text)

    def test_its_cache_passes_the_self_test(self, drafts: tuple[CachedDraft, CachedDraft]) -> None:
        check_draft(drafts[0])

    def test_the_text_ends_at_the_context_and_not_at_the_window(self, drafts: tuple[CachedDraft, CachedDraft]) -> None:
        window, _ = drafts
        assert window.capabilities.max_context == 2 * LONG_TOKENS
        window.reset([*TEXT, *TEXT][:-2], GREEDY, 1)
        assert len(window.propose(5).tokens) == 2


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_key_that_moved_is_the_key_of_its_new_place(interleaved: bool) -> None:
    rotary = Rotary((1.0, 0.1), interleaved)
    key = np.array([[1.0, 2.0, 3.0, 4.0, 9.0]], dtype=np.float32)
    there = rotary.moved(key, 7)
    assert there[0, 4] == 9.0
    assert rotary.moved(there, -7) == pytest.approx(key, abs=1e-6)
    first, second = (0, 1) if interleaved else (0, 2)
    angle = np.arctan2(there[0, second], there[0, first]) - np.arctan2(key[0, second], key[0, first])
    assert angle % (2 * np.pi) == pytest.approx(7.0 % (2 * np.pi), abs=1e-5)


def test_a_graph_that_does_not_name_its_angles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"draft\.window_tokens: 0 or make it again with edge-agent prepare"):
        OnnxDraft(build_tiny(tmp_path)[1], window_tokens=WINDOW_TOKENS)
