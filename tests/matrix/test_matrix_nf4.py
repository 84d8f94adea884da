# SPDX-License-Identifier: Apache-2.0
"""QLoRA's bytes are bitsandbytes', in every family; and it trains what bitsandbytes itself quantised."""

import json

import bitsandbytes
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import pyfast
from tests.family_models import VARIANTS, variant
from tests.matrix.cells import MARKS, assert_falls, close, copied, shaken, train, trained
from tests.matrix.methods import METHODS
from tests.matrix.places import matrix_of
from tests.matrix.references import in_four_bits, quantised

pytestmark = MARKS
QLORA = METHODS["QLoRA"]
STATE = "quant_state.bitsandbytes__nf4"
# The layers of all others are linears that transformers has bitsandbytes quantise.
READABLE = [name for name, values in VARIANTS.items() if values["model_type"] != "falcon"]


@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_are_those_of_bitsandbytes(name):
    model = variant(name)
    shapes = {path: list(parameter.shape) for path, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, Conv1D):
            shapes[f"{path}.weight"] = list(matrix_of(module).shape)
    expected = quantised(model)
    found = pyfast.quantize(model).state_dict()
    made = 0
    for key, (packed, state) in expected.items():
        path, _, last = key.rpartition(".")
        ours = key if last == "weight" else f"{path}.nf4_{last}.weight"
        assert torch.equal(found[ours], packed), key
        parts = state.as_dict(packed=True)
        facts, theirs = (json.loads(bytes(d)) for d in (found[f"{ours}.{STATE}"], parts.pop(STATE)))
        assert facts == theirs | {"shape": shapes[key]}
        assert all(torch.equal(found[f"{ours}.{part}"], value) for part, value in parts.items())
        made += 1
    assert made == sum(key.endswith(STATE) for key in found)


@pytest.mark.parametrize("name", READABLE)
def test_what_bitsandbytes_quantised_trains_as_the_oracle(name, tmp_path):
    """Mixtral's experts stay dense there."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    dense = variant(name)
    dense.save_pretrained(tmp_path)
    held = type(dense).from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    expected = quantised(dense)
    read = {
        f"{path}.weight"
        for path, module in held.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert read == {key for key in expected if ".experts." not in key}
    ours = shaken(pyfast.apply(held, QLORA.config()))
    theirs = QLORA.oracle(in_four_bits(dense, read))
    copied(trained(ours), trained(theirs, QLORA.renamed))
    got, wanted = train(ours), train(theirs, QLORA.renamed)
    close(got.logits, wanted.logits)
    close(got.losses, wanted.losses)
    assert_falls(got.losses)
