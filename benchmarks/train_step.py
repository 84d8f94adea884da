# SPDX-License-Identifier: Apache-2.0
"""One training step of a Llama with random weights: forward, loss, backward and AdamW.

All providers share the frozen weights. On CUDA, Liger's kernels serve norms, rotary embedding, SwiGLU and
loss of all of them where liger-kernel is installed; the rows say so. The frozen floor has gradients with
respect to activations only, and no optimiser.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import adapters
from benchmarks.cases import Case
from benchmarks.operands import Normal, Operands
from benchmarks.prepared import Absent, Prepared, need, need_cuda, with_blas

LEARNING_RATE = 1e-4

PROVIDERS: dict[str, Callable[..., list[nn.Parameter]] | None] = {
    "frozen": None,
    "frozen_lt": None,
    "torch": adapters.plain,
    "peft": adapters.peft,
    "unsloth": partial(adapters.unsloth, inplace=True),
    "pyfast": adapters.ours,
}


def make_operands(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Operands:
    """The frozen model, the tokens and the factors of its adapters.

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
    operands.inputs = {"tokens": tokens}
    normal = Normal(dtype, device, seed)
    # As small as trained ones: with the large B of single layers attention saturates, and the gradients of
    # any two roundings differ by more than their size.
    for path, _, n, k in case.linears:
        a, b = normal.factors(n, k, s["r"])
        operands.factors[path] = a, b / 32
    return operands


def oracle(operands: Operands) -> list[Tensor]:
    """Loss and gradients of the factors by the plain composition in float32."""
    model = copy.deepcopy(operands.model).float()
    factors = {path: (a.float(), b.float()) for path, (a, b) in operands.factors.items()}
    parameters = adapters.plain(model, factors)
    _checkpoint(model)
    tokens = operands.inputs["tokens"]
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return _results(parameters, loss.detach())


def _results(parameters: list[nn.Parameter], loss: Tensor) -> list[Tensor]:
    """The gradients together: those of q and k, whose own are rounding errors, must not stand alone."""
    return [loss, torch.cat([parameter.grad.flatten().float() for parameter in parameters])]


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
    model = copy.deepcopy(shared, {id(tensor): tensor for tensor in shared.parameters()})
    facts = {"liger": _liger(model)}
    adapt = PROVIDERS[name]
    parameters = adapt(model, operands.factors) if adapt else []
    if case.checkpointing:
        _checkpoint(model)
    model.train()
    if not parameters:
        library = "cublaslt" if name == "frozen_lt" else "cublas"
        step = partial(_frozen_step, model, tokens)
        return Prepared(step, None, with_blas(library), graphs=False, facts=facts)
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, fused=tokens.device.type == "cuda")
    step = partial(_step, model, optimizer, tokens)
    return Prepared(step, partial(_results, parameters), graphs=False, facts=facts)


def _frozen_step(model: Any, tokens: Tensor, _: int) -> Tensor:
    embedded = model.get_input_embeddings()(tokens).requires_grad_()
    loss = model(inputs_embeds=embedded, labels=tokens).loss
    loss.backward()
    return loss.detach()


def _step(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor, _: int) -> Tensor:
    optimizer.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    return loss.detach()
