# SPDX-License-Identifier: Apache-2.0
"""`adapters_per_sample`: each row as alone with its adapter, PEFT's `adapter_names`, gradients, refusals."""

import copy
import pickle

import peft
import pytest
import torch
from torch.utils.checkpoint import CheckpointError

import pyfast
from pyfast import BottleneckConfig, IA3Config, LoraConfig
from pyfast.errors import ConfigError
from tests.family_models import variant
from tests.models import fingerprint, gpt2, llama, logits, randomise, token_ids

pytestmark = [
    # PEFT asks transformers for a property by its old name, and looks for the base model's config.
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*shares its weight with:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:target_modules='all-linear' adapts linear layers:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]

BASE = "__base__"
NAMES = ["b", BASE, "c", "b", "c"]
ATTENTION = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj"])
ALL = LoraConfig(r=8, target_modules="all-linear")
WHOLE = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
DORA = LoraConfig(r=4, target_modules="all-linear", use_dora=True)


def two(make=llama, first=ATTENTION, second=ALL):
    """A model with the adapters c and b, whose parameters are as after training."""
    model = make()
    for name, config in {"c": first, "b": second}.items():
        pyfast.apply(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(3)
    for name in ("c", "b"):
        for _, parameter in sorted(pyfast.adapter_parameters(model, name).items()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.05 * noise.to(parameter.dtype)
    return model


def alone(model, name, call):
    """What a call gives with one adapter for all."""
    if name == BASE:
        with pyfast.adapters_disabled(model):
            return call(model)
    pyfast.set_adapter(model, name)
    return call(model)


CASES = {
    "LoRA": (llama, ATTENTION, ALL),
    "Conv1D": (gpt2, LoraConfig(), LoraConfig(target_modules=["c_attn", "c_fc"])),
    "embeddings, a module trained whole": (llama, WHOLE, ALL),
    "embedding with a scale": (lambda: variant("gemma"), WHOLE, ATTENTION),
    "DoRA": (llama, DORA, ALL),
    "IA3": (llama, IA3Config(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
    "IA3 in fused rows": (gpt2, IA3Config(), LoraConfig()),
    "bottlenecks": (llama, BottleneckConfig(), BottleneckConfig(bottleneck_size=8, bias=True)),
    "methods mixed": (llama, IA3Config(), ALL),
    "other methods mixed": (llama, BottleneckConfig(), DORA),
    "a norm trained whole": (llama, LoraConfig(modules_to_save=["norm"]), IA3Config()),
}


@pytest.mark.parametrize("active", ["c", "b"])
@pytest.mark.parametrize("case", CASES)
def test_each_row_is_as_alone_with_its_adapter(case, active):
    make, first, second = CASES[case]
    model = two(lambda: make().double(), first, second)
    pyfast.set_adapter(model, active)
    ids = token_ids(5)
    with pyfast.adapters_per_sample(model, NAMES):
        got = logits(model, ids)
    for row, name in enumerate(NAMES):
        expected = alone(model, name, lambda m, row=row: logits(m, ids[row : row + 1]))
        torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-11, atol=1e-11)
    assert len({tuple(got[row, -1].tolist()) for row in range(3)}) == 3
    for name in ("c", BASE):
        with pyfast.adapters_per_sample(model, [name] * 5):
            got = logits(model, ids)
        torch.testing.assert_close(got, alone(model, name, lambda m: logits(m, ids)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("config", [ATTENTION, DORA, IA3Config(), BottleneckConfig()])
def test_over_nf4(config, nested):
    model = two(lambda: pyfast.quantize(llama(), nested=nested), config)
    ids = token_ids(5)
    with pyfast.adapters_per_sample(model, NAMES):
        got = logits(model, ids)
    for row, name in enumerate(NAMES):
        expected = alone(model, name, lambda m, row=row: logits(m, ids[row : row + 1]))
        torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_exact_as_one_adapter_for_all():
    ids = token_ids(5)
    exact, half = two(lambda: llama().double()), two(lambda: llama().bfloat16())
    assert logits(half, ids).dtype == torch.bfloat16
    errors = []
    for name in ("c", "b"):
        reference = alone(exact, name, lambda m: logits(m, ids))
        with pyfast.adapters_per_sample(half, [name, name, "c", "b", BASE]):
            mixed = logits(half, ids)
        single = alone(half, name, lambda m: logits(m, ids))
        errors.append([(y[:2] - reference[:2]).norm() for y in (mixed, single)])
    assert all(mixed < 1.5 * single for mixed, single in errors)


def peft_pair(make=llama, **more):
    """Our model and PEFT's with the same adapters b and c."""
    ours, theirs = make(), None
    targets = {"c": (4, more.pop("targets", ["q_proj", "v_proj"])), "b": (8, "all-linear")}
    for name, (rank, chosen) in targets.items():
        config = peft.LoraConfig(r=rank, lora_alpha=6, target_modules=chosen, **more)
        pyfast.apply(ours, config, adapter_name=name)
        if theirs is None:
            theirs = peft.get_peft_model(make(), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
    return randomise(ours), randomise(theirs).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": ["embed_tokens", "q_proj", "up_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"make": gpt2, "targets": ["c_attn"], "fan_in_fan_out": True},
    ],
)
def test_logits_and_beams_are_pefts(options):
    ours, theirs = peft_pair(**options)
    ids = token_ids(5)
    with torch.no_grad():
        expected = theirs(input_ids=ids, adapter_names=NAMES).logits
    with pyfast.adapters_per_sample(ours, NAMES):
        torch.testing.assert_close(logits(ours, ids), expected, rtol=1e-4, atol=1e-5)
        for beams in (1, 3):
            how = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False}
            got = ours.generate(input_ids=ids, **how)
            assert torch.equal(got, theirs.generate(input_ids=ids, adapter_names=NAMES, **how))


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_has_no_beams(beams):
    ours, theirs = peft_pair(lambda: variant("t5"), targets=["q", "v", "wo", "embed_tokens"])
    inputs = {"input_ids": token_ids(5), "attention_mask": torch.ones(5, 12, dtype=torch.long)}
    how = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False}
    with pyfast.adapters_per_sample(ours, NAMES):
        got = ours.generate(**inputs, **how)
    assert torch.equal(got, theirs.generate(**inputs, adapter_names=NAMES, **how))


def test_returned_sequences_and_generation_config_copy_samples():
    model, ids = two(), token_ids(3)
    names = ["b", BASE, "c"]
    config = copy.deepcopy(model.generation_config)
    config.update(num_return_sequences=2, do_sample=True, top_k=1, max_new_tokens=5)
    with pyfast.adapters_per_sample(model, names):
        got = model.generate(ids, config)
        assert torch.equal(got, model.generate(ids, generation_config=config))
        with pytest.raises(ConfigError, match="3 names were given, but the batch has 6 rows"):
            logits(model, ids.repeat_interleave(2, 0))
    for row, name in enumerate(names):
        call = {"max_new_tokens": 5, "do_sample": False}
        expected = alone(
            model, name, lambda m, row=row, call=call: m.generate(ids[row : row + 1], **call)
        )
        assert torch.equal(got[2 * row, :17], expected[0])
        assert torch.equal(got[2 * row], got[2 * row + 1])


def gradients(model, ids, weight):
    model.zero_grad()
    rows = model(input_ids=ids).logits.log_softmax(-1)[..., 0].sum(1)
    (rows * weight).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [None, True, False])
