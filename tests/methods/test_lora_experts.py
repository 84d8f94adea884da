# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts in use: what it computes and keeps, training, errors."""

import accelerate
import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyfast
from pyfast import LoraConfig
from pyfast.errors import AdapterStateError, NonFiniteError, TargetModuleError, UnsupportedError
from pyfast.ops import recorded_kernels
from tests.family_models import outputs, variant
from tests.integrations.test_peft_experts import BOTH, CASES, OPTIONS, experts, other_family, pair
from tests.integrations.test_peft_experts import pytestmark as pytestmark
from tests.models import fingerprint, llama, logits, randomise, resumed_in_trainer, train


def test_the_role_of_the_family_and_its_filters():
    """ "experts" among the modules means both parameters, with what narrows modules down."""
    for targets in (["q_proj", "experts"], r".*\.(q_proj|experts)"):
        ours = pyfast.apply(variant("mixtral"), LoraConfig(target_modules=targets, r=2))
        twin = LoraConfig(target_modules=["q_proj"], target_parameters=BOTH, r=2)
        assert set(pyfast.adapter_parameters(ours)) == set(
            pyfast.adapter_parameters(pyfast.apply(variant("mixtral"), twin))
        )
    keys = [
        set(
            pyfast.adapter_parameters(
                pyfast.apply(variant("mixtral"), LoraConfig(target_modules=names))
            )
        )
        for names in ("experts", ["experts"])
    ]
    assert keys[0] == keys[1]
    assert len(keys[0]) == 8
    with pytest.raises(TargetModuleError, match="'experts' matches no module of LlamaForCausalLM"):
        pyfast.apply(llama(), LoraConfig(target_modules="experts"))
    config = LoraConfig(target_modules=["experts"], layers_to_transform=[1], r=2)
    ours = pyfast.apply(variant("mixtral"), config)
    assert all(key.startswith("model.layers.1.mlp") for key in pyfast.adapter_parameters(ours))
    assert len(pyfast.adapter_parameters(ours)) == 4


def test_a_merge_that_fails_changes_nothing():
    ours, _ = pair()
    with torch.no_grad():
        for factor in (experts(ours, 1).lora_A, experts(ours, 1).lora_B):
            factor["default"].weight.fill_(1e30)
    before = fingerprint(ours)
    with pytest.raises(NonFiniteError, match="would leave"):
        pyfast.merge(ours)
    assert fingerprint(ours) == before


def test_no_expert_is_made_dense_or_summed_with_its_update():
    """The largest tensor that a forward and backward make or keep has no expert's width and height."""
    ours, _ = pair()
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                made.append(tuple(out.shape))
            return out

    layer = experts(ours)
    x = torch.randn(5, 64, requires_grad=True)
    with Watch():
        layer(x, torch.tensor([[0, 3]] * 5), torch.full((5, 2), 0.5)).sum().backward()
    assert made
    assert not {(192, 64), (64, 96), (4, 192, 64), (4, 64, 96)}.intersection(made)


def test_only_experts_that_tokens_go_to_are_read():
    ours = pyfast.apply(pyfast.quantize(variant("mixtral")), LoraConfig(**OPTIONS | CASES["both"]))
    x, chosen = torch.randn(6, 64), torch.tensor([[1, 2]] * 6)
    with torch.no_grad(), recorded_kernels() as kernels:
        experts(ours)(x, chosen, torch.full((6, 2), 0.5))
    assert len([op for op, _ in kernels if op == "lora_linear"]) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    losses = []
    for checkpointed in (False, True):
        ours, _ = pair("with attention")
        if checkpointed:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses.append(train(ours))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("prepare", [lambda model: model, pyfast.quantize])
