# SPDX-License-Identifier: Apache-2.0
"""How each provider puts a fine-tuning method into the model of a training step.

Every entry of `METHODS` changes a model that the step has for itself, gives it the values that the operands
hold, and returns what is called in the step and what it trains, in the order of the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyfast
from benchmarks import adapters
from benchmarks.bnb_layers import linear_4bit, our_linear
from benchmarks.cases import LORA_METHODS, Case
from benchmarks.operands import Normal, Operands, quantized
from benchmarks.prepared import Absent, need
from pyfast.ops import NestedScales

IGNORED = -100
Made = tuple[nn.Module, list[nn.Parameter]]
Adapt = Callable[[nn.Module, Operands], Made]


def fill_operands(operands: Operands, normal: Normal) -> None:
    """The values that a method starts with, where `Case.linears` are layers of the operands' model.

    Adapters have the dtype of the model, but IA3's vectors and P-tuning's network, which PEFT and pyfast both
    hold in float32.
    """
    case = operands.case
    if case.method in LORA_METHODS:
        # B as small as trained ones: with the large B of single layers attention saturates, and the gradients
        # of any two roundings differ by more than their size.
        for path, _, n, k in case.linears:
            a, b = normal.factors(n, k, case.shape["r"])
            operands.factors[path] = a, b / 32
    if case.method == "qlora":
        for path, *_ in case.linears:
            layer = operands.model.get_submodule(path)
            operands.parts[path] = quantized(layer.weight.data)
            layer.weight.data = operands.parts[path].w
    makers = {"ia3": _vectors, "bottleneck": _bottlenecks, "p_tuning": _encoder}
    if case.method in makers:
        operands.extra = makers[case.method](case, normal)


def find(name: str, method: str) -> Adapt:
    """How a provider makes a method.

    Raises:
        Absent: it has none.
    """
    if name not in METHODS[method]:
        raise Absent(f"{name} has no {method}")
    return METHODS[method][name]


def _fill(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> list[nn.Parameter]:
    filled = list(parameters)
    with torch.no_grad():
        for parameter, value in zip(filled, values, strict=True):
            parameter.copy_(value.view_as(parameter))
    return filled


# --- LoRA ---------------------------------------------------------------------------------------


def _lora(adapt: Callable[..., list[nn.Parameter]], model: nn.Module, operands: Operands) -> Made:
    return model, adapt(model, operands.factors)


def _qlora(
    adapt: Callable[..., list[nn.Parameter]],
    layer: Callable[[Operands], nn.Module],
    model: nn.Module,
    operands: Operands,
) -> Made:
    if layer is linear_4bit:
        need("bitsandbytes")
        model.is_loaded_in_4bit = True  # PEFT asks for it
    for path, part in operands.parts.items():
        # Bytes of its own, so that they count as memory of the provider.
        nest = NestedScales(*(scale.clone() for scale in part.nest))
        own = replace(part, packed=part.packed.clone(), absmax=part.absmax.clone(), nest=nest)
        model.set_submodule(path, layer(own))
    return _lora(adapt, model, operands)


# --- SFT ----------------------------------------------------------------------------------------


def _torch_sft(model: nn.Module, operands: Operands) -> Made:
    return model, list(model.requires_grad_(True).parameters())


def _our_sft(model: nn.Module, operands: Operands) -> Made:
    pyfast.apply(model, pyfast.SFTConfig())
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- IA3 ----------------------------------------------------------------------------------------

_OUTPUTS, _INPUTS = ["k_proj", "v_proj"], ["down_proj"]


def _vectors(case: Case, normal: Normal) -> dict[str, Tensor]:
    sizes = {}
    for path, _, n, k in case.linears:
        name = path.rpartition(".")[2]
        if name in (*_OUTPUTS, *_INPUTS):
            sizes[path] = k if name in _INPUTS else n
    return {path: 1 + normal(size, std=0.1).float() for path, size in sizes.items()}


class PlainScale(nn.Module):
    """A linear layer with its inputs or its outputs scaled."""

    def __init__(self, base: nn.Module, vector: Tensor, on_input: bool) -> None:
        super().__init__()
        self.base, self.on_input = base, on_input
        self.vector = nn.Parameter(vector.clone())

    def forward(self, x: Tensor) -> Tensor:
        vector = self.vector.to(x.dtype)
        return self.base(x * vector) if self.on_input else self.base(x) * vector


def _torch_ia3(model: nn.Module, operands: Operands) -> Made:
    parameters = []
    for path, vector in operands.extra.items():
        layer = PlainScale(model.get_submodule(path), vector, path.endswith(tuple(_INPUTS)))
        model.set_submodule(path, layer)
        parameters.append(layer.vector)
    return model, parameters


def _filled_ia3(model: nn.Module, operands: Operands) -> Made:
    layers: list[Any] = [model.get_submodule(path) for path in operands.extra]
    vectors = [layer.ia3_l["default"] for layer in layers]
    return model, _fill(vectors, operands.extra.values())


def _peft_ia3(model: nn.Module, operands: Operands) -> Made:
    need("peft")
    import peft

    names = [*_OUTPUTS, *_INPUTS]
    config = peft.IA3Config(target_modules=names, feedforward_modules=_INPUTS)
    peft.inject_adapter_in_model(config, model)
    return _filled_ia3(model, operands)


def _our_ia3(model: nn.Module, operands: Operands) -> Made:
    pyfast.apply(model, pyfast.IA3Config())
    return _filled_ia3(model, operands)


# --- Adapters -----------------------------------------------------------------------------------


def _bottlenecks(case: Case, normal: Normal) -> dict[str, Tensor]:
    """NeMo's form, behind attention and MLP of each layer, by path of the block and name."""
    width, size = case.shape["hidden"], case.shape["r"]
    found = {}
    for layer in range(case.shape["layers"]):
        for block in ("self_attn", "mlp"):
            path = f"model.layers.{layer}.{block}"
            found[f"{path}.down"] = normal.weight(size, width)
            found[f"{path}.up"] = normal(width, size, std=0.02)
            found[f"{path}.norm_weight"] = 1 + normal(width, std=0.1)
            found[f"{path}.norm_bias"] = normal(width, std=0.1)
    return found


