# SPDX-License-Identifier: Apache-2.0
"""What the report of `pyfast.accelerate` names: the first of each kind, and what comes first."""

import peft

import pyfast
from tests.models import llama


def test_the_report_of_our_own_layers_names_the_first():
    model = pyfast.apply(llama(), pyfast.LoraConfig(target_modules="all-linear"))
    report = pyfast.accelerate(model)
    paths = [path for path, _ in model.named_modules()]
    assert [row.path for row in report.rows] == sorted(
        (row.path for row in report.rows), key=paths.index
    )
    assert "LoraLinear: pyfast.lora_linear (first: model.layers.0.self_attn.o_proj)" in str(report)


def test_the_report_says_what_comes_first_where_there_is_no_adapter():
    hint = "there is no adapter yet: call PEFT's get_peft_model or pyfast.apply first"
    bare = pyfast.accelerate(llama())
    assert str(bare).startswith("pyfast serves 0 of 15 linear modules")
    assert hint in str(bare)
    served = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert hint not in str(pyfast.accelerate(served))
    config = peft.LoraConfig(target_modules=["q_proj"], lora_bias=True)
    left = peft.get_peft_model(llama(bias=True), config)
    assert not pyfast.accelerate(left).served
    assert hint not in str(pyfast.accelerate(left))
