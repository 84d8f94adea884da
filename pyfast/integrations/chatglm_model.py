# SPDX-License-Identifier: Apache-2.0
"""Weights of ChatGLM 2 and 3 in their original layout, loaded into transformers' `GlmForCausalLM`.

The architectures are the same under other names, but that queries, keys and values are one matrix. No code
that comes with a checkpoint is run, and no pickle is opened. Once loaded, a model is a plain
`GlmForCausalLM`: it is saved as one, and adapters' files name its modules.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.glm.configuration_glm import GlmConfig
from transformers.models.glm.modeling_glm import GlmForCausalLM

from pyfast.errors import ConfigError, UnsafeFileError, UnsupportedError
from pyfast.methods.base import adopt

_INDEX = "model.safetensors.index.json"
_LONE = "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_CONSTANT = "transformer.rotary_pos_emb.inv_freq"
_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.layers": "model.layers",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
_QKV = "self_attention.query_key_value"
_SPLIT = [f"self_attn.{name}_proj" for name in "qkv"]
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class ChatGLMConfig(GlmConfig):  # type: ignore[no-untyped-call]
    """GLM's config while a model in the original layout is loaded; after that it is a plain `GlmConfig`."""

    model_type = "chatglm"


class ChatGLMForCausalLM(GlmForCausalLM):  # type: ignore[no-untyped-call]
    """What `AutoModelForCausalLM` loads the original layout with. It returns `GlmForCausalLM`."""

    config_class = ChatGLMConfig
    config: ChatGLMConfig
    _keys_to_ignore_on_load_unexpected = [rf"{_CONSTANT}$"]  # noqa: RUF012  # transformers' type

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers, but refused where the files do not fit, before a weight is read.

        Raises:
            ConfigError: weights are missing, surplus, damaged or of other shapes than config.json asks for.
            UnsafeFileError: the weights are Python pickles.
            UnsupportedError: weights are quantised.
        """
        name = str(pretrained_model_name_or_path)
        place = Path(name)
        if not place.is_dir():
            hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
            patterns = ["*.json", "*.safetensors"]
            place = Path(snapshot_download(name, allow_patterns=patterns, **hub))
            kwargs.pop("_commit_hash", None)
        check_weights(place / (kwargs.get("subfolder") or ""), config, name)
        kwargs["use_safetensors"] = True
        loaded = super().from_pretrained(place, *args, config=config, **kwargs)
        _become_glm(loaded[0] if isinstance(loaded, tuple) else loaded, name)
        return loaded

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        model = super()._from_config(copy.deepcopy(config), **kwargs)  # type: ignore[no-untyped-call]
        _become_glm(model, config.name_or_path)
        return model


def _become_glm(model: Any, name: str) -> None:
    config = model.config
    vars(config).pop("multi_query_attention", None)
    config.__class__ = GlmConfig  # in place, since every module of the model holds it
    model.name_or_path = config.name_or_path = name
    changed = type(model) is not ChatGLMForCausalLM  # it has NF4 layers
    model.__class__ = GlmForCausalLM
    model._weight_conversions = []  # or it would be saved under the names it was read from
    if changed:
        adopt(model)


class _SplitQKV(ConversionOps):
    """Rows of the fused matrix: all queries, keys, values, or of each head its query, key and value."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The fused tensor, weight or bias, as three."""
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        config = kwargs["config"]
        size = config.head_dim
        if config.multi_query_attention:
            keys = config.num_key_value_heads * size
            parts = tensor.split([config.num_attention_heads * size, keys, keys])
        else:
            heads = tensor.view(config.num_attention_heads, 3, size, *tensor.shape[1:])
            parts = tuple(part.flatten(0, 1) for part in heads.unbind(1))
        return dict(zip(target_patterns, (part.contiguous() for part in parts), strict=True))


class _Fused(WeightConverter):
    """Quantisers take the tensors of one weight at a time, and choose by name: so they get each part."""

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        """The parts of one fused tensor, those quantised that the quantiser wants."""
        parts: dict[str, Any] = super().convert(layer_name, model, config, None, loading_info)
        if hf_quantizer is None or hf_quantizer.pre_quantized:
            return parts
        done: dict[str, Any] = {}
        for name, tensor in parts.items():
            if not hf_quantizer.param_needs_quantization(model, name):
                done[name] = tensor
                continue
            done |= hf_quantizer.get_quantize_ops().convert(
                {name: tensor},
                source_patterns=[name],
                target_patterns=[name],
                full_layer_name=name,
                model=model,
                config=config,
                missing_keys=loading_info.missing_keys,
            )
        return done


