# SPDX-License-Identifier: Apache-2.0
"""PiSSA against PEFT: initial values, residuals, training, files; and what is refused."""

import json

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import pyfast
from pyfast import IA3Config, LoraConfig
from pyfast.errors import AdapterStateError, ConfigError, NonFiniteError, UnsupportedError
from tests.models import fingerprint, gpt2, llama, logits, plain, randomise, train, twin

# PEFT looks for the base model's config.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Could not find a config file:UserWarning",
)

OPTIONS = {"r": 6, "lora_alpha": 9, "target_modules": "all-linear", "init_lora_weights": "pissa"}
RSLORA = {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 2}}


def both(make, **changes):
    """Ours and PEFT's on equal bases."""
    options = OPTIONS | changes
    ours = pyfast.apply(make(), LoraConfig(**options))
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**options, fan_in_fan_out=make is gpt2))
    return ours, theirs


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True, bias=True), gpt2])
def test_factors_and_residuals_are_pefts(make):
    ours, theirs = both(make)
    expected = {plain(name): tensor for name, tensor in theirs.state_dict().items()}
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous()
    torch.testing.assert_close(logits(ours), logits(make()), rtol=1e-4, atol=1e-5)
    base = dict(make().named_parameters())
    changed = [n for n in found if ".base_layer.weight" in n]
    assert changed
    assert not any(torch.equal(found[n], base[n.replace(".base_layer", "")]) for n in changed)


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning")
def test_scales_and_ranks_of_their_own():
    ours, theirs = both(llama, **RSLORA)
    expected = {plain(name): tensor for name, tensor in theirs.state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_dora_beside_it():
    ours, theirs = both(llama, use_dora=True)
    expected = {plain(name): tensor for name, tensor in theirs.state_dict().items()}
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(ours), logits(llama()), rtol=1e-4, atol=1e-5)


def decaying():
    """A linear whose singular values fall by a quarter each."""
    model = nn.Sequential(nn.Linear(40, 24))
    with torch.no_grad():
        u, _, vh = torch.linalg.svd(model[0].weight, full_matrices=False)
        model[0].weight.copy_((u * 0.75 ** torch.arange(24)) @ vh)
    return model


def test_iterations_find_the_principal_part():
    """Drawn apart from PEFT's, so that products are compared, which converge."""
    base = decaying()
    options = OPTIONS | {"target_modules": ["0"]}
    drawn = options | {"init_lora_weights": "pissa_niter_32"}
    exact = pyfast.apply(twin(base), LoraConfig(**options))[0].delta("default")
    ours = pyfast.apply(twin(base), LoraConfig(**drawn))[0]
    theirs = peft.get_peft_model(twin(base), peft.LoraConfig(**drawn)).base_model.model[0]
    for product in (exact, theirs.get_delta_weight("default")):
        torch.testing.assert_close(ours.delta("default"), product, rtol=1e-3, atol=1e-5)
    x = torch.randn(3, 40)
    torch.testing.assert_close(ours(x), base(x), rtol=1e-4, atol=1e-5)


def test_half_precision_starts_nearer_to_the_base_than_pefts():
    ours, theirs = both(lambda: llama().bfloat16())
    base = llama().bfloat16()
    errors = []
    for model in (ours, theirs.base_model.model):
        total = 0.0
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A") and hasattr(layer, "scaling"):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                assert a.dtype == torch.float32
                whole = layer.base_layer.weight.double() + layer.scaling["default"] * (
                    b.double() @ a.double()
                )
                error = whole - base.get_submodule(name).weight.double()
                total += error.detach().square().sum().item()
        errors.append(total)
    assert errors[0] <= errors[1]


