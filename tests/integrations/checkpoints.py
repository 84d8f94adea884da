# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk that the tests of 4-bit models make, load and compare."""

import json
import weakref

import torch
import transformers
from safetensors.torch import load_file, save_file

import pyfast
from tests.models import llama


def load(directory, **options):
    config = transformers.AutoConfig.from_pretrained(directory)
    seq2seq = config.is_encoder_decoder
    kind = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    return kind.from_pretrained(directory, **options)


def load_nf4(directory, **options):
    return load(directory, quantization_config=pyfast.NF4Config(**options))


def reread(directory, **options):
    """A 4-bit checkpoint through our quantizer."""
    return load(directory, config=pyfast.NF4Config.model_config(directory), **options)


def raw(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_equal_tensors(ours, theirs):
    """The same names, dtypes, shapes and bytes."""
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert ours[key].shape == tensor.shape, key
        assert torch.equal(raw(ours[key]), raw(tensor)), key


def assert_equal_states(model, other):
    assert_equal_tensors(model.state_dict(), other.state_dict())


def assert_equal_files(directory, other):
    assert_equal_tensors(*(load_file(d / "model.safetensors") for d in (directory, other)))


def quantization(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def damage(directory, key, change):
    """Change a tensor of a saved model."""
    tensors = load_file(directory / "model.safetensors")
    tensors[key] = change(tensors[key])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def written_by_bitsandbytes(directory, model=None, *, dtype=torch.float32, **options):
    """A checkpoint that transformers wrote with bitsandbytes, and the model that it wrote."""
    (model or llama(bias=True)).to(dtype).save_pretrained(directory / "dense")
    values = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **options}
    config = transformers.BitsAndBytesConfig(**values)
    theirs = load(directory / "dense", quantization_config=config, dtype=dtype)
    theirs.save_pretrained(directory / "theirs")
    return directory / "theirs", theirs


def dense_counts(monkeypatch):
    """From now on, how many of the weights that were quantised are still held dense when one is."""
    dense, counts = [], []
    quantise = torch.ops.pyfast.nf4_quantize

    def counted(weight, *args):
        dense.append(weakref.ref(weight.untyped_storage()))
        counts.append(sum(storage() is not None for storage in dense))
        return quantise(weight, *args)

    monkeypatch.setattr("pyfast.ops.nf4._quantize", counted)
    return counts


def four_bits(model):
    """Paths of the 4-bit linears, ours or those of bitsandbytes."""
    names = ("NF4Linear", "Linear4bit")
    return {path for path, module in model.named_modules() if type(module).__name__ in names}
