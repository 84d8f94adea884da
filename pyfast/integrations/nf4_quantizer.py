# SPDX-License-Identifier: Apache-2.0
"""The quantizer that transformers calls from `from_pretrained`: layers become NF4 as they are read.

No layer is replaced before its weight comes: a dense checkpoint's is quantised and freed at once, and in a
4-bit checkpoint the file itself says which layers are in NF4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyfast.errors import ConfigError, QuantStateError, UnsupportedError
from pyfast.integrations.bitsandbytes import METHOD
from pyfast.integrations.nf4_reading import (
    Read,
    ReadExperts,
    converters,
    for_saving,
    reading_experts,
)
from pyfast.methods.base import adopt, as_names, replace_modules
from pyfast.methods.quantize import check_finite, choose, nf4_linear_of
from pyfast.methods.targets import named
from pyfast.nn import NF4Linear, NF4Tensor, NF4Weight
from pyfast.nn.adapter_layer import dense_layer
from pyfast.nn.experts import expert_tensors, make_dense, put_experts, quantize_experts
from pyfast.nn.nf4 import STORAGES, guard_states
from pyfast.ops._check import BLOCKSIZES

_BYTES = 0.52  # a weight's, nested scales included


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """`from_pretrained(..., quantization_config=NF4Config())`: a dense checkpoint becomes NF4 layer by layer,
    with the bytes that `pyfast.quantize` makes of the whole model.

    A 4-bit checkpoint that names bitsandbytes as its quantiser is read, without bitsandbytes and without a
    byte changed, by `from_pretrained(directory, config=NF4Config.model_config(directory))`.

    Args:
        blocksize: elements that share a scale.
        nested: 8-bit scales ("double quantisation").
        skip_modules: names that end a module's path, or that of an expert tensor, left dense.
        bitsandbytes: the `quantization_config` of the checkpoint that was read, which a saved one has again.

    Raises:
        ConfigError: a value that the format does not have.
    """

    def __init__(
        self,
        blocksize: int = 64,
        nested: bool = True,
        skip_modules: Iterable[str] | None = None,
        bitsandbytes: dict[str, Any] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown or quant_method != METHOD:
            wrong = next(iter(unknown), "quant_method")
            raise ConfigError(f"NF4Config: {wrong!r} is no setting of {METHOD}; leave it out")
        if type(blocksize) is not int or blocksize not in BLOCKSIZES:
            raise ConfigError(f"NF4Config: blocksize={blocksize!r} must be one of {BLOCKSIZES}")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.blocksize = blocksize
        self.nested = bool(nested)
        self.skip_modules = as_names("NF4Config: skip_modules", skip_modules or ())
        self.bitsandbytes = bitsandbytes

    @classmethod
    def model_config(cls, source: str, **options: Any) -> Any:
        """The config of a 4-bit model by which transformers reads it through this quantizer.

        Args:
            source: a model directory, or a name on the hub.
            options: for `AutoConfig.from_pretrained`.

        Raises:
            UnsupportedError: it is quantised in another form, or not at all.
        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source, **options)
        given: Any = getattr(config, "quantization_config", None) or {}
        values: dict[str, Any] = given.to_dict() if hasattr(given, "to_dict") else dict(given)
        if values.get("quant_method") == METHOD:
            return config
        if not values.get("load_in_4bit") or values.get("bnb_4bit_quant_type") != "nf4":
            kind = f"quantised by {values.get('quant_method')}" if values else "not quantised"
            raise UnsupportedError(
                f"'{source}' is {kind}; only bitsandbytes' NF4 form is read so. A dense model becomes NF4 by "
                "from_pretrained(..., quantization_config=NF4Config())"
            )
        config.quantization_config = cls(bitsandbytes=values).to_dict()
        return config


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """See `NF4Config`."""

    quantization_config: NF4Config

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._names: set[str] = set()
        # transformers empties buffers that are no part of the state dict when all weights are there.
        self._made: list[tuple[NF4Tensor, NF4Weight]] = []
        self._error: Exception | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse weights that are moved to another device for each forward."""
        places = kwargs.get("device_map")
        values = {str(v) for v in places.values()} if isinstance(places, dict) else {str(places)}
        if values & {"disk", "meta"} or ("cpu" in values and len(values) > 1):
            raise UnsupportedError(
                "NF4 layers cannot be offloaded, but the device_map puts parts on the CPU, the disk or the "
                'meta device; choose a device that holds the model (device_map={"": 0}), or more of them'
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        _refuse_sharding(model.config)
        config = self.quantization_config
        skipped = None if self.pre_quantized else config.skip_modules
        linears, experts = choose(model, config.blocksize, skipped)
        self._names = {f"{path}.weight" for path in linears} | set(experts)
        given = config.bitsandbytes or {}
        storage = STORAGES.get(str(given.get("bnb_4bit_quant_storage")), torch.uint8)
        if (
            self.pre_quantized
            and storage != torch.uint8
            and not hasattr(HfQuantizer, "get_new_dtype")
        ):
            # Releases without that method cast packed bytes to the dtype of the parameter they are for.
            dense = as_names("llm_int8_skip_modules", given.get("llm_int8_skip_modules") or ())
            for path, module in linears.items():
                if not named(dense, path):
                    module.weight.data = module.weight.data.to(storage)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a dense parameter of a checkpoint is to become NF4."""
        return not self.pre_quantized and param_name in self._names

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes, for device maps."""
        return _BYTES if param_name in self._names else param.element_size()

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        """How the tensors of a 4-bit checkpoint come together."""
        return converters(self) if self.pre_quantized else []

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """The model's own, which stack experts that are stored one by one in NF4 too, and ours."""
        if self.pre_quantized:
            weight_conversions = reading_experts(self, weight_conversions)
        base: Any = super()
        made: list[Any] = base.update_weight_conversions(weight_conversions, *model)
        return made

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """None for what ours get, which cast what turns out to be dense."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, (Read, ReadExperts)):
                operation.dtype = dtype
                return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        error, self._error = self._error, None
        if error is not None:
            raise error
        if not self._made:
            raise QuantStateError(
                f"the checkpoint of {type(model).__name__} says that it is quantised by {METHOD}, but holds "
                "no NF4 weight; if it is dense, take quantization_config out of its config.json"
            )
        for module, weight in self._made:
            module.adopt(weight)
            bias = module._parameters.get("bias")
            if bias is not None and not hasattr(bias, "_is_hf_initialized"):
                bias.detach().zero_()  # the checkpoint has none
        self._made.clear()
        model._weight_conversions = for_saving(getattr(model, "_weight_conversions", None) or ())
        guard_states(model)
        adopt(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """What `model.dequantize()` does: every NF4 weight becomes a dense one of the same values."""

        def dense(module: nn.Module) -> nn.Module | None:
            if not isinstance(module, NF4Linear):
                return None
            return dense_layer(module, module.dense(), module.bias).train(module.training)

        replace_modules(model, dense)
        for module in list(model.modules()):
            make_dense(module)
        if isinstance(dtype, str):  # in the config, once the model was saved
            dtype = getattr(torch, dtype)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters, which a model of ours tells Trainer of; without any, Trainer refuses it."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def attempt(self, name: str, missing: set[str], make: Callable[[], None]) -> dict[str, Tensor]:
        """Fill one parameter's place; the first error is kept, since transformers would hide it in a report,
        and nothing more is read after it."""
        missing.discard(name)
        try:
            if self._error is None:
                make()
        except Exception as error:
            self._error = error
        return {}

    def put_linear(self, model: nn.Module, old: nn.Module, layer: NF4Linear) -> None:
        """Put an NF4 layer in the place of a dense one, under all of its names."""
        layer.bias = old.bias  # type: ignore[assignment]  # which transformers has marked as loaded, or will
        layer.train(old.training)
        self._keep(layer)
        replace_modules(model, {old: layer}.get)

    def put_experts(self, module: nn.Module, name: str, tensor: NF4Tensor) -> None:
        """Put an NF4 tensor in the place of a dense one of experts."""
        self._keep(tensor)
        put_experts(module, name, tensor)
        module._is_hf_initialized = True  # type: ignore[assignment]

    def _keep(self, module: NF4Tensor) -> None:
        self._made.append((module, module.nf4_weight()))
        module.weight._is_hf_initialized = True  # type: ignore[attr-defined]


class _Quantize:
    """What transformers calls with a dense tensor that is to become NF4."""

    def __init__(self, quantizer: NF4Quantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, tensors: dict[str, Any], *, full_layer_name: str, model: nn.Module, **kwargs: Any
    ) -> dict[str, Any]:
        """Nothing for transformers to set: the NF4 layer is put in its place."""
        ((_, tensor),) = tensors.items()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        quantizer, config = self.quantizer, self.quantizer.quantization_config
        path, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        options: dict[str, Any] = {"blocksize": config.blocksize, "nested": config.nested}
        if isinstance(module, NF4Tensor):  # another name of one that is done
            return quantizer.attempt(full_layer_name, kwargs["missing_keys"], lambda: None)

        def make() -> None:
            expected: Any = module._parameters[name]
            if expected.shape != tensor.shape:
                raise ConfigError(
                    f"{full_layer_name} has shape {list(tensor.shape)} in the checkpoint, and "
                    f"{list(expected.shape)} by its config.json; load it with the config it was saved with"
                )
            check_finite(full_layer_name, tensor)
            if name in expert_tensors(module):
                quantizer.put_experts(module, name, quantize_experts(tensor, **options))
                return
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            quantizer.put_linear(model, module, nf4_linear_of(path, module, **options))

        return quantizer.attempt(full_layer_name, kwargs["missing_keys"], make)


def _refuse_sharding(config: Any) -> None:
    """transformers shards parameters over processes before it reads them."""
    sizes = getattr(getattr(config, "distributed_config", None), "__dict__", {})
    several = [f"{k}={n}" for k, n in sizes.items() if k.endswith("_size") and n not in (None, 1)]
    if several:
        raise UnsupportedError(
            "NF4 weights cannot be sharded over processes, but the distributed_config has "
            f"{', '.join(several)}; load the model whole in each process, without it and without tp_plan"
        )
