# SPDX-License-Identifier: Apache-2.0
"""`pyfast convert` for LoRA adapters in NeMo's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pyfast.integrations.adapter_file import read_fields, write_adapter
from pyfast.integrations.nemo_file import write_nemo
from pyfast.integrations.nemo_lora import NemoLora, from_nemo, to_nemo
from pyfast.train.metrics import say
from pyfast.train.pretrained import telling_what_cannot_be_read


def write_as_peft(adapter: NemoLora, directory: Path, base: str, stack: bool) -> None:
    """Write NeMo's adapter in PEFT's form."""
    tensors, fields = from_nemo(adapter, _config(base), stack=stack)
    fields["base_model_name_or_path"] = base
    write_adapter(directory, tensors, fields, {}, None, {})
    say(f"Rank {fields['r']}, alpha {fields['lora_alpha']}.")


def write_as_nemo(
    config: Path,
    tensors: dict[str, Tensor],
    directory: Path,
    base: str,
    variant: str,
    release: int,
    stack: bool,
) -> None:
    """Write PEFT's adapter, whose config is in a file, in NeMo's form."""
    fields = read_fields(config)
    made = to_nemo(tensors, fields, _config(base), variant=variant, release=release, stack=stack)
    write_nemo(directory, made)
    say(f"dim {made.dim}, alpha {made.alpha}.")


def _config(base: str) -> Any:
    """The transformers config of a base model."""
    from transformers import AutoConfig

    with telling_what_cannot_be_read(base):
        return AutoConfig.from_pretrained(base)
