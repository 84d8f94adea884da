# SPDX-License-Identifier: Apache-2.0
"""A mixture's experts with LoRA, all at once: rows sorted by expert, one grouped product for a matrix.

The loop over experts of `experts.py` asks the device for the rows of each; here the host waits for nothing.
The products are `torch.nn.functional.grouped_mm`, which on CUDA takes bfloat16. The adapters' products are
made whole before they are added, so for a moment there are two matrices of y's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfast.nn.experts import first_projection
from pyfast.ops import _library

Factors = tuple[Tensor, Tensor, float]
"""A [experts, R, in], B [experts, out, R] and s."""
_UNIT = 8
"""Features and ranks come in units of 16 bytes."""


def why_not(module: Any, x: Tensor, serving: Mapping[str, Sequence[Factors]]) -> str:
    """Why a module's experts are taken one after another; empty where they need not be."""
    if not hasattr(F, "grouped_mm"):
        return "this torch has no grouped_mm"
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "grouped products are for CUDA devices of compute capability 8.0 or more"
    if module.has_bias:
        return "the experts have biases"
    for name in (first_projection(module), "down_proj"):
        weight = module._parameters.get(name)
        if weight is None:
            return f"{name} is no dense parameter"
        if not (x.dtype == weight.dtype == torch.bfloat16):
            return f"grouped products are of bfloat16; x is {x.dtype}, {name} {weight.dtype}"
        ranks = [a.shape[1] for a, _, _ in serving.get(name, ())]
        if any(size % _UNIT for size in (*weight.shape[1:], *ranks)):
            return f"{name}'s features and ranks must be multiples of {_UNIT}"
        if weight.data_ptr() % 16 or not weight.is_contiguous():
            return f"{name} does not lie in one piece from a multiple of 16 bytes on"
    return ""


def grouped_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    serving: Mapping[str, Sequence[Factors]],
) -> Tensor:
    """Each token's chosen experts, weighted and added up, with adapters: y = x W_e^T + s (x A_e^T) B_e^T.

    Args:
        module: experts that `why_not` has nothing against.
        hidden_states: [tokens, hidden], bfloat16.
        top_k_index: [tokens, k] integers; a number that no expert has stands for none.
        top_k_weights: [tokens, k], floating point.
        serving: the factors of each adapted parameter, by its name.

    Returns:
        [tokens, hidden] of `hidden_states`' dtype.
    """
    (tokens, width), k = hidden_states.shape, top_k_index.shape[1]
    index = top_k_index.reshape(-1)
    exists = (index >= 0) & (index < module.num_experts)
    index = index.where(exists, 0)  # rows of zeros for nothing
    order = index.argsort(stable=True)
    experts = torch.arange(module.num_experts, device=index.device)
    ends = (index[:, None] == experts).sum(0).cumsum(0).to(torch.int32)

    def product(x: Tensor, matrices: Tensor) -> Tensor:
        """x_e M_e for matrices [experts, in, out]."""
        return F.grouped_mm(x, matrices, offs=ends)

    def project(name: str, x: Tensor) -> Tensor:
        weight = getattr(module, name)
        y = product(x, weight if module.is_transposed else weight.transpose(1, 2))
        for a, b, scale in serving.get(name, ()):
            low = product(x, a.to(x.dtype).transpose(1, 2)) * scale
            y.add_(product(low, b.to(x.dtype).transpose(1, 2)))  # nothing has kept y
        return y

    x = hidden_states[order // k].masked_fill(~exists[order, None], 0)
    x = project(first_projection(module), x)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = project("down_proj", x)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    # Back in the order of tokens, so that sums are made in one order.
    y = x.new_empty(x.shape).index_copy_(0, order, x).view(tokens, k, width)
    weights = top_k_weights.masked_fill(~exists.view(tokens, k), 0)
    y = y * weights[..., None]
    _library.record("lora_linear", "lora_linear_grouped_mm")
    return y.sum(1).to(hidden_states.dtype)
