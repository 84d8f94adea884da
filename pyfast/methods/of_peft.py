# SPDX-License-Identifier: Apache-2.0
"""Models whose adapters are PEFT's: what serves pyfast's own there names PEFT's way. PEFT is not imported."""

from __future__ import annotations

from torch import nn

from pyfast.errors import AdapterStateError
from pyfast.methods.base import adapted_modules, unwrapped

_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"
_MODEL = "peft.peft_model.PeftModel"
_READ = "peft.get_peft_model_state_dict(model)"
_THEIRS = {
    "adapter_parameters": _READ,
    "adapter_state_dict": _READ,
    "adapters_disabled": "with model.disable_adapter():",
    "adapters_per_sample": "model(..., adapter_names=[...])",
    "delete_adapter": "model.delete_adapter(name)",
    "merge": "model.merge_adapter()",
    "save_adapter": "model.save_pretrained(directory)",
    "set_adapter": "model.set_adapter(name)",
    "unload": "model.unload(), or model.merge_and_unload()",
    "unmerge": "model.unmerge_adapter()",
}
"""Function of pyfast: what does for a PeftModel what it does for pyfast's own adapters."""


def is_peft_layer(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers with adapters."""
    return _is(module, _LAYER)


def _is(module: nn.Module, name: str) -> bool:
    return any(f"{c.__module__}.{c.__qualname__}" == name for c in type(module).__mro__)


def refuse_peft(model: nn.Module, what: str) -> None:
    """Raise AdapterStateError, for one of pyfast's functions, where all of a model's adapters are PEFT's."""
    if adapted_modules(model):
        return
    if any(is_peft_layer(m) or _is(m, _MODEL) for m in unwrapped(model).modules()):
        raise AdapterStateError(
            f"{what}: the adapters of {type(model).__name__} are PEFT's, not pyfast's; a PeftModel has "
            f"for that: {_THEIRS[what]}. Nothing was changed"
        )
