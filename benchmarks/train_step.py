# SPDX-License-Identifier: Apache-2.0
"""One training step of a Llama with random weights: forward, loss, backward and AdamW.

All providers share the frozen weights. On CUDA, Liger's kernels serve norms, rotary embedding, SwiGLU and
loss of all of them where liger-kernel is installed; the rows say so. The frozen floor has gradients with
respect to activations only, and no optimiser; that of P-tuning reads as many tokens as there are with the
virtual ones. Full fine-tuning has none: there, torch's own step is the floor.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.operands import Normal, Operands
from benchmarks.prepared import Absent, Prepared, need, need_cuda, with_blas
from benchmarks.step_methods import IGNORED, METHODS, fill_operands, find

LEARNING_RATE = 1e-4
FROZEN = {"frozen": "cublas", "frozen_lt": "cublaslt"}
PROVIDERS = (*FROZEN, "torch", "peft", "unsloth", "pyfast")
COMPARED = 1 << 20
"""About how many elements of a large gradient are compared."""


def make_operands(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Operands:
    """The frozen model, the tokens and the values of its adapters.

    Raises:
        Absent: transformers is not installed.
    """
    need("transformers")
    import transformers

    s = case.shape
    head = min(128, s["kv"])
    config = transformers.LlamaConfig(
        hidden_size=s["hidden"], intermediate_size=s["ff"], num_hidden_layers=s["layers"],
        num_attention_heads=s["hidden"] // head, num_key_value_heads=s["kv"] // head,
        vocab_size=s["vocab"], max_position_embeddings=8192, rms_norm_eps=1e-5, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    torch.manual_seed(seed)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
        tokens = torch.randint(s["vocab"], (s["batch"], s["tokens"]))
    operands = Operands(case, dtype, model=model.requires_grad_(False).train())
    # The first token is not predicted, also where virtual ones stand in front of it.
    labels = tokens.index_fill(1, tokens.new_zeros(1), IGNORED)
    operands.inputs = {"tokens": tokens, "labels": labels}
    fill_operands(operands, Normal(dtype, device, seed))
    return operands


def oracle(operands: Operands) -> list[Tensor]:
    """Loss and gradients by the plain composition in float32."""
    model = copy.deepcopy(operands.model).float()
    floats = replace(
        operands,
        factors={path: (a.float(), b.float()) for path, (a, b) in operands.factors.items()},
        extra={name: value.float() for name, value in operands.extra.items()},
    )
    _checkpoint(model)
    called, parameters = METHODS[operands.case.method]["torch"](model, floats)
    loss = _loss(called, operands)
    loss.backward()
    return _results(parameters, loss.detach())


def _loss(model: nn.Module, operands: Operands) -> Tensor:
    inputs = operands.inputs
    loss: Tensor = model(input_ids=inputs["tokens"], labels=inputs["labels"]).loss
    return loss


def _results(parameters: list[nn.Parameter], loss: Tensor) -> list[Tensor]:
    """The gradients together: those of q and k, whose own are rounding errors, must not stand alone."""
    gradients = [parameter.grad.flatten() for parameter in parameters]
    return [loss, torch.cat([g[:: max(1, g.numel() // COMPARED)].float() for g in gradients])]


def _checkpoint(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)  # transformers >= 5.24
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _liger(model: Any) -> bool:
    """Put Liger's kernels into a model; False where they cannot serve."""
    if model.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)
    return True


def prepare(name: str, case: Case, operands: Operands) -> Prepared:
    """A provider's step.

    Raises:
        Absent: it has none.
    """
    if name not in PROVIDERS:
        raise Absent(f"{name} is not measured in training steps")
    tokens, shared = operands.inputs["tokens"], operands.model
    if name in ("frozen_lt", "unsloth"):
        need_cuda(name, tokens)
    full = case.method == "sft"
    if full and name in FROZEN:
        raise Absent("the floor of full fine-tuning is torch's own step")
    adapt = None if name in FROZEN else find(name, case.method)
    kept = {} if full else {id(tensor): tensor for tensor in shared.parameters()}
    model = copy.deepcopy(shared, kept)
    facts = {"liger": _liger(model)}
    if case.checkpointing:
        _checkpoint(model)
    if adapt is None:
        step, around = partial(_frozen_step, model, operands), with_blas(FROZEN[name])
        common = _common(model, shared)
        return Prepared(step, None, around, graphs=False, facts=facts, shared_bytes=common)
    called, parameters = adapt(model, operands)
    called.train()
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, fused=tokens.device.type == "cuda")
    return Prepared(
        partial(_step, called, optimizer, operands), partial(_results, parameters), graphs=False,
        facts=facts, shared_bytes=_common(called, shared),
    )  # fmt: skip


def _common(model: nn.Module, shared: nn.Module) -> int:
    """Bytes of the weights that two models have in common."""
    theirs = {id(tensor) for tensor in shared.parameters()}
    return sum(tensor.nbytes for tensor in model.parameters() if id(tensor) in theirs)


def _frozen_step(model: Any, operands: Operands, _: int) -> Tensor:
    tokens, labels = operands.inputs["tokens"], operands.inputs["labels"]
    if virtual := operands.case.shape.get("virtual"):
        tokens = torch.cat([tokens[:, :1].expand(-1, virtual), tokens], dim=1)
        labels = F.pad(labels, (virtual, 0), value=IGNORED)
    embedded = model.get_input_embeddings()(tokens).requires_grad_()
    loss = model(inputs_embeds=embedded, labels=labels).loss
    loss.backward()
    return loss.detach()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, operands: Operands, _: int) -> Tensor:
    optimizer.zero_grad()
    loss = _loss(model, operands)
    loss.backward()
    optimizer.step()
    return loss.detach()
