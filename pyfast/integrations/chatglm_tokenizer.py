# SPDX-License-Identifier: Apache-2.0
"""The sentencepiece tokenizer of ChatGLM 2 and 3, read from tokenizer.model as one of transformers' own.

Its control tokens are not in that file: they follow its pieces. `sop` and `eop` are named `<sop>` and `<eop>`
here, as in GLM-4, since the bare words occur in texts, and may be pieces too. Ids are the original ones.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.utils.hub import cached_file

from pyfast.errors import ConfigError, UnsupportedError
from pyfast.integrations.chatglm_model import ChatGLMConfig

_CONTROL = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
_PREFIX = ("[gMASK]", "<sop>")
_FILE = "tokenizer.model"
_HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)


class ChatGLMTokenizer:
    """What `AutoTokenizer` loads the original tokenizer with."""

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        """A `PreTrainedTokenizerFast` whose ids are the original's.

        Args:
            source: a model directory or name.
            args: ignored.
            kwargs: settings of the tokenizer, such as `padding_side`, and those of the hub.

        Raises:
            ConfigError: there is no tokenizer.model, or it is damaged.
            UnsupportedError: it is not one of sentencepiece.
        """
        from transformers import PreTrainedTokenizerFast

        make: Any = PreTrainedTokenizerFast
        hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
        file = cached_file(source, _FILE, _raise_exceptions_for_missing_entries=False, **hub)
        if file is None:
            raise ConfigError(
                f"'{source}' has no {_FILE}. Fix: the one of the original checkpoint."
            )
        settings = {
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "padding_side": "left",
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **_chat_template(source, hub),
        }
        given = {
            key: value
            for key, value in kwargs.items()
            if key not in (*_HUB_OPTIONS, "trust_remote_code") and not key.startswith("_")
        }
        return make(tokenizer_object=_build(Path(file)), **(settings | given))


def _chat_template(source: Any, hub: dict[str, Any]) -> dict[str, str]:
    """The template of tokenizer_config.json, if it has one, with the names of control tokens here."""
    missing = {"_raise_exceptions_for_missing_entries": False}
    file = cached_file(source, "tokenizer_config.json", **missing, **hub)
    if file is None:
        return {}
    try:
        template = json.loads(Path(file).read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"'{file}' cannot be read: {error}. Fix: get it again.") from error
    if not isinstance(template, str):
        return {}
    return {"chat_template": template.replace("[gMASK]sop", "".join(_PREFIX))}


def _build(file: Path) -> Any:
    """The pieces, then the control tokens; a text gets the prefix of every prompt."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    converters: Any = importlib.import_module("transformers.convert_slow_tokenizer")
    proto = converters.import_protobuf().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
        pieces = [piece.piece for piece in proto.pieces]
    except Exception:  # DecodeError of whichever protobuf there is
        pieces = []
    if not pieces:
        raise UnsupportedError(
            f"'{file}' is no sentencepiece model; GLM-4's is one of tiktoken. "
            "Fix: the tokenizer.model of ChatGLM 2 or 3, or a checkpoint in transformers' own layout (-hf)."
        )
    if proto.trainer_spec.model_type == 1:
        vocabulary: Any = [(piece.piece, piece.score) for piece in proto.pieces]
    else:
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
    clash = [token for token in _CONTROL if token in set(pieces)]
    if clash or len(set(pieces)) != len(pieces):
        what = f"holds {clash[0]} as a piece" if clash else "has a piece twice"
        raise ConfigError(f"'{file}' {what}. Fix: the one of the original checkpoint.")
    tokenizer = converters.SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in _CONTROL]
    )
    start = " ".join(_PREFIX)
    ends = ("</s>", *_PREFIX)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A",
        pair=f"{start} $A $B </s>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ends],
    )
    return tokenizer


AutoTokenizer.register(ChatGLMConfig, tokenizer_class=ChatGLMTokenizer)  # type: ignore[no-untyped-call]
