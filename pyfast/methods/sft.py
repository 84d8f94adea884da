# SPDX-License-Identifier: Apache-2.0
"""SFT: full fine-tuning of all weights, or of all but the modules that are named frozen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pyfast.errors import AdapterStateError, TargetModuleError, UnsupportedError
from pyfast.methods.base import Method, Plan, adapted_modules, as_names, register_method
from pyfast.methods.targets import named
from pyfast.nn import DENSE_DTYPES, NF4Weight, weight_of


@dataclass
class SFTConfig:
    """Settings of full fine-tuning.

    Attributes:
        freeze_modules: a name or names that end a module's path; the parameters inside stay as they are.
    """

    freeze_modules: list[str] | str | None = None


class SFTMethod(Method):
    """Makes every floating-point parameter trainable."""

    name = "SFT"
    config_type = SFTConfig

    def plan(
        self,
        model: nn.Module,
        config: SFTConfig,
        adapter_name: str,
        *,
        allow_unmatched: bool,
        autocast_adapter_dtype: bool,
    ) -> Plan:
        """Check that the weights are dense and the names match; see `Method.plan`."""
        if adapted_modules(model):
            raise AdapterStateError(
                "SFT trains the whole model, but it carries adapters; merge or delete them first"
            )
        quantised = [
            path
            for path, module in model.named_modules()
            if isinstance(weight_of(module), NF4Weight)
            or any(p.dtype not in DENSE_DTYPES for p in module.parameters(recurse=False))
        ]
        if quantised:
            raise UnsupportedError(
                f"SFT cannot train quantised weights ({len(quantised)} layers, first {quantised[0]!r}); "
                "load the model dense, or use LoraConfig"
            )
        frozen: set[str] = set()
        chosen = () if config.freeze_modules is None else config.freeze_modules
        for name in as_names("freeze_modules", chosen):
            hit = [path for path, _ in model.named_modules() if path and named([name], path)]
            if not hit and not allow_unmatched:
                raise TargetModuleError(
                    f"freeze_modules: {name!r} matches no module of {type(model).__name__}. "
                    "Nothing was changed"
                )
            frozen.update(hit)

        def commit() -> None:
            for path, parameter in model.named_parameters():
                inside = any(path == p or path.startswith(f"{p}.") for p in frozen)
                parameter.requires_grad_(parameter.is_floating_point() and not inside)

        return Plan({}, commit)


register_method(SFTMethod())
