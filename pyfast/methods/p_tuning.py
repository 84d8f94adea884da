# SPDX-License-Identifier: Apache-2.0
"""P-tuning: virtual tokens in front of the input, made by a small network (Liu et al., 2021; NeMo's, PEFT's).

`adapter_model.safetensors` holds what PEFT's does, the finished `prompt_embeddings` [V, H], and that is all
that is needed to use them. `adapter_training.safetensors` beside it holds the network, `prompt_encoder.*`, so
that training goes on where it was saved; PEFT passes over it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.errors import AdapterStateError, ConfigError, UnsupportedError
from pyfast.methods.base import Method, Plan, refuse_meta, register_method
from pyfast.nn.prompt import PromptEncoder, VirtualTokens, position_rows

_KINDS = ("MLP", "LSTM", "NEMO")
_NEMO_HIDDEN = 1024
_EMBEDDINGS = "prompt_embeddings"
_START = f"{VirtualTokens.child}."
_MAX_SIZE = 1 << 20


@dataclass
class PromptEncoderConfig:
    """P-tuning's settings; names and meaning are those of PEFT's `PromptEncoderConfig`.

    Attributes:
        num_virtual_tokens: V.
        encoder_reparameterization_type: "MLP" (three linears and ReLU), "LSTM" (two layers of it and two
            linears), or NeMo's "NEMO" (two linears and GELU), which PEFT uses but cannot train.
        encoder_hidden_size: size inside the network; None: the model's hidden size, for NEMO 1024.
        encoder_num_layers: of the LSTM.
        encoder_dropout: of the LSTM, between its layers.
        token_dim: the model's hidden size; None takes it.
        num_transformer_submodules: parts of the model that have virtual tokens of their own in the table;
            PEFT uses the first alone. None: one, with `decoder_prompt` two (PEFT's config object: two for
            SEQ_2_SEQ_LM).
        decoder_prompt: of an encoder and decoder: V more tokens in front of the decoder's input, the second
            part of the table. PEFT does not know it and uses the encoder's.
        num_attention_heads, num_layers: written to the adapter's file.
        task_type, base_model_name_or_path, revision, inference_mode: written to the adapter's file.
    """

    num_virtual_tokens: int = 20
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    decoder_prompt: bool = False
    num_attention_heads: int | None = None
    num_layers: int | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def check(self, width: int) -> None:
        """Raise ConfigError for values that cannot be served by a model of this hidden size."""
        sizes = {
            "num_virtual_tokens": self.num_virtual_tokens,
            "encoder_hidden_size": self.hidden(width),
            "encoder_num_layers": self.encoder_num_layers,
            "num_transformer_submodules": self.parts,
        }
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size <= _MAX_SIZE:
                raise ConfigError(
                    f"PromptEncoderConfig: {name}={size!r} must be an integer of at least 1 and at most "
                    f"{_MAX_SIZE}"
                )
        if self.encoder_reparameterization_type not in _KINDS:
            raise ConfigError(
                "PromptEncoderConfig: encoder_reparameterization_type="
                f"{self.encoder_reparameterization_type!r} must be one of {_KINDS}"
            )
        dropout = self.encoder_dropout
        if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise ConfigError(f"PromptEncoderConfig: encoder_dropout={dropout!r} must be in [0, 1)")
        if self.encoder_reparameterization_type != "LSTM" and (
            dropout,
            self.encoder_num_layers,
        ) != (
            0.0,
            2,
        ):
            raise ConfigError(
                "PromptEncoderConfig: encoder_num_layers and encoder_dropout are the LSTM's; leave them out "
                f"for {self.encoder_reparameterization_type}"
            )
        if self.token_dim not in (None, width):
            raise ConfigError(
                f"PromptEncoderConfig: token_dim={self.token_dim!r}, but the model's hidden size is {width}"
            )

    def hidden(self, width: int) -> int:
        """Size inside the network."""
        default = _NEMO_HIDDEN if self.encoder_reparameterization_type == "NEMO" else width
        return default if self.encoder_hidden_size is None else self.encoder_hidden_size

    @property
    def parts(self) -> int:
        """How many parts of the model have rows in the table."""
        given = self.num_transformer_submodules
        return 1 + bool(self.decoder_prompt) if given is None else given


class PromptEncoderMethod(Method):
    """Hangs `VirtualTokens` on the model and freezes everything else."""

    name = "P-tuning"
    config_type = PromptEncoderConfig
    peft_type = "P_TUNING"
    key_prefix = ""
    own_fields = ("decoder_prompt",)

    def completed(self, values: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """PEFT's defaults, and without what PEFT passes over."""
        if values.get("num_transformer_submodules") is None:
            two = values.get("task_type") == "SEQ_2_SEQ_LM"
            values["num_transformer_submodules"] = 2 if two else 1
        if values.get("encoder_reparameterization_type", "MLP") != "LSTM":
            values |= {"encoder_num_layers": 2, "encoder_dropout": 0.0}
        return values

    def plan(
        self,
        model: nn.Module,
        config: PromptEncoderConfig,
        adapter_name: str,
        *,
        allow_unmatched: bool,
        autocast_adapter_dtype: bool,
    ) -> Plan:
        """Check that the model takes embeddings; see `Method.plan`. The network is float32, as PEFT's."""
        table = _word_embeddings(model)
        width, rows = table.shape[1], config.num_virtual_tokens
        config.check(width)
        room = position_rows(model)
        if room is not None and rows >= room:
            raise ConfigError(
                f"PromptEncoderConfig: num_virtual_tokens={rows} leaves no position for an input, as "
                f"{type(model).__name__} has {room}. Nothing was changed. Fix: fewer, for example "
                f"num_virtual_tokens={room // 2}"
            )
        if hasattr(VirtualTokens(), adapter_name):
            raise AdapterStateError(
                f"adapter name {adapter_name!r} is taken by an attribute of the module that holds prompt "
                "encoders; choose another. Nothing was changed"
            )
        two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        if config.decoder_prompt and (not two or config.parts < 2):
            raise ConfigError(
                "PromptEncoderConfig: decoder_prompt=True needs an encoder and a decoder, and "
                f"num_transformer_submodules=2; {type(model).__name__} has "
                f"{'both' if two else 'one of them'}, num_transformer_submodules is {config.parts}"
            )
        held = getattr(model, VirtualTokens.child, None)
        if held is not None and not isinstance(held, VirtualTokens):
            raise UnsupportedError(
                f"P-tuning: {type(model).__name__} has a {VirtualTokens.child!r} of its own. Nothing was "
                "changed"
            )

        def encoder(device: torch.device) -> PromptEncoder:
            return PromptEncoder(
                config.encoder_reparameterization_type,
                rows * config.parts,
                width,
                config.hidden(width),
                config.encoder_num_layers,
                config.encoder_dropout,
                device,
            )

        def commit() -> None:
            made = encoder(table.device)
            held = VirtualTokens.at(model)
            held.add(adapter_name, made.train(model.training), rows, config.decoder_prompt)

        shapes = encoder(torch.device("meta")).named_parameters()
        training = {_START + key: tuple(parameter.shape) for key, parameter in shapes}
        return Plan({_EMBEDDINGS: (rows * config.parts, width)}, commit, training=training)

    def file_tensors(self, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """The virtual tokens' embeddings, as PEFT has them."""
        return {_EMBEDDINGS: _held(model).embeddings(adapter_name)}

    def training_tensors(self, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """The network that makes them; empty where it is not known."""
        encoder = _held(model).get_submodule(adapter_name)
        if not isinstance(encoder, PromptEncoder):
            return {}
        return {_START + key: parameter for key, parameter in encoder.named_parameters()}

    def fill(self, model: nn.Module, adapter_name: str, values: Mapping[str, Tensor]) -> None:
        """See `Method.fill`."""
        found = {key.removeprefix(_START): value for key, value in values.items()}
        _held(model).fill(adapter_name, found)

    def fields(
        self, model: nn.Module, config: PromptEncoderConfig, adapter_name: str
    ) -> dict[str, Any]:
        """With what PEFT needs to use them; see `Method.fields`."""
        found = {f.name: getattr(config, f.name) for f in fields(config)}
        about: Any = getattr(model, "config", None)
        width = _word_embeddings(model).shape[1]
        two_parts = bool(getattr(about, "is_encoder_decoder", False))
        defaults = {
            "token_dim": width,
            "encoder_hidden_size": config.hidden(width),
            "num_transformer_submodules": config.parts,
            "num_attention_heads": getattr(about, "num_attention_heads", None),
            "num_layers": getattr(about, "num_hidden_layers", None),
            # PEFT chooses the class that puts the tokens in by it.
            "task_type": "SEQ_2_SEQ_LM" if two_parts else "CAUSAL_LM",
        }
        if not config.decoder_prompt:
            del found["decoder_prompt"]
        return found | {n: value for n, value in defaults.items() if found.get(n, 0) is None}


def _held(model: nn.Module) -> VirtualTokens:
    """The model's virtual tokens, also where they hang on a part of it."""
    return next(module for module in model.modules() if isinstance(module, VirtualTokens))


def _word_embeddings(model: nn.Module) -> Tensor:
    """The weight [vocabulary, H] of the input embeddings.

    Raises:
        UnsupportedError: the model has none, or does not take embeddings in their place.
    """
    get = getattr(model, "get_input_embeddings", None)
    weight = getattr(get() if callable(get) else None, "weight", None)
    takes = "inputs_embeds" in inspect.signature(model.forward).parameters
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not takes:
        raise UnsupportedError(
            f"P-tuning needs a model with get_input_embeddings() and a forward that takes inputs_embeds; "
            f"{type(model).__name__} is none. Apply it to the transformers model itself. Nothing was changed"
        )
    refuse_meta("P-tuning", [("the input embeddings", weight)])
    return weight


register_method(PromptEncoderMethod())