def check_weights(directory: Path, config: Any, name: str) -> None:
    """Compare the headers of a checkpoint's files with what its config asks for; for errors see
    `ChatGLMForCausalLM.from_pretrained`.

    Args:
        directory: where the files are.
        config: a `ChatGLMConfig`.
        name: the model as the user named it.
    """
    wanted = expected_shapes(config)
    stored: dict[str, tuple[int, ...]] = {}
    for file in _files(directory, name):
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # it is no dict
                    part = opened.get_slice(key)
                    stored[key] = tuple(part.get_shape())
                    if part.get_dtype() not in _FLOATS:
                        raise UnsupportedError(
                            f"'{name}': {key} is stored as {part.get_dtype()}; a quantised ChatGLM is not "
                            "read. Fix: the checkpoint in half precision."
                        )
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"'{file}' is damaged ({error}). Fix: get it again.") from error
    stored.pop(_CONSTANT, None)
    if lacking := sorted(wanted.keys() - stored.keys()):
        raise ConfigError(
            f"'{name}' lacks {len(lacking)} weights that its config.json asks for (first: {lacking[0]}). "
            "Fix: get the model again, as a whole."
        )
    if surplus := sorted(stored.keys() - wanted.keys()):
        raise ConfigError(
            f"'{name}' holds {len(surplus)} weights that its config.json does not ask for (first: "
            f"{surplus[0]}). Fix: the config.json that belongs to the weights."
        )
    if other := sorted(key for key, shape in stored.items() if shape != wanted[key]):
        raise ConfigError(
            f"{len(other)} weights of '{name}' have other shapes than its config.json asks for (first: "
            f"{other[0]}, {list(stored[other[0]])} for {list(wanted[other[0]])}). "
            "Fix: the config.json that belongs to the weights."
        )


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Original name to shape of every weight."""
    size, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    queries = config.num_attention_heads * config.head_dim
    fused = queries + 2 * config.num_key_value_heads * config.head_dim
    layer = {
        "input_layernorm.weight": (size,),
        "self_attention.query_key_value.weight": (fused, size),
        "self_attention.dense.weight": (size, queries),
        "post_attention_layernorm.weight": (size,),
        "mlp.dense_h_to_4h.weight": (2 * inner, size),
        "mlp.dense_4h_to_h.weight": (size, inner),
    }
    if config.attention_bias:
        layer["self_attention.query_key_value.bias"] = (fused,)
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (vocabulary, size),
        "transformer.encoder.final_layernorm.weight": (size,),
        "transformer.output_layer.weight": (vocabulary, size),
    }
    for index in range(config.num_hidden_layers):
        start = f"transformer.encoder.layers.{index}"
        shapes |= {f"{start}.{key}": shape for key, shape in layer.items()}
    return shapes


def _files(directory: Path, name: str) -> list[Path]:
    """The safetensors files of a checkpoint."""
    index = directory / _INDEX
    if not index.is_file():
        if (directory / _LONE).is_file():
            return [directory / _LONE]
        if pickles := sorted(directory.glob("*.bin")):
            raise UnsafeFileError(
                f"'{name}' has its weights as Python pickles ({pickles[0].name}), which can run code when "
                "read; pyfast does not open them. Fix: the safetensors files of the same model."
            )
        raise ConfigError(f"'{name}' has no {_LONE}. Fix: get the model again, as a whole.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [file for file in names if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"'{index}' cannot be read: {error!r}. Fix: get it again.") from error
    if outside:
        raise UnsafeFileError(
            f"'{index}' names a file outside its directory: {outside[0]!r}. Fix: get it again."
        )
    if lacking := [file for file in names if not (directory / file).is_file()]:
        raise ConfigError(
            f"'{name}' lacks {len(lacking)} of its files (first: {lacking[0]}). "
            "Fix: get the model again, as a whole."
        )
    return [directory / file for file in names]


register_checkpoint_conversion_mapping(
    ChatGLMConfig.model_type,
    [
        *(WeightRenaming(theirs, glm) for theirs, glm in _NAMES.items()),
        _Fused(_QKV, list(_SPLIT), [_SplitQKV()]),
    ],
)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM)
