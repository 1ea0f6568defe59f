from typing import Any

import pytest
import torch

from cloud_verifier.engines.output_layer import OutputLayer, largest
from tests.models.tiny import SIZE, tiny_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "granite"])
def test_the_best_logits_of_a_bfloat16_layer_are_those_in_float32(architecture: str, tied: bool) -> None:
    scaling = {"logits_scaling": 3.0} if architecture == "granite" else {}
    model: Any = tiny_model(architecture, torch.bfloat16, tie_word_embeddings=tied, **scaling).model
    hidden = torch.randn(5, model.config.hidden_size, dtype=torch.bfloat16) * 4
    with torch.inference_mode():
        logits = OutputLayer(model, SIZE)(hidden, 4)
        exact = (hidden.float() @ model.lm_head.weight.float().T)[:4, :SIZE] / scaling.get("logits_scaling", 1.0)
    best = exact.topk(5).indices
    assert logits.shape == (4, SIZE)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.argmax(dim=-1), best[:, 0])
    torch.testing.assert_close(logits.gather(1, best), exact.gather(1, best), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, exact, rtol=2**-8, atol=1e-2)


def test_two_ids_that_bfloat16_cannot_tell_apart_are_told_apart() -> None:
    model: Any = tiny_model(dtype=torch.bfloat16).model
    weight = torch.zeros_like(model.lm_head.weight)
    weight[20:22, 0], weight[21, 1] = 16, 2**-5  # 16 and 16.03 for a hidden state of ones
    model.lm_head.weight.data.copy_(weight)
    hidden = torch.ones(1, model.config.hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert int(model.lm_head(hidden).argmax()) == 20
        assert int(OutputLayer(model, SIZE)(hidden, 1).argmax()) == 21


def test_a_float32_layer_is_left_as_it_is() -> None:
    model: Any = tiny_model().model
    hidden = torch.randn(3, model.config.hidden_size)
    with torch.inference_mode():
        assert torch.equal(OutputLayer(model, SIZE)(hidden, 3), model.lm_head(hidden)[:, :SIZE])


def test_a_bias_is_added_to_what_is_computed_again() -> None:
    model: Any = tiny_model(dtype=torch.bfloat16).model
    layer = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, dtype=torch.bfloat16)
    model.set_output_embeddings(layer)
    hidden = torch.randn(3, model.config.hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(
            OutputLayer(model, SIZE)(hidden, 3), layer(hidden)[:, :SIZE].float(), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("size", [1, 5, 64, 93, 700, 49_152, 50_001])
def test_the_largest_are_those_that_sorting_finds(size: int) -> None:
    values = torch.randn(3, size)
    values[0] = values[0].sort().values  # all in one stripe
    assert torch.equal(largest(values, 8), values.topk(min(8, size)).indices)
