# SPDX-License-Identifier: Apache-2.0
"""`pyfast.accelerate` on PEFT and bitsandbytes models: the same numbers, names and functions as before."""

import copy
import functools
import pickle

import accelerate
import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

import pyfast
from pyfast.ops._library import recorded_kernels
from pyfast.ops._serving import serving
from tests.models import gpt2, llama, logits, randomise, token_ids, train, twin

bnb = pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning"),
]


def lora(make=llama, **options):
    config = peft.LoraConfig(
        **{"target_modules": "all-linear", "fan_in_fan_out": make is gpt2, **options}
    )
    return randomise(get_peft_model(make(), config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    llama().save_pretrained(directory)
    return directory


def four_bit(directory, *, nested=True, **options):
    """The model with its linears as bitsandbytes makes them."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


def four_bit_lora(directory):
    model = peft.prepare_model_for_kbit_training(
        four_bit(directory), use_gradient_checkpointing=False
    )
    return randomise(get_peft_model(model, peft.LoraConfig(target_modules="all-linear")))


def assert_trains_alike(ours, theirs, served, steps=5):
    report = pyfast.accelerate(ours)
    assert len(report.served) == served
    ours.train(), theirs.train()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    grads, expected = [], []
    losses = train(ours, grads=grads, steps=steps, eps=1e-3)
    assert losses == pytest.approx(train(theirs, grads=expected, steps=steps, eps=1e-3), abs=1e-5)
    assert grads[0].keys() == expected[0].keys()
    for name, grad in expected[0].items():
        assert torch.allclose(grads[0][name], grad, atol=1e-5), name
    ours_after = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(ours_after[name], parameter, atol=1e-5), name


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), gpt2])
def test_dense_model(make):
    model = lora(make)
    assert_trains_alike(model, lora(make), served=8 if make is gpt2 else 14)


@pytest.mark.parametrize("options", [{"use_rslora": True, "rank_pattern": {"q_proj": 3}}, {"r": 1}])
def test_settings(options):
    assert_trains_alike(lora(**options), lora(**options), served=14, steps=2)


def test_our_op_runs_and_names_stay():
    model = lora()
    names, keys = [n for n, _ in model.named_parameters()], list(model.state_dict())
    parameters = list(model.parameters())
    modules = list(model.modules())
    with recorded_kernels() as kernels:
        logits(model)
    assert not kernels
    report = pyfast.accelerate(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(isinstance(m, peft.tuners.lora.Linear) for m in modules if hasattr(m, "lora_A"))
    with recorded_kernels() as kernels:
        logits(model)
    assert [op for op, _ in kernels] == ["lora_group", "lora_linear"] * 4
    layer = "base_model.model.model.layers.0"
    assert str(report) == (
        "pyfast serves 14 of 15 linear modules\n"
        "     6 x PEFT Linear: pyfast.lora_group of q_proj, k_proj, v_proj (first: "
        f"{layer}.self_attn.q_proj)\n"
        f"     4 x PEFT Linear: pyfast.lora_linear (first: {layer}.self_attn.o_proj)\n"
        "     4 x PEFT Linear: pyfast.lora_group of gate_proj, up_proj (first: "
        f"{layer}.mlp.gate_proj)\n"
        "     1 x Linear: left alone: a dense linear without adapter: torch serves it best (first: "
        "base_model.model.lm_head)\n"
        f"  pyfast.lora_group on cpu: {serving('lora_group', 'cpu')[0]}\n"
        f"  pyfast.lora_linear on cpu: {serving('lora_linear', 'cpu')[0]}"
    )
    assert str(pyfast.accelerate(model)) == str(report)


def test_pefts_functions_still_work(tmp_path):
    model, plain = lora(), lora()
    base = logits(llama())
    pyfast.accelerate(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    model.merge_adapter()
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(logits(again), logits(plain), atol=1e-6)
    for each in (model, plain):
        each.add_adapter("b", peft.LoraConfig(target_modules=["q_proj"], r=2))
        randomise(each)
        each.set_adapter("b")
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    for each in (model, plain):
        each.base_model.set_adapter(["default", "b"])  # two at once run by PEFT's own forward
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    for each in (model, plain):
        each.delete_adapter("b")
        each.set_adapter("default")
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    names = {"adapter_names": ["default", "__base__"]}
    ids = token_ids()
    model.eval(), plain.eval()
    with torch.no_grad():
        mixed, expected = model(ids, **names).logits, plain(ids, **names).logits
    assert torch.allclose(mixed, expected, atol=1e-6)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), logits(plain), atol=1e-5)
    assert not any(hasattr(m, "lora_A") for m in merged.modules())


def test_copies():
    model = lora()
    pyfast.accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        with recorded_kernels() as kernels:
            logits(other)
        assert kernels
        randomise(other, seed=4)
        assert not torch.equal(logits(other), logits(model))


def test_hooks_and_replaced_forwards():
    model, plain = lora(), lora()
    seen = []
    base = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    base.register_forward_hook(lambda *args: seen.append(1))
    replaced = model.base_model.model.model.layers[1].mlp.up_proj
    replaced.forward = functools.partial(type(replaced).forward, replaced)
    report = pyfast.accelerate(model)
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    assert seen
    (row,) = [row for row in report.left if row.path.endswith("layers.1.mlp.up_proj")]
    assert row.reason == "its forward was replaced, as hooks that move weights between devices do"


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("served_before", [False, True])
def test_layers_whose_hooks_were_removed_are_served(four_bits, served_before, saved):
    model = four_bit_lora(saved) if four_bits else lora()
    expected = logits(model.train())  # in which bitsandbytes leaves its weights as they are
    if served_before:
        pyfast.accelerate(model)
    for module in list(model.modules()):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    accelerate.hooks.remove_hook_from_submodules(model)
    base = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert "forward" in vars(base)  # left by accelerate, the class's own
    report = pyfast.accelerate(model)
    assert [row.path for row in report.left] == ["base_model.model.lm_head"]
    with recorded_kernels() as kernels:
        result = logits(model)
    assert [op for op, _ in kernels].count("lora_linear") == (14 if four_bits else 4)
    assert torch.allclose(result, expected, atol=1e-5)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def odd_dropout(layer):
    layer.lora_dropout["default"] = nn.AlphaDropout(0.5).eval()


def odd_factor(layer):
    layer.lora_A["default"].__class__ = Doubling


def hooked_factor(layer):
    layer.lora_B["default"].register_forward_hook(lambda module, args, out: 3 * out)


def hooked_dropout(layer):
    layer.lora_dropout["default"].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


ODD = {
    odd_dropout: "its lora_dropout is a AlphaDropout",
    odd_factor: "its lora_A is a Doubling",
    hooked_factor: "its lora_B has hooks or a replaced forward",
    hooked_dropout: "its lora_dropout has hooks or a replaced forward",
}


@pytest.mark.parametrize("change", ODD)
@pytest.mark.parametrize("late", [False, True])
def test_what_sits_on_pefts_inner_modules_is_kept(change, late):
    model, plain = lora(lora_dropout=0.1).eval(), lora(lora_dropout=0.1).eval()
    path = "base_model.model.model.layers.0.mlp.up_proj"
    change(plain.get_submodule(path))
    if late:
        pyfast.accelerate(model)
    change(model.get_submodule(path))
    (row,) = pyfast.accelerate(model).left[:-1]  # without the output layer
    assert (row.path, row.reason) == (path, ODD[change])
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    layer, x = model.get_submodule(path).train(), torch.randn(3, 64)
    torch.manual_seed(0)
    ours = layer(x)
    torch.manual_seed(0)
    assert torch.allclose(ours, plain.get_submodule(path).train()(x), atol=1e-6)


def test_dropout_trains_and_is_off_in_eval():
    model, plain = lora(lora_dropout=0.3).eval(), lora(lora_dropout=0.3).eval()
    pyfast.accelerate(model)
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    model.train()
    assert not torch.equal(logits(model), logits(model))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.linear = nn.Linear(8, 8)
        self.dora = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.dora(self.linear(x))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (
            {"target_modules": ["embedding", "conv", "linear"]},
            {
                "embedding": "its base layer Embedding is not a linear that pyfast knows",
                "conv": "its base layer Conv1d is not a linear that pyfast knows",
                "dora": "a dense linear without adapter: torch serves it best",
            },
        ),
        (
            {"target_modules": ["dora"], "use_dora": True},
            {"linear": "a dense linear without adapter: torch serves it best"},
        ),
        (
            {"target_modules": ["linear"], "lora_bias": True},
            {
                "linear": "it has a bias in lora_B",
                "dora": "a dense linear without adapter: torch serves it best",
            },
        ),
    ],
)
def test_what_is_left_alone_and_why(options, left):
    model = get_peft_model(Odd(), peft.LoraConfig(**options))
    ids = torch.randint(0, 10, (2, 5))
    randomise(model)
    expected = model(ids)
    report = pyfast.accelerate(model)
    assert {row.path.rpartition(".")[2]: row.reason for row in report.left} == left
    assert torch.allclose(model(ids), expected, atol=1e-6)


def test_4bit_with_peft(saved):
    ours, theirs = four_bit_lora(saved), four_bit_lora(saved)
    layers = [m for m in ours.modules() if isinstance(m, bnb.nn.Linear4bit)]
    before = [(m.weight.data_ptr(), m.weight.data.clone()) for m in layers]
    assert_trains_alike(ours, theirs, served=14)
    for layer, (pointer, data) in zip(layers, before, strict=True):
        assert layer.weight.data_ptr() == pointer
        assert torch.equal(layer.weight.data, data)
        assert isinstance(layer.weight, bnb.nn.Params4bit)
    ours.train()
    with recorded_kernels() as kernels:
        logits(ours)
    assert [op for op, _ in kernels].count("lora_linear") == 14
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with ours.disable_adapter(), theirs.disable_adapter():
        theirs.train()
        assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)


def test_plain_4bit_model(saved):
    ours, theirs = four_bit(saved), four_bit(saved)
    report = pyfast.accelerate(ours)
    assert {row.op for row in report.served} == {"nf4_linear"}
    assert len(report.served) == 14
    ours.train(), theirs.train()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    keys = list(theirs.state_dict())
    assert list(ours.state_dict()) == keys
    with recorded_kernels() as kernels:
        logits(ours.eval())
    assert kernels


def test_4bit_that_bitsandbytes_repacked(saved):
    model = four_bit(saved).eval()
    logits(model)  # on some CPUs this repacks the weights for inference
    expected = logits(model)
    report = pyfast.accelerate(model)
    assert all(row.op or "repacked" in row.reason for row in report.rows if "proj" in row.path)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.state_dict()
    assert len(pyfast.accelerate(model).served) == 14


def test_fp4_is_left_alone(saved):
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    report = pyfast.accelerate(model)
    assert not report.served
    assert "its quant_type is 'fp4'; only 'nf4' is served" in str(report)


def test_apply_to_a_bitsandbytes_model(saved, tmp_path):
    ours, theirs = four_bit(saved), four_bit_lora(saved)
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    randomise(pyfast.apply(ours, pyfast.LoraConfig(target_modules="all-linear")))
    assert all("base_layer.weight.absmax" not in n for n, _ in ours.named_parameters())
    losses = train(ours)
    assert losses == pytest.approx(train(theirs), abs=1e-4)
    ours.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(four_bit(saved), tmp_path)
    ours.train(), theirs.train()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    merged = pyfast.unload(pyfast.merge(twin(ours)))
    assert torch.allclose(logits(merged), logits(ours), atol=1e-4)


def test_our_own_models_are_reported():
    model = pyfast.quantize(llama())
    assert {row.op for row in pyfast.accelerate(model).served} == {"nf4_linear"}
    pyfast.apply(model, pyfast.LoraConfig())
    served = pyfast.accelerate(model).served
    assert sorted(row.op for row in served) == ["lora_linear"] * 4 + ["nf4_linear"] * 10