def _blocks(operands: Operands) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in operands.extra.items():
        path, _, name = key.rpartition(".")
        found.setdefault(path, {})[name] = value
    return found


class PlainBottleneck(nn.Module):
    """h + U silu(D LayerNorm(h)), a hook behind a block whose output is h or begins with it."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, block: nn.Module, _: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        normed = F.layer_norm(h, h.shape[-1:], self.norm_weight, self.norm_bias)
        y = h + F.linear(F.silu(F.linear(normed, self.down)), self.up)
        return (y, *output[1:]) if isinstance(output, tuple) else y


def _torch_bottleneck(model: nn.Module, operands: Operands) -> Made:
    parameters: list[nn.Parameter] = []
    for path, values in _blocks(operands).items():
        adapter = PlainBottleneck(**values)
        model.get_submodule(path).register_forward_hook(adapter)
        parameters += adapter.parameters()
    return model, parameters


def _our_bottleneck(model: nn.Module, operands: Operands) -> Made:
    config = pyfast.BottleneckConfig(bottleneck_size=operands.case.shape["r"])
    pyfast.apply(model, config, autocast_adapter_dtype=False)
    parameters: list[nn.Parameter] = []
    for path, values in _blocks(operands).items():
        adapter = model.get_submodule(f"{path}.bottleneck.adapters.default")
        parameters += _fill([adapter.get_parameter(name) for name in values], values.values())
    return model, parameters


# --- P-tuning -----------------------------------------------------------------------------------


def _encoder(case: Case, normal: Normal) -> dict[str, Tensor]:
    """PEFT's network, three linears of the model's size, by its names."""
    width = case.shape["hidden"]
    found = {"embedding.weight": normal(case.shape["virtual"], width)}
    for layer in (0, 2, 4):
        found[f"mlp_head.{layer}.weight"] = normal.weight(width, width)
        found[f"mlp_head.{layer}.bias"] = normal(width, std=0.02)
    return {name: value.float() for name, value in found.items()}


class PlainPrompt(nn.Module):
    """A model behind virtual tokens that a network makes."""

    def __init__(self, model: nn.Module, virtual: int, width: int) -> None:
        super().__init__()
        self.model, self.embedding = model, nn.Embedding(virtual, width)
        linears = [nn.Linear(width, width) for _ in range(3)]
        self.mlp_head = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        embeds = self.model.get_input_embeddings()(input_ids)
        prompt = self.mlp_head(self.embedding.weight).to(embeds.dtype)
        front = prompt.expand(len(embeds), *prompt.shape)
        labels = F.pad(labels, (len(prompt), 0), value=IGNORED)
        return self.model(inputs_embeds=torch.cat([front, embeds], dim=1), labels=labels)


def _torch_p_tuning(model: nn.Module, operands: Operands) -> Made:
    values = operands.extra
    with operands.inputs["tokens"].device:
        made = PlainPrompt(model, *values["embedding.weight"].shape)
    return made, _fill([made.get_parameter(name) for name in values], values.values())


def _filled_encoder(model: Any, operands: Operands) -> Made:
    encoder: nn.Module = model.prompt_encoder.get_submodule("default")
    values = operands.extra
    return model, _fill([encoder.get_parameter(name) for name in values], values.values())


def _peft_p_tuning(model: nn.Module, operands: Operands) -> Made:
    need("peft")
    import peft

    virtual = operands.case.shape["virtual"]
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
    return _filled_encoder(peft.get_peft_model(model, config), operands)


def _our_p_tuning(model: nn.Module, operands: Operands) -> Made:
    virtual = operands.case.shape["virtual"]
    pyfast.apply(model, pyfast.PromptEncoderConfig(num_virtual_tokens=virtual))
    return _filled_encoder(model, operands)


METHODS: dict[str, dict[str, Adapt]] = {
    "lora": {
        "torch": partial(_lora, adapters.plain),
        "peft": partial(_lora, adapters.peft),
        "unsloth": partial(_lora, partial(adapters.unsloth, inplace=True)),
        "pyfast": partial(_lora, adapters.ours),
    },
    "qlora": {
        "torch": partial(_lora, adapters.plain),
        "peft": partial(_qlora, adapters.peft, linear_4bit),
        "unsloth": partial(_qlora, partial(adapters.unsloth, inplace=True), linear_4bit),
        "pyfast": partial(_qlora, adapters.ours, our_linear),
    },
    "sft": {"torch": _torch_sft, "pyfast": _our_sft},
    "p_tuning": {"torch": _torch_p_tuning, "peft": _peft_p_tuning, "pyfast": _our_p_tuning},
    "bottleneck": {"torch": _torch_bottleneck, "pyfast": _our_bottleneck},
    "ia3": {"torch": _torch_ia3, "peft": _peft_ia3, "pyfast": _our_ia3},
}
"""By method and provider; what torch has is the oracle's."""
