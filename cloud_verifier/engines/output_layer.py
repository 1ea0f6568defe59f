"""The output layer of a torch target: its logits are float32, whatever the type of its weights."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHORTLIST = 8  # more ids than that within the rounding of the best one are rare
_STRIPES = 64  # of a row, laid side by side to find its largest


class OutputLayer:
    """Float32 logits of hidden states, also from a bfloat16 layer.

    Such a layer sums in float32 and gives eight bits of the sum: logits between 16 and 32 come 0.125 apart, the best
    two are equal at one position in 57, and there the lower id wins, whatever the model made of it. So the best ones of
    each row are computed again, from the weights of their ids. Of 4,769 greedy tokens of SmolLM2-135M 44 instead of 74
    are then others than in float32, and 112 instead of 128 others than its 4-bit twin drafts.

    To be made before the model's layers are packed: it keeps the plain weights, as the embedding of most models does.
    """

    def __init__(self, model: "PreTrainedModel", size: int) -> None:
        """`size`: the ids that have a meaning; a model may have weights for more."""
        self._model: Any = model
        self._size = size
        layer: Any = model.get_output_embeddings()
        self._weight: Tensor = layer.weight.detach()
        self._bias: Tensor | None = None if layer.bias is None else layer.bias.detach()
        self._scaling = getattr(model.config, "logits_scaling", 1.0)  # Granite's; the others take the layer's as it is

    def __call__(self, hidden: Tensor, count: int) -> Tensor:
        """The logits (count, size) of the first `count` of these hidden states (rows, H)."""
        rough: Tensor = self._model.get_output_embeddings()(hidden)[:count, : self._size]
        logits = rough.float()
        if rough.dtype != torch.float32:
            ids = largest(logits, _SHORTLIST)
            exact = (self._weight[ids].float() * hidden[:count, None].float()).sum(dim=-1)
            logits.scatter_(1, ids, exact if self._bias is None else exact + self._bias[ids])
        return logits if self._scaling == 1 else logits / self._scaling


def largest(values: Tensor, count: int) -> Tensor:
    """Ids (n, count) of the largest of each row of values (n, V), the largest first; fewer where V is less.

    As `topk`, in half of its time: they are in the columns of a table (stripes, V // stripes) that have the largest
    maxima, or behind it.
    """
    columns = values.shape[1] // _STRIPES
    table = values[:, : columns * _STRIPES].unflatten(1, (_STRIPES, columns))
    best = table.amax(dim=1).topk(min(count, columns)).indices
    starts = columns * torch.arange(_STRIPES, device=values.device)
    behind = torch.arange(columns * _STRIPES, values.shape[1], device=values.device)
    ids = torch.cat(((best[:, None] + starts[:, None]).flatten(1), behind.expand(len(values), -1)), dim=1)
    return ids.gather(1, values.gather(1, ids).topk(min(count, ids.shape[1])).indices)
