# SPDX-License-Identifier: Apache-2.0
"""References of methods that PEFT has not, or not as NeMo and the papers define them, on plain models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pyfast.families import Role, layers_of

VIRTUAL = 5

# --- IA3 ----------------------------------------------------------------------------------------


def ia3(base: nn.Module) -> nn.Module:
    """k, v and the input of the MLP's last projection, each times a vector of ones; that of experts as they
    multiply act(gate) with up."""
    base.requires_grad_(False)
    for layer in layers_of(base):
        for path, role in layer.roles().items():
            module = layer.module.get_submodule(path)
            if role is Role.DOWN:
                width = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
                module.ia3_l = nn.Parameter(torch.ones(1, width))
                module.register_forward_pre_hook(_scale_input)
            elif role in (Role.K, Role.V):
                module.ia3_l = nn.Parameter(torch.ones(module.weight.shape[0], 1))
                module.register_forward_hook(_scale_output)
            elif role is Role.QKV:
                layout = layer.layout(role)
                rows = torch.cat([layout.rows(Role.K), layout.rows(Role.V)]).sort().values
                module.ia3_l = nn.Parameter(torch.ones(len(rows), 1))
                module.register_forward_hook(_scaling_rows(rows))
        for path, role in layer.family.experts.items():
            if role is Role.DOWN:
                experts = layer.module.get_submodule(path.rpartition(".")[0])
                width = experts.down_proj.shape[-1]
                experts.act_fn.ia3_l = nn.Parameter(torch.ones(1, width))
                experts.act_fn.register_forward_hook(_scale_output)
    return base


def _scale_input(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * module.ia3_l.flatten(), *args[1:])


def _scale_output(module: Any, _: Any, output: Tensor) -> Tensor:
    return output * module.ia3_l.flatten()


def _scaling_rows(rows: Tensor) -> Any:
    def hook(module: Any, _: Any, output: Tensor) -> Tensor:
        factors = torch.ones(output.shape[-1]).index_put((rows,), module.ia3_l.flatten())
        return output * factors

    return hook


def ia3_name(name: str) -> str:
    """Our name of a parameter of `ia3`."""
    return name.replace(".act_fn.ia3_l", ".act_fn.ia3.ia3_l") + ".default"


def ia3_of_file(base: nn.Module, directory: Path) -> nn.Module:
    """PEFT's model of what we saved; where the file has experts, which PEFT has no place for, `ia3`."""
    if not any(layer.family.experts for layer in layers_of(base)):
        return peft.PeftModel.from_pretrained(base, directory)
    made = ia3(base)
    stored = load_file(directory / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(".ia3_l"):
                key = name.replace("experts.act_fn", "experts.down_proj")
                parameter.copy_(stored[f"base_model.model.{key}"])
    return made


# --- P-tuning -----------------------------------------------------------------------------------


class Prompted(nn.Module):
    """A model with PEFT's prompt encoder, written out; greedy answers come from whole forwards."""

    def __init__(self, base: Any, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.base, self.config = base.requires_grad_(False), base.config
        config = peft.PromptEncoderConfig(
            num_virtual_tokens=VIRTUAL,
            token_dim=base.config.hidden_size,
            num_transformer_submodules=1,
            encoder_hidden_size=base.config.hidden_size,
        )
        made = peft.PromptEncoder(config) if encoder is None else encoder
        self.prompt_encoder = nn.ModuleDict({"default": made})

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The base's output for virtual tokens and ids, logits for the ids alone."""
        embeds = self.base.get_input_embeddings()(input_ids)
        prompt = self.prompt_encoder["default"](torch.arange(VIRTUAL)).to(embeds.dtype)
        rows = len(input_ids)
        embeds = torch.cat([prompt.expand(rows, -1, -1), embeds], dim=1)
        two = self.config.is_encoder_decoder
        if not two and "labels" in inputs:
            ignored = torch.full((rows, VIRTUAL + 1), -100)
            inputs["labels"] = torch.cat([ignored, inputs["labels"][:, 1:]], dim=1)
        output = self.base(inputs_embeds=embeds, **inputs)
        if not two:
            output.logits = output.logits[:, VIRTUAL:]
        return output

    def generate(self, input_ids: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        """Greedy, until the end token or so many tokens."""
        two, config = self.config.is_encoder_decoder, self.config
        made = torch.zeros(len(input_ids), 1, dtype=torch.long) if two else input_ids
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            inputs = {"input_ids": input_ids, "decoder_input_ids": made}
            with torch.no_grad():
                logits = self(**(inputs if two else {"input_ids": made}), use_cache=False).logits
            tokens = logits[:, -1].argmax(-1).masked_fill(ended, config.pad_token_id)
            made = torch.cat([made, tokens[:, None]], dim=1)
            ended |= tokens == config.eos_token_id
            if bool(ended.all()):
                break
        return made


class _Table(nn.Module):
    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, indices: Tensor) -> Tensor:
        return self.embeddings[indices]


def prompt_of_file(base: nn.Module, directory: Path) -> nn.Module:
    """The model with the virtual tokens of a file as they stand there."""
    stored = load_file(directory / "adapter_model.safetensors")
    return Prompted(base, _Table(stored["prompt_embeddings"]))


# --- bottleneck adapters ------------------------------------------------------------------------

SIZE = 8


def bottleneck(base: nn.Module) -> nn.Module:
    """h + U silu(D LayerNorm(h)) behind every block, U of zeros: NeMo's canonical form."""
    base.requires_grad_(False)
    for layer in layers_of(base):
        for path in (*layer.mixers(), *layer.mlps()):
            block = layer.module.get_submodule(path)
            width = layer.config.hidden_size
            made = {
                "down": torch.zeros(SIZE, width),
                "up": torch.zeros(width, SIZE),
                "norm_weight": torch.ones(width),
                "norm_bias": torch.zeros(width),
            }
            dtype = next(base.parameters()).dtype
            block.reference = nn.ParameterDict({k: v.to(dtype) for k, v in made.items()})
            block.register_forward_hook(_add_bottleneck)
    return base


def _add_bottleneck(block: Any, _: Any, output: Any) -> Any:
    h, held = (output[0] if isinstance(output, tuple) else output), block.reference
    centred = h - h.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    inner = (normed * held["norm_weight"] + held["norm_bias"]) @ held["down"].T
    h = h + (inner * torch.sigmoid(inner)) @ held["up"].T
    return (h, *output[1:]) if isinstance(output, tuple) else h


def bottleneck_name(name: str) -> str:
    """Our name of a parameter of `bottleneck`."""
    return name.replace(".reference.", ".bottleneck.adapters.default.")


def bottleneck_of_file(base: nn.Module, directory: Path) -> nn.Module:
    """`bottleneck` with the values of a file."""
    made = bottleneck(base)
    stored = load_file(directory / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".reference." in name:
                key = name.replace(".reference.", ".bottleneck.")
                parameter.copy_(stored[f"base_model.model.{key}"])
    return made
