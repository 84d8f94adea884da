# SPDX-License-Identifier: Apache-2.0
"""References on plain models: PEFT's, and by NeMo's and the papers' formulas what PEFT has not."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.matrix.places import key_value_rows, matrix_of, modules_at, places_of
from tests.models import plain

VIRTUAL = 5

# --- NF4 ----------------------------------------------------------------------------------------


def quantised(model: Any) -> dict[str, tuple[Tensor, Any]]:
    """What is in 4 bits, as bitsandbytes makes it, by the parameter's name: all linears but the output layer
    and T5's `wo`, and experts. Flat: bitsandbytes 0.50 misreads blocks that cross rows on the CPU."""
    chosen = {
        f"{path}.weight": matrix_of(module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
    }
    chosen = {name: w for name, w in chosen.items() if not name.endswith(".wo.weight")}
    chosen |= {name: w for name, w in model.named_parameters() if ".experts." in name}
    return {
        name: bnb.quantize_4bit(
            weight.detach().flatten(), quant_type="nf4", blocksize=64, compress_statistics=True
        )
        for name, weight in chosen.items()
    }


def in_four_bits(model: nn.Module, chosen: Collection[str] | None = None) -> nn.Module:
    """The dense model, with the values that bitsandbytes' 4-bit layers would have, in all or these."""
    with torch.no_grad():
        for name, (packed, state) in quantised(model).items():
            if chosen is not None and name not in chosen:
                continue
            path, _, last = name.rpartition(".")
            module: Any = model.get_submodule(path)
            to = matrix_of(module) if last == "weight" else getattr(module, last)
            to.copy_(bnb.dequantize_4bit(packed, state).view(to.shape))
    return model


# --- LoRA ---------------------------------------------------------------------------------------

RANK: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
EXPERTS = RANK | {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


def lora(base: Any) -> nn.Module:
    """PEFT's, in all linears."""
    options = dict(RANK)
    if hasattr(base.config, "num_local_experts"):
        # PEFT's "all-linear" takes the router and the experts' 3-D tensors too.
        options["target_modules"] = EXPERTS["target_modules"]
    transposed = any(isinstance(module, Conv1D) for module in base.modules())
    return peft.get_peft_model(base, peft.LoraConfig(fan_in_fan_out=transposed, **options))


def lora_of_experts(base: Any) -> nn.Module:
    """PEFT's, in the linears of attention and in experts."""
    return peft.get_peft_model(base, peft.LoraConfig(**EXPERTS))


# --- IA3 ----------------------------------------------------------------------------------------


def ia3(base: Any) -> nn.Module:
    """k, v and the input of the MLP's last projection, each times a vector of ones: PEFT's where these are
    linears of their own, else written out."""
    places = places_of(base)
    if not places.fused and places.down:
        down = [places.down]
        targets = [places.keys, places.values, *down]
        config = peft.IA3Config(target_modules=targets, feedforward_modules=down)
        return peft.get_peft_model(base, config)
    base.requires_grad_(False)
    for module in modules_at(base, places.down).values():
        module.ia3_l = nn.Parameter(torch.ones(1, matrix_of(module).shape[1]))
        module.register_forward_pre_hook(_scale_input)
    if places.fused:
        for module in modules_at(base, places.fused).values():
            rows = key_value_rows(base.config, matrix_of(module).shape[0])
            module.ia3_l = nn.Parameter(torch.ones(len(rows), 1))
            module.register_forward_hook(_scaling_rows(rows))
        return base
    for module in modules_at(base, places.keys, places.values).values():
        module.ia3_l = nn.Parameter(torch.ones(matrix_of(module).shape[0], 1))
        module.register_forward_hook(_scale_output)
    for experts in modules_at(base, "experts").values():  # they multiply act(gate) with up
        experts.act_fn.ia3_l = nn.Parameter(torch.ones(1, experts.down_proj.shape[-1]))
        experts.act_fn.register_forward_hook(_scale_output)
    return base


def _scale_input(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * module.ia3_l.flatten(), *args[1:])


def _scale_output(module: Any, _: Any, output: Tensor) -> Tensor:
    return output * module.ia3_l.flatten()


def _scaling_rows(rows: Tensor) -> Any:
    def hook(module: Any, _: Any, output: Tensor) -> Tensor:
        factors = module.ia3_l.flatten()
        return output * factors.new_ones(output.shape[-1]).index_put((rows,), factors)

    return hook


def ia3_name(name: str) -> str:
    """Our name of a parameter of `ia3`."""
    if name.endswith(".default"):
        return plain(name)
    return name.replace(".act_fn.ia3_l", ".act_fn.ia3.ia3_l") + ".default"


def ia3_of_file(base: Any, directory: Path) -> nn.Module:
    """PEFT's model of what we saved; where the file has experts, which PEFT has no place for, `ia3`."""
    if places_of(base).down:
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
    """PEFT's model without what it returns for virtual tokens; greedy answers come from whole forwards."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.peft, self.config = made, made.config

    def forward(self, **inputs: Any) -> Any:
        """PEFT's output, logits for the caller's tokens alone."""
        output = self.peft(**inputs)
        if not self.config.is_encoder_decoder:
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


def prompted(base: Any) -> nn.Module:
    """PEFT's, in front of the (encoder's) input."""
    two = base.config.is_encoder_decoder
    config = peft.PromptEncoderConfig(
        task_type="SEQ_2_SEQ_LM" if two else "CAUSAL_LM",
        num_virtual_tokens=VIRTUAL,
        num_transformer_submodules=1,
    )
    return Prompted(peft.get_peft_model(base, config))


def prompt_of_file(base: Any, directory: Path) -> nn.Module:
    """PEFT's, of what we saved."""
    return Prompted(peft.PeftModel.from_pretrained(base, directory))


# --- bottleneck adapters ------------------------------------------------------------------------

SIZE = 8


def bottleneck(base: Any) -> nn.Module:
    """h + U silu(D LayerNorm(h)) behind every block, U of zeros: NeMo's canonical form."""
    base.requires_grad_(False)
    width = base.config.hidden_size
    for block in modules_at(base, *places_of(base).blocks).values():
        made = {
            "down": torch.zeros(SIZE, width),
            "up": torch.zeros(width, SIZE),
            "norm_weight": torch.ones(width),
            "norm_bias": torch.zeros(width),
        }
        block.reference = nn.ParameterDict(made)
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


def bottleneck_of_file(base: Any, directory: Path) -> nn.Module:
    """`bottleneck` with the values of a file."""
    made = bottleneck(base)
    stored = load_file(directory / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".reference." in name:
                key = name.replace(".reference.", ".bottleneck.")
                parameter.copy_(stored[f"base_model.model.{key}"])
    return made
