# SPDX-License-Identifier: Apache-2.0
"""The config.json of ChatGLM 2 and 3 in its original layout, read as one of transformers' GLM.

Importing this tells `AutoConfig` of it. `chatglm_model` and `chatglm_tokenizer` are imported with the first
such file, since transformers imports its own models late too.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from pyfast.errors import ConfigError, UnsupportedError

ROPE_BASE = 10000.0
_SIZES = {
    "num_layers": "num_hidden_layers",
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "seq_length": "max_position_embeddings",
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "rmsnorm": (True,),
    "original_rope": (True,),
    "post_layer_norm": (True,),
    "apply_residual_connection_post_layernorm": (False,),
    "add_bias_linear": (False,),
    "fp32_residual_connection": (False,),
    "tie_word_embeddings": (False,),
    "hidden_dropout": (0,),
    "pre_seq_len": (None, 0),
    "quantization_bit": (None, 0),
    "quantization_config": (None,),
}
"""Options that GLM has no counterpart of, and the values under which it computes the same."""
_KEPT = ("attention_dropout", "bos_token_id", "dtype", "torch_dtype", "use_cache")
_ROPE_KEY = "rope_ratio_of"


class OriginalConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What `AutoConfig` reads the model type of the original layout with. It returns a `ChatGLMConfig`."""

    model_type = "chatglm"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the original keys; for `kwargs` see `PreTrainedConfig.from_dict`.

        Raises:
            ConfigError: a key is missing or has a value that no model has.
            UnsupportedError: an option is set that GLM has no counterpart of.
        """
        from pyfast.integrations import chatglm_model, chatglm_tokenizer  # noqa: F401  # AutoTokenizer's

        given = dict(config_dict)
        if _ROPE_KEY in kwargs:
            given[_ROPE_KEY] = kwargs.pop(_ROPE_KEY)
        values = glm_values(given, str(kwargs.get("name_or_path", "")))
        return chatglm_model.ChatGLMConfig.from_dict(values, **kwargs)


def glm_values(given: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments of `GlmConfig`, and `multi_query_attention`, for an original config.json.

    Args:
        given: what the file holds.
        name: the model directory or name, for messages.

    Raises:
        ConfigError: as `OriginalConfig.from_dict`.
        UnsupportedError: as `OriginalConfig.from_dict`.
    """
    missing = [key for key in (*_SIZES, "layernorm_epsilon") if key not in given]
    if missing:
        raise ConfigError(
            f"the config.json of '{name}' says chatglm but lacks {', '.join(missing)}, which ChatGLM 2 and 3 "
            "have (the first ChatGLM is another architecture). Fix: the original checkpoint's config.json."
        )
    for key in _SIZES:
        if type(given[key]) is not int or given[key] < 1:
            raise ConfigError(
                f"'{name}': {key} is {given[key]!r} in config.json; it must be a positive integer."
            )
    for key, allowed in _FIXED.items():
        if given.get(key, allowed[0]) not in allowed:
            raise UnsupportedError(
                f"'{name}' has {key}={given[key]!r} in config.json, which transformers' GLM cannot compute; "
                f"only {allowed[0]!r} is served. Fix: a checkpoint with {key}={allowed[0]!r}."
            )
    values = {glm: given[key] for key, glm in _SIZES.items()}
    values |= {key: given[key] for key in _KEPT if key in given}
    return values | {
        "rms_norm_eps": given["layernorm_epsilon"],
        "attention_bias": bool(given.get("add_qkv_bias", False)),
        "num_key_value_heads": _groups(given, name),
        "multi_query_attention": bool(given.get("multi_query_attention", False)),
        "rope_parameters": _rope(given, name),
        "pad_token_id": given.get("pad_token_id", 0),
        "eos_token_id": given.get("eos_token_id", 2),
    }


def _groups(given: dict[str, Any], name: str) -> int:
    heads: int = given["num_attention_heads"]
    if not given.get("multi_query_attention", False):
        return heads
    groups = given.get("multi_query_group_num", 1)
    if type(groups) is not int or groups < 1 or heads % groups:
        raise ConfigError(
            f"'{name}': multi_query_group_num is {groups!r} in config.json; it must divide the {heads} "
            "attention heads."
        )
    return groups


def _rope(given: dict[str, Any], name: str) -> dict[str, Any]:
    """`rope_parameters`: rope_ratio divides the positions of ChatGLM2-32k, and multiplies the base of those
    that came later. The key's value does not tell which."""
    values = {"rope_type": "default", "rope_theta": ROPE_BASE, "partial_rotary_factor": 0.5}
    ratio = given.get("rope_ratio") or 1
    if type(ratio) not in (int, float) or ratio <= 0:
        raise ConfigError(
            f"'{name}': rope_ratio is {ratio!r} in config.json; it must be a positive number."
        )
    if ratio == 1:
        return values
    what = (
        given.get(_ROPE_KEY) or _published(str(given.get("_name_or_path", ""))) or _published(name)
    )
    if what == "base":
        return values | {"rope_theta": ROPE_BASE * ratio}
    if what == "positions":
        return values | {"rope_type": "linear", "factor": float(ratio)}
    raise ConfigError(
        f"'{name}' has rope_ratio={ratio} and no name that tells its meaning: it multiplies the rotary base "
        f'of ChatGLM3, and divides positions in ChatGLM2. Fix: "{_ROPE_KEY}": "base" or "positions" in '
        "config.json."
    )


def _published(name: str) -> str | None:
    """What rope_ratio applies to in the checkpoints that were published under a name."""
    name = name.lower()
    if "chatglm2" in name:
        return "positions"
    return "base" if "chatglm3" in name or "glm-4" in name else None


if OriginalConfig.model_type not in CONFIG_MAPPING:  # a release may have a class of its own
    AutoConfig.register(OriginalConfig.model_type, OriginalConfig)