def test_trainer_saves_and_resumes(prepare, tmp_path):
    config = LoraConfig(**OPTIONS | CASES["with attention"])
    whole, resumed, losses = resumed_in_trainer(
        lambda: pyfast.apply(prepare(variant("mixtral")), config), tmp_path
    )
    assert losses[-1] < losses[0]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_report():
    ours, _ = pair()
    report = str(pyfast.accelerate(ours))
    assert "2 x LoraExperts: pyfast.lora_linear (first: model.layers." in report


REFUSED = {
    "dropout": ({"lora_dropout": 0.1}, "does not serve lora_dropout=0.1"),
    "DoRA": ({"use_dora": True}, "does not serve use_dora=True"),
    "a linear's": (
        {"target_parameters": ["q_proj.weight"]},
        r"target_parameters=\['q_proj.weight'\]: 'q_proj.weight' names no 3-D parameter",
    ),
    "the router's": ({"target_parameters": ["gate.weight"]}, "'gate.weight' names no 3-D"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, text = REFUSED[name]
    model = variant("mixtral")
    before = fingerprint(model)
    for kind in (LoraConfig, peft.LoraConfig):
        config = kind(**OPTIONS | CASES["both"] | options)
        with pytest.raises(UnsupportedError, match=text):
            pyfast.apply(model, config)
        assert fingerprint(model) == before


def test_beside_ia3_on_the_same_experts():
    lora, scaling = LoraConfig(**OPTIONS | CASES["both"]), pyfast.IA3Config()
    for first, second in ((lora, scaling), (scaling, lora)):
        model = pyfast.apply(variant("mixtral"), first)
        before = fingerprint(model)
        with pytest.raises(UnsupportedError, match="experts"):
            pyfast.apply(model, second, adapter_name="b")
        assert fingerprint(model) == before


def test_hooks_inside_are_not_passed_over():
    ours, _ = pair()
    experts(ours).base_layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="hooks on the MixtralExperts inside of adapters"):
        outputs(ours)
    with pyfast.adapters_disabled(ours):
        assert torch.equal(outputs(ours), outputs(variant("mixtral")))


def test_offloading():
    config = LoraConfig(**OPTIONS | CASES["both"])
    placed = variant("mixtral")
    accelerate.dispatch_model(placed, {"": "cpu"}, force_hooks=True)
    ours, _ = pair()
    assert torch.equal(logits(randomise(pyfast.apply(placed, config))), logits(ours))
    accelerate.cpu_offload(ours, torch.device("cpu"))
    with pytest.raises(AdapterStateError, match="gate_up_proj' of adapted MixtralExperts lies on"):
        logits(ours)
    bare = variant("mixtral")
    accelerate.cpu_offload(bare, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj' lies on the meta device"):
        pyfast.apply(bare, config)


def test_a_family_without_a_table_keeps_its_roles():
    model = other_family("qwen3_moe")
    pyfast.apply(model, LoraConfig(**OPTIONS | CASES["with attention"]))
    pyfast.apply(model, LoraConfig(r=2), adapter_name="b")
    assert len(pyfast.adapter_parameters(model, "b")) == 8


def test_beside_all_linear_and_modules_trained_whole():
    config = LoraConfig(target_modules="all-linear", target_parameters=BOTH)
    model = pyfast.apply(variant("mixtral"), config)
    assert len(pyfast.adapter_parameters(model)) == 2 * 2 * (4 + 2)
    options = {"target_parameters": BOTH, "modules_to_save": ["0.mlp"]}
    model = pyfast.apply(variant("mixtral"), LoraConfig(**options))
    adapted = {key for key in pyfast.adapter_parameters(model) if "lora_" in key}
    assert len(adapted) == 4
    assert all(key.startswith("model.layers.1.") for key in adapted)
    with pytest.raises(TargetModuleError, match="matches nothing outside of modules_to_save"):
        pyfast.apply(variant("mixtral"), LoraConfig(**options | {"modules_to_save": ["mlp"]}))


def test_autocast():
    ours, theirs = pair("with attention")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(outputs(ours), outputs(theirs), atol=5e-2)
