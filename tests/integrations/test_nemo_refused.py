# SPDX-License-Identifier: Apache-2.0
"""NeMo adapters: keys of other wrappers, some layers alone, and what is refused."""

import dataclasses

import pytest
import torch
import transformers

from pyfast.errors import AdapterMismatchError, ConfigError, UnsupportedError
from pyfast.integrations.nemo_lora import from_nemo, to_nemo
from tests.family_models import variant
from tests.integrations.test_nemo_lora import DIM, LAYER, QKV, nemo_adapter, peft_adapter, same
from tests.integrations.test_nemo_lora import pytestmark as pytestmark
from tests.models import llama


def test_wrappers_in_front_of_keys_and_states_without_parameters():
    model = llama()
    adapter = nemo_adapter(model, "llama")
    expected = from_nemo(adapter, model.config)[0]
    for start in ("module.", "model.module.", "model.language_model.encoder."):
        tensors = {start + k.removeprefix("decoder."): t for k, t in adapter.tensors.items()}
        tensors[start + "layers.0.self_attention.linear_qkv.adapter._extra_state"] = None
        wrapped = dataclasses.replace(adapter, tensors=tensors)
        same(from_nemo(wrapped, model.config)[0], expected)


def test_some_layers_alone():
    model = llama(layers=3)
    adapter = nemo_adapter(model, "llama")
    some = {k: t for k, t in adapter.tensors.items() if ".layers.1." not in k}
    fields = from_nemo(dataclasses.replace(adapter, tensors=some), model.config)[1]
    assert fields["layers_to_transform"] == [0, 2]
    del (
        some[f"{LAYER.format(2)}{QKV}linear_in.weight"],
        some[f"{LAYER.format(2)}{QKV}linear_out.weight"],
    )
    with pytest.raises(UnsupportedError, match="in some layers but none in layer 2"):
        from_nemo(dataclasses.replace(adapter, tensors=some), model.config)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda t: t.update({"decoder.layers.0.mlp.router.weight": torch.ones(1)}),
            "is no key of an",
        ),
        (lambda t: t.pop(LAYER.format(0) + QKV + "linear_in.weight"), "have shapes None and"),
        (
            lambda t: t.update({LAYER.format(0) + QKV + "linear_out.weight": torch.ones(3, DIM)}),
            r"\[4, in\] and \[128, 4\] are needed",
        ),
        (
            lambda t: t.update(
                {
                    LAYER.format(0) + QKV + f"adapter_q.linear_{side}.weight": torch.ones(shape)
                    for side, shape in (("in", (DIM, 64)), ("out", (64, DIM)))
                }
            ),
            "another adapter of query",
        ),
        (lambda t: t.clear(), "no tensor to convert"),
    ],
)
def test_tensors_that_are_not_this_models(change, text):
    model = llama()
    adapter = nemo_adapter(model, "llama")
    tensors = dict(adapter.tensors)
    change(tensors)
    with pytest.raises(AdapterMismatchError, match=text):
        from_nemo(dataclasses.replace(adapter, tensors=tensors), model.config)


@pytest.mark.parametrize(
    ("options", "more", "error", "text"),
    [
        ({}, {}, UnsupportedError, "query, key, value differ; stack them"),
        ({"use_rslora": True}, {}, UnsupportedError, "use_rslora=True has no counterpart"),
        (
            {"rank_pattern": {"q_proj": 2}},
            {},
            UnsupportedError,
            "rank_pattern=.* has no counterpart",
        ),
        ({"init_lora_weights": "pissa"}, {}, UnsupportedError, "a base that lost a part"),
        ({}, {"variant": "fused"}, ConfigError, "variant='fused'"),
        ({}, {"release": 3}, ConfigError, "release=3"),
    ],
)
def test_adapters_that_nemo_has_not(options, more, error, text):
    tensors, fields, config = peft_adapter(**options)
    with pytest.raises(error, match=text):
        to_nemo(tensors, fields, config, **more)


def test_models_and_configs_of_other_kinds():
    tensors, fields, config = peft_adapter()
    with pytest.raises(ConfigError, match="peft_type='IA3' must be 'LORA'"):
        to_nemo(tensors, fields | {"peft_type": "IA3"}, config)
    for name in ("t5", "bert"):
        other = transformers.AutoConfig.for_model(name)
        with pytest.raises(UnsupportedError, match=f"model_type '{name}' is none"):
            to_nemo(tensors, fields, other)
    with pytest.raises(AdapterMismatchError, match="is no key of an adapter"):
        to_nemo(tensors, fields, variant("gpt2").config)
