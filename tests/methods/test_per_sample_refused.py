# SPDX-License-Identifier: Apache-2.0
"""`adapters_per_sample`: names, states and kinds of adapters that it refuses, and what its block refuses."""

import pytest
import torch

import pyfast
from pyfast import IA3Config, LoraConfig, PromptEncoderConfig
from pyfast.errors import AdapterStateError, ConfigError, UnsupportedError
from pyfast.methods.base import adapted_modules
from tests.family_models import batch, variant
from tests.methods.test_per_sample import BASE, NAMES, two
from tests.methods.test_per_sample import pytestmark as pytestmark
from tests.models import fingerprint, gpt2, llama, logits, token_ids


def entered(model, names):
    with pyfast.adapters_per_sample(model, names):
        pass


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        (["c", "d"], AdapterStateError, "no adapter 'd'; the model has"),
        ([], ConfigError, "names is empty"),
        ([1, "c"], ConfigError, "must be a name or a list of names"),
    ],
)
def test_names_that_cannot_be(names, error, text):
    model = two()
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        entered(model, names)
    assert fingerprint(model) == before
    assert all(module.samples is None for module in adapted_modules(model).values())


@pytest.mark.parametrize("names", [["c"], NAMES, [BASE] * 3])
def test_another_batch_than_was_named(names):
    model = two()
    expected = logits(model)
    with (
        pyfast.adapters_per_sample(model, names),
        pytest.raises(
            ConfigError, match=f"{len(names)} names were given, but the batch has 2 rows"
        ),
    ):
        logits(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("make", [llama, lambda: variant("t5")])
def test_other_prompts_than_were_named_although_their_beams_are_as_many(make):
    model = make()
    pyfast.apply(model, LoraConfig(target_modules="all-linear"), adapter_name="b")
    how = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    for prompts, names in ((2, 4), (4, 2), (2, 1)):
        ids = token_ids(prompts)
        for args, kwargs in (((ids,), {}), ((), {"input_ids": ids}), ((), {"inputs": ids})):
            with (
                pyfast.adapters_per_sample(model, ["b", BASE, BASE, "b"][:names]),
                pytest.raises(
                    ConfigError, match=f"{names} names were given, but the batch has {prompts}"
                ),
            ):
                model.generate(*args, **kwargs, **how)
    with pyfast.adapters_per_sample(model, ["b", BASE]):
        model.generate(token_ids(2), **how)
        with pytest.raises(ConfigError, match="2 names were given, but the batch has 1 rows"):
            model.generate(**how)


def test_states_in_which_no_block_begins():
    model = two()
    with (
        pyfast.adapters_per_sample(model, ["c"]),
        pytest.raises(AdapterStateError, match="outside the adapters_per_sample block"),
    ):
        entered(model, ["b"])
    with (
        pyfast.adapters_disabled(model),
        pytest.raises(AdapterStateError, match="adapters are disabled"),
    ):
        entered(model, ["c"])
    pyfast.merge(model)
    with pytest.raises(AdapterStateError, match=r"adapters \['b'\] are merged"):
        entered(model, ["c"])
    pyfast.unmerge(model)
    entered(model, ["c"])
    with pytest.raises(
        AdapterStateError, match="LlamaForCausalLM has no adapters; apply or load one"
    ):
        entered(llama(), [BASE])


@pytest.mark.parametrize(
    "change",
    [
        lambda m: pyfast.set_adapter(m, "c"),
        lambda m: pyfast.delete_adapter(m, "c"),
        lambda m: pyfast.apply(m, LoraConfig(), adapter_name="d"),
        pyfast.merge,
        pyfast.unload,
    ],
)
def test_what_a_block_does_not_allow(change):
    model = two()
    before = fingerprint(model)
    with (
        pyfast.adapters_per_sample(model, ["c", "b"]),
        pytest.raises(AdapterStateError, match="outside the adapters_per_sample block"),
    ):
        change(model)
    assert fingerprint(model) == before


def test_the_base_serves_where_adapters_are_disabled_inside():
    model = two()
    with pyfast.adapters_per_sample(model, ["c"]), pyfast.adapters_disabled(model):
        assert torch.equal(logits(model), logits(llama()))


REFUSED = {
    "virtual tokens": (llama, PromptEncoderConfig(num_virtual_tokens=3), "has a VirtualTokens"),
    "experts": (
        lambda: variant("mixtral"),
        LoraConfig(target_modules=["q_proj", "experts"]),
        "has a LoraExperts",
    ),
    "activations of experts": (lambda: variant("mixtral"), IA3Config(), "has a IA3Activation"),
    "positions": (
        gpt2,
        LoraConfig(target_modules=["wpe"]),
        "'transformer.wpe', which is none of tokens",
    ),
    "positions trained whole": (
        gpt2,
        LoraConfig(modules_to_save=["wpe"]),
        "which is none of tokens",
    ),
    "relative positions": (
        lambda: variant("t5"),
        LoraConfig(target_modules=["relative_attention_bias"]),
        "which is none of tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_kinds_that_serve_whole_batches_only(case):
    make, config, text = REFUSED[case]
    model = make()
    pyfast.apply(model, LoraConfig(target_modules="all-linear"), adapter_name="c")
    pyfast.apply(model, config, adapter_name="b")
    before = fingerprint(model)
    for names in (["c", "b"], ["c", "c"]):  # it is active, and would take part unnamed too
        with pytest.raises(UnsupportedError, match=text):
            entered(model, names)
    assert fingerprint(model) == before
    pyfast.set_adapter(model, "c")
    with pyfast.adapters_per_sample(model, ["c", BASE]), torch.no_grad():
        model(**batch(model))


def test_a_module_of_several_tensors_trained_whole():
    whole = LoraConfig(target_modules=["up_proj"], modules_to_save=["self_attn"])
    model = two(first=whole, second=LoraConfig(target_modules=["up_proj"]))
    with (
        pyfast.adapters_per_sample(model, ["c", "b"]),
        pytest.raises(
            UnsupportedError, match="LlamaAttention, which is trained whole beside adapters"
        ),
    ):
        logits(model)


def test_no_adapter_has_the_name_of_the_base():
    model = llama()
    with pytest.raises(AdapterStateError, match="'__base__' stands for no adapter"):
        pyfast.apply(model, LoraConfig(), adapter_name=BASE)
