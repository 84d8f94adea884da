# SPDX-License-Identifier: Apache-2.0
"""IA3, P-tuning and bottleneck adapters on bitsandbytes' 4-bit layers: trained, reported, merged, saved."""

import pytest
import torch

import pyfast
from pyfast import BottleneckConfig, IA3Config, PromptEncoderConfig
from pyfast.errors import QuantizedMergeError
from pyfast.nn import NF4Linear
from tests.integrations.test_accelerate import four_bit
from tests.methods.test_ia3 import scatter
from tests.models import llama, logits, token_ids, train

bnb = pytest.importorskip("bitsandbytes")
CONFIGS = {
    "IA3": (IA3Config(), "adapter_scale"),
    "P-tuning": (PromptEncoderConfig(num_virtual_tokens=4), ""),
    "Adapters": (BottleneckConfig(bottleneck_size=4), "adapter_bottleneck"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(directory)
    return directory


def dense(model):
    """A dense model of the values that 4-bit layers have."""
    made = llama()
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            made.get_submodule(path).weight.data.copy_(values)
    return made


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("method", CONFIGS)
def test_trains_as_the_dense_values_do(method, nested, saved, tmp_path):
    config, op = CONFIGS[method]
    base = four_bit(saved, nested=nested)
    reference = dense(base)
    torch.manual_seed(3)
    ours = pyfast.apply(base, config)
    torch.manual_seed(3)
    theirs = pyfast.apply(reference, config)
    assert train(ours, eps=1e-3) == pytest.approx(train(theirs, eps=1e-3), abs=1e-4)
    report = pyfast.accelerate(ours)
    assert {row.op for row in report.served} == {"nf4_linear", op} - {""}
    assert not any("prompt_encoder" in row.path for row in report.rows)
    pyfast.save_adapter(ours, tmp_path)
    again = pyfast.load_adapter(four_bit(saved, nested=nested), tmp_path)
    pyfast.accelerate(again)  # bitsandbytes' own kernel for the CPU rounds to half precision
    torch.testing.assert_close(logits(again), logits(ours), atol=1e-4, rtol=1e-4)
    ids = token_ids()
    assert ours.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


def test_ia3_merges_into_flat_scales_of_bitsandbytes(saved):
    config = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    model = scatter(pyfast.apply(four_bit(saved, nested=False), config))
    pyfast.accelerate(model)  # before bitsandbytes packs its weights anew for the CPU
    expected = logits(model)
    before = model.model.layers[0].self_attn.v_proj.base_layer
    pyfast.merge(model)
    merged = model.model.layers[0].self_attn.v_proj.base_layer
    assert isinstance(merged, NF4Linear)
    assert torch.equal(merged.weight.flatten(), before.weight.flatten())
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    pyfast.unmerge(model)
    assert model.model.layers[0].self_attn.v_proj.base_layer is before
    nested = scatter(pyfast.apply(four_bit(saved, nested=True), config))
    with pytest.raises(QuantizedMergeError, match="in 8 bits themselves"):
        pyfast.merge(nested)