def test_trains_like_peft_and_merges():
    ours, theirs = both(llama)
    assert train(ours, steps=5) == pytest.approx(train(theirs, steps=5), abs=1e-5)
    expected = logits(theirs)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    expected = logits(ours)
    residual = ours.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    torch.testing.assert_close(logits(pyfast.merge(ours)), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(
        pyfast.unmerge(ours).model.layers[0].self_attn.q_proj.base_layer.weight, residual
    )
    merged = pyfast.unload(pyfast.merge(ours))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2"])
def test_files_both_ways(init, tmp_path):
    """What PEFT draws when it loads is another residual, so that its outputs tell only for "pissa"."""
    ours, theirs = both(llama, init_lora_weights=init)
    for model in (ours, theirs):
        train(model, steps=2)
    pyfast.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    fields = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("ours", "theirs")
    ]
    assert fields[0]["init_lora_weights"] == fields[1]["init_lora_weights"] == init
    back = pyfast.load_adapter(llama(), tmp_path / "ours")
    assert torch.equal(logits(back), logits(ours))
    if init == "pissa":
        read = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
        torch.testing.assert_close(logits(read), logits(ours), rtol=1e-5, atol=1e-6)
        read = pyfast.load_adapter(llama(), tmp_path / "theirs")
        torch.testing.assert_close(logits(read), logits(theirs), rtol=1e-5, atol=1e-6)


def test_drawing_leaves_the_generators_alone():
    following = []
    for init in (True, "pissa_niter_2"):
        model = llama()
        pyfast.apply(model, LoraConfig(**OPTIONS | {"init_lora_weights": init}))
        following.append(torch.rand(3))
    assert torch.equal(*following)


