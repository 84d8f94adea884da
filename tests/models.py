# SPDX-License-Identifier: Apache-2.0
"""Tiny random models and the comparisons that the tests share."""

from __future__ import annotations

import copy
import hashlib

import tokenizers
import torch
import transformers
from torch import nn

import pyfast
from pyfast.nn import NF4Linear

VOCAB = 96


def llama(*, tied=False, layers=2, seed=0, bias=False, **changes):
    """A Llama of about 60k parameters with grouped-query attention; `changes` go to its config."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values | changes)).eval()


def word_llama(directory):
    """Save a Llama with a tokenizer of the words w0, w1 ... w93; the directory."""
    names = ["<unk>", "<eos>", *(f"w{i}" for i in range(VOCAB - 2))]
    words = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    ends = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 1}
    llama(**ends).save_pretrained(directory)
    return directory


def gpt2(*, layers=2, seed=0):
    """A GPT-2 of about 110k parameters, without dropout."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=layers,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def token_ids(rows=2, columns=12, seed=0):
    """Random ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, columns), generator=generator)


def logits(model, ids=None):
    """The model's logits, without gradients."""
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids).logits


def randomise(model, *, std=0.05, seed=1):
    """Give every adapter parameter random values, as training would; same for ours and PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters(), key=lambda item: plain(item[0])):
        if "lora_" in name or "modules_to_save" in name:
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.copy_(noise.to(parameter.dtype))
    return model


def plain(name):
    """A parameter's name without PEFT's wrapper."""
    return name.removeprefix("base_model.model.")


def fingerprint(model):
    """Everything that a failed call must not change: tensors, gradients wanted, classes, states."""
    total = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        total.update(bytes(data.tolist()))
    for name, module in model.named_modules():
        state = {
            k: v
            for k, v in vars(module).items()
            if k in ("active", "_disabled", "merged", "configs")
        }
        total.update(f"{name} {type(module)} {module.training} {state}".encode())
    return total.hexdigest()


def twin(model):
    """A deep copy."""
    return copy.deepcopy(model)


def train(model, *, steps=3, lr=1e-2, eps=1e-8, ids=None, grads=None):
    """A user's own loop: AdamW on what requires gradients; the losses.

    With AdamW's default eps, rounding in gradients near zero turns into whole steps; a larger one makes
    trained weights comparable.
    """
    ids = token_ids() if ids is None else ids
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, eps=eps)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if grads is not None:
            named = model.named_parameters()
            grads.append({plain(n): p.grad.clone() for n, p in named if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def adapted_paths(model, kind):
    """Paths of the modules of a class, without PEFT's wrapper."""
    return {plain(path) for path, module in model.named_modules() if isinstance(module, kind)}


class FalconLikeLinear(nn.Linear):
    """A linear with a forward of its own, as Falcon's."""

    def forward(self, x):
        return x @ self.weight.T


def nf4_and_dense(make, *, nested):
    """A model in NF4, the same in dense weights, and the paths of the layers in NF4."""
    model = make()
    reference = twin(model)
    pyfast.quantize(model, nested=nested)
    quantised = [path for path, m in model.named_modules() if isinstance(m, NF4Linear)]
    for path in quantised:
        module = reference.get_submodule(path)
        dense = model.get_submodule(path).nf4_weight().dense()
        module.weight.data = dense if isinstance(module, nn.Linear) else dense.t().contiguous()
    return model, reference, quantised


def resumed_in_trainer(make, directory):
    """Adapters after four steps of transformers' Trainer, those after a resume from the second, and the
    losses; the first run is in `directory / "a"`."""
    data = [{"input_ids": row, "labels": row} for row in torch.arange(3, 15).expand(16, 12)]

    def run(name, resume=None):
        arguments = transformers.TrainingArguments(
            str(directory / name), max_steps=4, save_steps=2, logging_steps=1, learning_rate=1e-2,
            per_device_train_batch_size=4, report_to=[], use_cpu=True, lr_scheduler_type="constant",
        )  # fmt: skip
        torch.manual_seed(0)
        model = make()
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return pyfast.adapter_state_dict(model), losses

    whole, losses = run("a")
    resumed, _ = run("b", str(directory / "a" / "checkpoint-2"))
    return whole, resumed, losses
