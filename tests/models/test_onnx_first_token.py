"""A text's first token in the cache of an ONNX draft: float32 where the folder knows it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from edge_agent.engines.onnx import OnnxDraft
from edge_agent.engines.onnx_first_token import read_first_tokens
from edge_agent.engines.onnx_folder import FIRST_ENTRIES_FILE, PAST, PREFILL_FILE
from shared.core.messages import Sampling
from shared.engine import EngineError
from tests.models.tiny_onnx import build_tiny

pytestmark = pytest.mark.models

GREEDY = Sampling()
FIRST, OTHER = 1, 7  # <eos>, with which the tiny model's chats begin, and a letter
TEXT = (FIRST, *range(20, 60))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, PreTrainedModel]:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def draft(tiny: tuple[Path, Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> Iterator[OnnxDraft]:
    monkeypatch.setattr(OnnxDraft, "_if_faster", lambda _, graph: graph)  # on any machine
    draft = OnnxDraft(tiny[0], context_tokens=96)
    yield draft
    draft.close()


def is_exact(draft: OnnxDraft, model: PreTrainedModel, token: int) -> bool:
    """Whether the cache holds what the float32 model has for this token as the first one."""
    with torch.inference_mode():
        layers = model(torch.tensor([[token]]), use_cache=True).past_key_values.layers
    return all(
        np.allclose(draft._caches[f"{PAST}{number}.{what}"][0][0, :, 0], cache[0, :, 0].numpy(), atol=1e-5)
        for number, layer in enumerate(layers)
        for what, cache in (("key", layer.keys), ("value", layer.values))
    )


@pytest.mark.parametrize("count", [1, 2, 5, len(TEXT)])  # alone, by the drafting graph, by the reading one
def test_what_a_known_one_leaves_is_exact_however_the_text_is_read(
    draft: OnnxDraft, tiny: tuple[Path, Path, PreTrainedModel], count: int
) -> None:
    draft.reset(TEXT[:count], GREEDY, count)
    draft.propose(2)
    assert is_exact(draft, tiny[2], FIRST)


@pytest.mark.parametrize("count", [1, len(TEXT)])
def test_any_other_is_evaluated(draft: OnnxDraft, tiny: tuple[Path, Path, PreTrainedModel], count: int) -> None:
    draft.reset([OTHER, *TEXT[1:count]], GREEDY, count)
    draft.propose(2)
    assert not is_exact(draft, tiny[2], OTHER), "in 8 bits"
    assert not is_exact(draft, tiny[2], FIRST)


def test_a_text_that_began_as_a_single_token_is_as_fresh(draft: OnnxDraft) -> None:
    draft.reset([FIRST], GREEDY, 1)
    draft.propose(1)
    draft.rollback(1)
    draft.extend(TEXT[1:])
    proposed = draft.propose(6)
    draft.reset([OTHER], GREEDY, 1)
    draft.propose(1)
    draft.reset(TEXT, GREEDY, len(TEXT))
    assert draft.propose(6) == proposed


def test_a_known_one_needs_no_forward(draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, run = list[tuple[int, int]](), draft._run

    def noted(graph: Any, tokens: Sequence[int], start: int) -> None:
        runs.append((start, len(tokens)))
        run(graph, tokens, start)

    monkeypatch.setattr(draft, "_run", noted)
    draft.reset(TEXT, GREEDY, len(TEXT))
    draft.propose(1)
    assert runs == [(1, len(TEXT) - 2), (len(TEXT) - 1, 1)]
    runs.clear()
    draft.reset([OTHER, *TEXT[1:]], GREEDY, len(TEXT))
    draft.propose(1)
    assert runs == [(0, 4), (4, len(TEXT) - 5), (len(TEXT) - 1, 1)]


def test_a_folder_may_know_none_and_says_when_its_file_is_damaged(
    tiny: tuple[Path, Path, PreTrainedModel], tmp_path: Path
) -> None:
    assert set(read_first_tokens(tiny[0])) == {FIRST}
    assert (tiny[0] / PREFILL_FILE).is_file()
    assert read_first_tokens(tmp_path) == {}
    (tmp_path / FIRST_ENTRIES_FILE).write_bytes(b"no archive")
    with pytest.raises(EngineError, match=r"first_token.npz: .*; make the folder again"):
        read_first_tokens(tmp_path)