def shared():
    """Two modules of one weight that are both named."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    return model


def pruned():
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    prune.l1_unstructured(model["a"], "weight", 0.5)
    return model


def broken():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "changes", "error", "text"),
    [
        (
            lambda: pyfast.quantize(llama()),
            {},
            UnsupportedError,
            "in NF4, whose rounding would undo",
        ),
        (shared, {"target_modules": ["a"]}, UnsupportedError, "shared with another module"),
        (
            lambda: llama(tied=True),
            {"target_modules": ["lm_head"]},
            UnsupportedError,
            "shared with",
        ),
        (pruned, {"target_modules": ["a"]}, UnsupportedError, "made anew before each forward"),
        (llama, {"target_modules": ["embed_tokens"]}, UnsupportedError, "not serve embeddings"),
        (llama, {"r": 65}, ConfigError, "64 singular values, but rank 65"),
        (llama, {"lora_alpha": -1}, ConfigError, "lora_alpha positive"),
        (llama, {"init_lora_weights": "pissa_niter_257"}, ConfigError, "more than 256 iterations"),
        (llama, {"init_lora_weights": "pissa_niter_" + "9" * 5000}, ConfigError, "more than 256"),
        (llama, {"init_lora_weights": "pissa_niter_"}, UnsupportedError, "is not served"),
        (broken, {}, NonFiniteError, r"layers\.1\.mlp\.up_proj\.weight holds NaN"),
        (
            lambda: pyfast.apply(llama(), LoraConfig(), adapter_name="a"),
            {},
            AdapterStateError,
            r"its adapters \['a'\] were made",
        ),
    ],
)
def test_refusals_change_nothing(make, changes, error, text):
    model = make()
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        pyfast.apply(model, LoraConfig(**OPTIONS | changes))
    assert fingerprint(model) == before


@pytest.mark.parametrize("call", [1, 2, 8])
def test_apply_that_is_interrupted_restores_the_weights(call, monkeypatch):
    model = llama()
    before, original, calls = fingerprint(model), torch.linalg.svd, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", failing)
        with pytest.raises(KeyboardInterrupt):
            pyfast.apply(model, LoraConfig(**OPTIONS))
    assert fingerprint(model) == before


def test_file_that_cannot_be_filled_in_restores_the_weights(tmp_path, monkeypatch):
    pyfast.save_adapter(pyfast.apply(llama(), LoraConfig(**OPTIONS)), tmp_path)
    model = llama()
    before = fingerprint(model)

    def failing(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr("pyfast.methods.lora.LoraMethod.fill", failing)
        with pytest.raises(torch.OutOfMemoryError):
            pyfast.load_adapter(model, tmp_path)
    assert fingerprint(model) == before


def disabled(model, _):
    with pyfast.adapters_disabled(model):
        pass


def per_sample(*names):
    def use(model, _):
        with pyfast.adapters_per_sample(model, names):
            pass

    return use


def beside(config):
    return lambda model, _: pyfast.apply(model, config, adapter_name="b")


WITHOUT_IT = {
    "adapters_disabled": disabled,
    "unload": lambda model, _: pyfast.unload(model),
    "delete_adapter": lambda model, _: pyfast.delete_adapter(model, "p"),
    "set_adapter": lambda model, _: pyfast.set_adapter(model, []),
    "adapters_per_sample": per_sample("p", "__base__"),
    "adapter 'b'": beside(LoraConfig(target_modules=["lm_head"])),
    "adapter 'again'": lambda model, path: pyfast.load_adapter(model, path, "again"),
    "adapter 'other'": lambda model, path: pyfast.apply(model, IA3Config(), adapter_name="other"),
}


@pytest.mark.parametrize(
    ("what", "merged"),
    [*((what, False) for what in WITHOUT_IT), *((w, True) for w in WITHOUT_IT if w != "unload")],
)
def test_nothing_computes_without_it(what, merged, tmp_path):
    """Off by 0.3 from the base, and no word, were these served."""
    pyfast.save_adapter(randomise(pyfast.apply(llama(), LoraConfig(**OPTIONS))), tmp_path)
    model = pyfast.load_adapter(llama(), tmp_path, "p")
    if merged:
        pyfast.merge(model)
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match=f"{what}: adapter 'p' began with PiSSA.*Fix: load"):
        WITHOUT_IT[what](model, tmp_path)
    assert fingerprint(model) == before


def test_adapters_elsewhere_serve_only_with_it():
    """One of another layer may be there before it, as with PEFT; what it computes with is the whole base."""
    model = pyfast.apply(llama(), LoraConfig(target_modules=["q_proj"]), adapter_name="a")
    pyfast.apply(
        randomise(model), LoraConfig(**OPTIONS | {"target_modules": ["v_proj"]}), adapter_name="p"
    )
    pyfast.set_adapter(model, ["a", "p"])
    expected = pyfast.apply(llama(), LoraConfig(target_modules=["q_proj"]), adapter_name="a")
    torch.testing.assert_close(logits(model), logits(randomise(expected)), rtol=1e-4, atol=1e-5)
    before = fingerprint(model)
    for call in (
        lambda: pyfast.set_adapter(model, "a"),
        lambda: pyfast.merge(model, "a"),
        lambda: per_sample("a", "p")(model, None),
    ):
        with pytest.raises(UnsupportedError, match="began with PiSSA"):
            call()
        assert fingerprint(model) == before
    with pyfast.adapters_per_sample(model, ["p", "p"]):
        torch.testing.assert_close(logits(model), logits(llama()), rtol=1e-4, atol=1e-5)
    pyfast.delete_adapter(model, "a")
    pyfast.set_adapter(model, "p")
    torch.testing.assert_close(logits(model), logits(llama()), rtol=1e-4, atol=1e-5)


def test_a_part_that_is_not_merged_keeps_the_rest_from_being_unloaded():
    model = pyfast.apply(llama(), LoraConfig(**OPTIONS))
    pyfast.merge(model.model.layers[0])
    with pytest.raises(UnsupportedError, match="unload: adapter 'default' began"):
        pyfast.unload(twin(model))
    pyfast.unload(model.model.layers[0])
    pyfast.unload(pyfast.merge(model))
    torch.testing.assert_close(logits(model), logits(llama()), rtol=1e-4, atol=1e-5)
    # What is merged for good is a base like any other.
    pyfast.unload(pyfast.apply(model, LoraConfig()))
