# SPDX-License-Identifier: Apache-2.0
"""DoRA's files both ways, PEFT models with DoRA under accelerate, Trainer and our own runs."""

import json
import signal
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import pyfast
from pyfast import LoraConfig
from pyfast.errors import AdapterMismatchError, ResumeError
from pyfast.ops._library import recorded_kernels
from pyfast.train import FinetuneConfig, finetune
from pyfast.train.config import AdapterOptions, RunOptions
from pyfast.train.loop import Trainer
from tests.integrations.test_accelerate import four_bit
from tests.models import fingerprint, gpt2, llama, logits, plain, token_ids, train, twin, word_llama

pytestmark = [
    # PEFT looks for the base model's config.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

ALL = {"target_modules": "all-linear", "use_dora": True, "r": 4}
CASES = {
    "default": (llama, {"use_dora": True}),
    "patterns": (
        llama,
        {
            **ALL,
            "rank_pattern": {"q_proj": 2, r".*1\.mlp.*": 5},
            "alpha_pattern": {"down_proj": 3, r"^model\.layers\.0\.self_attn\..*": 7},
            "use_rslora": True,
        },
    ),
    "gpt2": (gpt2, {**ALL, "fan_in_fan_out": True}),
    "bf16": (lambda: llama().to(torch.bfloat16), ALL),
}


def trained(model, seed=1):
    """Give adapters values as training would: factors of noise, norms near those that they had."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: plain(item[0])):
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                near = parameter * (1 + 0.2 * noise)
                parameter.copy_(near if "lora_magnitude" in name else 0.05 * noise)
    return model


def tolerance(case):
    return 2e-2 if case == "bf16" else 1e-6


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours(case, tmp_path):
    make, options = CASES[case]
    model = trained(pyfast.apply(make(), LoraConfig(**options)))
    pyfast.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.allclose(logits(theirs), logits(model), atol=tolerance(case))
    expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == expected.keys() == pyfast.adapter_state_dict(model).keys()
    assert any(key.endswith(".lora_magnitude_vector") for key in stored)
    for key, tensor in expected.items():
        assert stored[key].dtype == tensor.dtype, key
        assert torch.equal(stored[key], tensor), key
    back = pyfast.load_adapter(make(), tmp_path)
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("case", CASES)
def test_we_load_pefts(case, tmp_path):
    make, options = CASES[case]
    theirs = trained(get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", **options)))
    theirs.save_pretrained(tmp_path)
    model = pyfast.load_adapter(make(), tmp_path, trainable=True)
    assert torch.allclose(logits(theirs), logits(model), atol=tolerance(case))
    mine = {n for n, p in model.named_parameters() if p.requires_grad}
    assert mine == {plain(n) for n, p in theirs.named_parameters() if p.requires_grad}
    pyfast.save_adapter(model, tmp_path / "ours")
    ours, config = (
        json.loads((directory / "adapter_config.json").read_text())
        for directory in (tmp_path / "ours", tmp_path)
    )
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        assert ours[key] == config[key], key


def test_pefts_config_object_is_accepted():
    config = peft.LoraConfig(task_type="CAUSAL_LM", **ALL)
    ours, theirs = pyfast.apply(llama(), config), get_peft_model(llama(), config)
    assert torch.allclose(logits(trained(ours)), logits(trained(theirs)), atol=1e-6)


def test_an_adapter_of_a_4_bit_base(tmp_path):
    model = trained(pyfast.apply(pyfast.quantize(llama()), LoraConfig(**ALL)))
    pyfast.save_adapter(model, tmp_path)
    back = pyfast.load_adapter(pyfast.quantize(llama()), tmp_path)
    assert torch.equal(logits(back), logits(model))
    with pytest.warns(UserWarning, match="trained on an NF4 base .*, but this"):
        pyfast.load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("change", ["missing", "shape", "surplus"])
def test_files_that_do_not_fit_are_refused(change, tmp_path):
    pyfast.save_adapter(pyfast.apply(llama(), LoraConfig(**ALL)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("k_proj.lora_magnitude_vector"))
    if change == "missing":
        del tensors[key]
    elif change == "shape":
        tensors[key] = tensors[key][None].clone()
    save_file(tensors, path)
    if change == "surplus":
        config = tmp_path / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": False}))
    model = llama()
    before = fingerprint(model)
    with pytest.raises(AdapterMismatchError, match="lora_magnitude_vector"):
        pyfast.load_adapter(model, tmp_path)
    assert fingerprint(model) == before


# --- accelerate ---------------------------------------------------------------------------------


def dora(make=llama, **options):
    config = {**ALL, "fan_in_fan_out": make is gpt2, "task_type": "CAUSAL_LM", **options}
    return trained(get_peft_model(make(), peft.LoraConfig(**config)))


@pytest.mark.parametrize("kind", ["llama", "bias", "gpt2", "4-bit"])
def test_accelerate_serves_pefts_dora(kind, tmp_path):
    if kind == "4-bit":
        pytest.importorskip("bitsandbytes")
        llama().save_pretrained(tmp_path)
    make = {
        "llama": llama,
        "bias": lambda: llama(bias=True),
        "gpt2": gpt2,
        "4-bit": lambda: four_bit(tmp_path),
    }[kind]
    # Outside of training bitsandbytes repacks weights on the CPU, which PEFT then takes norms of.
    ours, theirs = dora(make).train(), dora(make).train()
    names = [name for name, _ in ours.named_parameters()]
    report = pyfast.accelerate(ours)
    adapted = [row for row in report.rows if row.module.startswith("PEFT")]
    assert len(adapted) == (8 if kind == "gpt2" else 14)
    assert all(row.op == "lora_linear" for row in adapted)
    with recorded_kernels() as kernels:
        assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert [op for op, _ in kernels].count("lora_linear") == len(adapted)
    grads, expected = [], []
    losses = train(ours, grads=grads, eps=1e-3)
    assert losses == pytest.approx(train(theirs, grads=expected, eps=1e-3), abs=1e-5)
    assert grads[0].keys() == expected[0].keys()
    for name, grad in expected[0].items():
        assert torch.allclose(grads[0][name], grad, atol=1e-5), name
    assert [name for name, _ in ours.named_parameters()] == names
    if kind == "4-bit":
        return
    assert torch.equal(logits(twin(ours)), logits(ours))
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.allclose(logits(ours), logits(theirs), atol=1e-6)
    ours.merge_adapter(), theirs.merge_adapter()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    ours.unmerge_adapter(), theirs.unmerge_adapter()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)


def test_accelerate_leaves_several_adapters_and_other_variants_to_peft():
    model = dora()
    model.add_adapter("more", peft.LoraConfig(**{**ALL, "use_dora": False}))
    trained(model)
    expected = []
    for names in (["default"], ["more"], ["default", "more"]):
        model.base_model.set_adapter(names)
        expected.append(logits(model))
    assert len(pyfast.accelerate(model).served) == 14
    for names, wanted in zip((["default"], ["more"], ["default", "more"]), expected, strict=True):
        model.base_model.set_adapter(names)
        assert torch.allclose(logits(model), wanted, atol=1e-6)
    other = dora(use_dora=False, alora_invocation_tokens=[1])
    reasons = {row.reason for row in pyfast.accelerate(other).rows if row.module.startswith("PEFT")}
    assert reasons == {"it uses PEFT's ALoraLinearVariant"}


def test_accelerate_with_dropout_trains_and_compiles():
    model = dora(lora_dropout=0.2)
    expected = logits(model.eval())
    pyfast.accelerate(model)
    assert torch.allclose(logits(model), expected, atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = token_ids()
    assert torch.allclose(compiled(input_ids=ids, use_cache=False).logits, expected, atol=1e-5)
    torch._dynamo.reset()
    losses = train(model)
    assert losses[-1] < losses[0]


# --- runs ---------------------------------------------------------------------------------------


def trainer(model, directory):
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
    )
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 10)]
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows)


def losses_of(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_trainer_and_resume(tmp_path):
    whole = trainer(trained(pyfast.apply(llama(), LoraConfig(**ALL))), tmp_path / "run")
    theirs = trainer(dora(), tmp_path / "theirs")
    whole.train(), theirs.train()
    assert losses_of(whole) == pytest.approx(losses_of(theirs), abs=1e-5)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert any(
        "lora_magnitude_vector" in k for k in load_file(checkpoint / "adapter_model.safetensors")
    )
    again = trainer(pyfast.apply(llama(), LoraConfig(**ALL)), tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses_of(again) == losses_of(whole)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_our_own_run_and_resume(method, tmp_path, monkeypatch):
    model = word_llama(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2}"} for i in range(3, 43)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(directory, dora=True):
        run = {"steps": 6, "batch_size": 2, "dtype": "fp32", "device": "cpu", "samples": 0}
        return FinetuneConfig(
            model=str(model),
            method=method,
            data=str(data),
            output_dir=str(tmp_path / directory),
            adapter=AdapterOptions(r=4, alpha=8, dropout=0.1, dora=dora),
            run=RunOptions(**run, eval_every=0, save_every=0),
        )

    step = Trainer.step

    def stopped(trainer):
        values = step(trainer)
        if trainer.progress.step == 3:
            signal.raise_signal(signal.SIGINT)
        return values

    finetune(config("whole"))
    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune(config("cut"))
    monkeypatch.undo()
    with pytest.raises(ResumeError, match=r"adapter\.dora \(saved True, now False\)"):
        finetune(replace(config("cut", dora=False), resume=True))
    finetune(replace(config("cut"), resume=True))
    whole, cut = (tmp_path / name / "adapter" for name in ("whole", "cut"))
    stored, resumed = (load_file(d / "adapter_model.safetensors") for d in (whole, cut))
    assert any(key.endswith("lora_magnitude_vector") for key in stored)
    assert stored.keys() == resumed.keys()
    assert all(torch.equal(stored[key], resumed[key]) for key in stored)
    assert json.loads((whole / "adapter_config.json").read_text())["use_dora"] is True
