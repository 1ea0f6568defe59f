"""Linear layers whose weights stay in oneDNN's layout: for the few rows of a step on a CPU."""

from typing import cast

import torch
from torch import Tensor, nn

from shared.processor import is_x86


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's blocked layout, so that it is not repacked at every call.

    For the few rows of a step that takes up to half of a plain layer's time: SmolLM2-135M's forward of 8 rows goes from
    87 to 54 ms in float32 and from 55 to 36 in bfloat16. The operators are those of torch's compiler, frozen weights.

    A CPU that cannot multiply in bfloat16 (x86 without AVX-512) gets weights of that type widened to float32, and the
    result rounded as it would be there: plain bfloat16 layers take as long for each row as for one on such CPUs.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        bias = cast("Tensor | None", linear.bias)  # torch declares it as always there
        self._dtype = weight.dtype
        wide = torch.float32 if weight.dtype is torch.bfloat16 and not _multiplies_bfloat16() else weight.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(wide), None)
        self._bias = None if bias is None else bias.detach().to(wide)
        self._wide = wide

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in features) to (..., out features)."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs.to(self._wide), self._weight, self._bias, "none", [], ""
        )
        return output.to(self._dtype)


def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_pack() -> bool:
    """Whether packed layers exist here and were measured to be faster: oneDNN on x86."""
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return available and is_x86()


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers of a model on the CPU by packed ones, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