@pytest.mark.parametrize(
    ("first", "second"), [(ATTENTION, ALL), (DORA, WHOLE), (IA3Config(), BottleneckConfig())]
)
def test_gradients_reach_each_adapter_from_its_own_rows(first, second, checkpointed):
    model, ids = two(lambda: llama().double(), first, second), token_ids(5)
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)
    pyfast.set_adapter(model, ["c", "b"])
    model.train()
    if checkpointed is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointed})
    with pyfast.adapters_per_sample(model, NAMES):
        got = gradients(model, ids, weight)
    model.gradient_checkpointing_disable()
    expected = {}
    for name in ("c", "b"):
        pyfast.set_adapter(model, name)
        own = torch.tensor([other == name for other in NAMES])
        expected |= gradients(model, ids[own], weight[own])
    assert got.keys() == expected.keys()
    for key, grad in expected.items():
        assert grad.norm() > 0
        torch.testing.assert_close(got[key], grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("names", [NAMES, ["c"] * 5, ["b"] * 5, [BASE, *["b"] * 4]])
def test_a_checkpointed_backward_outside_the_block_is_no_silent_mistake(names):
    model, ids = two(), token_ids(5)
    pyfast.set_adapter(model, ["c", "b"])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pyfast.adapters_per_sample(model, names):
        loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(CheckpointError):
        loss.backward()


def test_dropout_is_each_adapters_own():
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
    model = two(first=config)
    model.train()
    ids = token_ids(1).repeat(4, 1)
    with pyfast.adapters_per_sample(model, ["c", "c", "b", BASE]):
        got = logits(model, ids)
    assert not torch.equal(got[0], got[1])
    for row, name in ((2, "b"), (3, BASE)):
        torch.testing.assert_close(
            got[row : row + 1], alone(model, name, lambda m: logits(m, ids[:1]))
        )


def test_compiled():
    model, ids = two(), token_ids(5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for names in (NAMES, NAMES[::-1]):
        with pyfast.adapters_per_sample(compiled, names):
            torch.testing.assert_close(logits(compiled, ids), logits(model, ids))
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_inside_has_its_active_adapter(clone):
    model = two()
    expected = logits(model)
    with pyfast.adapters_per_sample(model, ["c", BASE]):
        other = clone(model)
        assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)
    pyfast.set_adapter(other, "c")


def test_an_error_inside_leaves_nothing_behind():
    model = two()
    expected, before = logits(model), fingerprint(model)
    with pytest.raises(ZeroDivisionError), pyfast.adapters_per_sample(model, ["c", BASE]):
        raise ZeroDivisionError
    assert fingerprint(model) == before
    assert torch.equal(logits(model), expected)
