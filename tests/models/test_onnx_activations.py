"""What goes into a graph's products: its average is taken off where that makes numbers smaller."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.engines.onnx_activations import Activations, FullGraph, watch
from edge_agent.engines.weight_blocks import BLOCK
from tests.models.tiny_onnx import build_tiny

pytestmark = pytest.mark.models

ONES = np.ones(2 * BLOCK, np.float32)


def test_a_number_that_is_always_large_is_taken_off() -> None:
    mean = np.where(np.arange(2 * BLOCK) == 5, np.float32(20), np.float32(0.5))
    seen = Activations.between(mean - 1, mean, mean + 2)
    assert seen.centre is mean
    np.testing.assert_allclose(seen.largest, 2 * ONES)


def test_one_that_is_large_now_and_then_is_not() -> None:
    mean, high = 0.1 * ONES, ONES.copy()
    high[5] = 20
    seen = Activations.between(-ONES, mean, high)
    assert seen.centre is None
    np.testing.assert_array_equal(seen.largest, high)


def test_inputs_that_no_blocks_fit_are_judged_too() -> None:
    mean = np.full(BLOCK + 3, 9, np.float32)
    assert Activations.between(mean - 1, mean, mean + 1).centre is mean


def test_each_product_is_watched_but_for_the_texts_first_tokens(tmp_path: Path) -> None:
    _, full, model = build_tiny(tmp_path)
    graph = FullGraph(full)
    texts = ["One, two, three.", "Four? Five! Six."]
    found = watch(graph, texts)
    rows = list[torch.Tensor]()
    with torch.inference_mode():
        for text in texts:
            tokens = torch.tensor(graph.model.tokenize(text, add_special=True))
            rows.append(model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))[4:])
    behind, first = torch.cat(rows).numpy(), next(iter(found.values()))
    centre = np.zeros(behind.shape[1]) if first.centre is None else first.centre
    np.testing.assert_allclose(first.largest, np.abs(behind - centre).max(axis=0), rtol=1e-4, atol=1e-5)
    assert not (full / "watched.onnx").exists()
