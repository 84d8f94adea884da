# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile adapter directories: a typed error in time, and a model that is as it was."""

import json
import random
import shutil
import struct
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyfast
from pyfast import LoraConfig
from pyfast.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    NonFiniteError,
    PyfastError,
    TargetModuleError,
    UnsafeFileError,
    UnsupportedError,
)
from tests.models import fingerprint, llama, randomise

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EVIL = r"(?P<z>.+?)*(.+?)*(.+?)*(.+?)*(?P=z)(?<!j)"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base():
    return llama()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    pyfast.save_adapter(randomise(pyfast.apply(llama(), LoraConfig(r=2))), directory)
    return directory


@pytest.fixture
def copied(good, tmp_path):
    return shutil.copytree(good, tmp_path / "adapter")


def refused(model, directory, error, **kwargs):
    """The message of the error; raised within two seconds, the model unchanged."""
    before, start = fingerprint(model), time.monotonic()
    with pytest.raises(error) as caught:
        pyfast.load_adapter(model, directory, **kwargs)
    assert time.monotonic() - start < 2.5
    assert fingerprint(model) == before
    return str(caught.value)


def edit_tensors(directory, edit):
    path = directory / WEIGHTS
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_config(directory, **values):
    path = directory / CONFIG
    config = json.loads(path.read_text())
    config.update(values)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def rename_half(tensors):
    for key in sorted(tensors)[: len(tensors) // 2]:
        tensors[key.replace("model.layers", "model.language_model.layers")] = tensors.pop(key)


def drop_half(tensors):
    for key in sorted(tensors)[::2]:
        del tensors[key]


TENSORS = {
    "half gone": (AdapterMismatchError, drop_half, "of 8 tensors expected, 4 tensors missing"),
    "all gone": (AdapterMismatchError, dict.clear, "8 tensors missing"),
    "renamed": (AdapterMismatchError, rename_half, "4 tensors missing (first:"),
    "extra": (
        AdapterMismatchError,
        lambda t: t.update(extra=torch.zeros(2)),
        "1 unexpected (first: 'extra')",
    ),
    "shape": (
        AdapterMismatchError,
        lambda t: t.update({FIRST: torch.zeros(2, 63)}),
        f"{FIRST} has shape [2, 63], [2, 64] is needed. The adapter was NOT applied",
    ),
    "rank": (
        AdapterMismatchError,
        lambda t: t.update({FIRST: torch.zeros(128)}),
        "has shape [128], [2, 64] is needed",
    ),
    "int8": (
        AdapterMismatchError,
        lambda t: t.update({FIRST: torch.zeros(2, 64, dtype=torch.int8)}),
        "is I8, not one of F64, F32, F16, BF16. The adapter was NOT applied",
    ),
    "float8": (
        AdapterMismatchError,
        lambda t: t.update({FIRST: torch.zeros(2, 64).to(torch.float8_e4m3fn)}),
        "is F8_E4M3, not one of",
    ),
    "nan": (
        NonFiniteError,
        lambda t: t[FIRST].fill_(float("nan")),
        "has 128 NaN or infinite values in model.layers.0.self_attn.q_proj.lora_A.weight. "
        "Nothing was changed",
    ),
    "inf": (NonFiniteError, lambda t: t[FIRST][0].fill_(-float("inf")), "has 64 NaN or infinite"),
    "too large for float32": (
        NonFiniteError,
        lambda t: t.update({FIRST: torch.full((2, 64), 1e300, dtype=torch.float64)}),
        "has 128 NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case, base, copied):
    error, edit, text = TENSORS[case]
    edit_tensors(copied, edit)
    message = refused(base, copied, error)
    assert text in message
    assert str(copied) in message


def test_mismatch_text(base, copied):
    edit_tensors(copied, rename_half)
    first = FIRST
    assert refused(base, copied, AdapterMismatchError) == (
        f"[PF002] adapter '{copied}' does not fit LlamaForCausalLM: of 8 tensors expected, 4 tensors "
        f"missing (first: '{first}'), 4 unexpected (first: "
        f"'{first.replace('model.layers', 'model.language_model.layers')}'). The adapter was NOT "
        "applied. Fix: load it into the model it was trained on"
    )


CONFIGS = {
    "not json": (ConfigError, b"{", "is not JSON (JSONDecodeError"),
    "not utf-8": (ConfigError, b"\xff\xfe\x00", "is not JSON (UnicodeDecodeError"),
    "empty": (ConfigError, b"", "is not JSON"),
    "deep": (ConfigError, b"[" * 100_000, "is not JSON (RecursionError"),
    "list": (ConfigError, b"[]", "holds list, not a JSON object"),
    "number": (ConfigError, b"1e999", "holds float, not a JSON object"),
    "huge": (UnsafeFileError, b" " * ((1 << 20) + 1), "is larger than 1048576 bytes"),
    "huge number": (ConfigError, b'{"r": ' + b"9" * 5000 + b"}", "is not JSON (ValueError"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_not_configs(case, base, copied):
    error, data, text = CONFIGS[case]
    (copied / CONFIG).write_bytes(data)
    message = refused(base, copied, error)
    assert text in message
    assert CONFIG in message


VALUES = [
    (
        ConfigError,
        {"peft_type": ...},
        "peft_type None is not served; use one of ['BOTTLENECK', 'IA3', 'LORA', 'P_TUNING']",
    ),
    (ConfigError, {"peft_type": "EVIL"}, "peft_type 'EVIL' is not served"),
    (ConfigError, {"peft_type": []}, "peft_type [] is not served"),
    (ConfigError, {"r": "8"}, "r='8' is not of type int"),
    (ConfigError, {"r": 8.0}, "r=8.0 is not of type int"),
    (ConfigError, {"r": True}, "r=True is not of type int"),
    (ConfigError, {"r": -1}, "must be an integer of at least 1"),
    (ConfigError, {"r": 10**12}, "must be an integer of at least 1 and at most 65536"),
    (AdapterMismatchError, {"r": 65536}, "has shape [2, 64], [65536, 64] is needed"),
    (AdapterMismatchError, {"lora_alpha": 0}, "or the config was edited"),
    (ConfigError, {"lora_alpha": float("nan")}, "must be a number other than 0"),
    (ConfigError, {"lora_alpha": 1e30}, "must be a number other than 0"),
    (ConfigError, {"lora_alpha": 10**400}, "must be a number other than 0"),
    (ConfigError, {"lora_alpha": [1]}, "is not of type float"),
    (ConfigError, {"lora_dropout": 2}, "must be in [0, 1)"),
    (ConfigError, {"use_rslora": "yes"}, "use_rslora='yes' is not of type bool"),
    (ConfigError, {"target_modules": 5}, "target_modules=5 is not of type"),
    (ConfigError, {"target_modules": {"q_proj": 1}}, "is not of type"),
    (ConfigError, {"target_modules": ["q_proj", 3]}, "is not of type"),
    (ConfigError, {"modules_to_save": "lm_head"}, "is not of type"),
    (ConfigError, {"rank_pattern": ["q_proj"]}, "is not of type"),
    (ConfigError, {"rank_pattern": {"q_proj": "3"}}, "is not of type"),
    (ConfigError, {"layers_to_transform": "all"}, "is not of type"),
    (ConfigError, {"task_type": ["CAUSAL_LM"]}, "is not of type"),
    (UnsupportedError, {"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
    (ConfigError, {"use_dora": "yes"}, "use_dora='yes' is not of type bool"),
    (AdapterMismatchError, {"use_dora": True}, ".lora_magnitude_vector'"),
    (UnsupportedError, {"bias": "all"}, "bias='all' is not served"),
    (UnsupportedError, {"megatron_config": {"a": 1}}, "megatron_config={'a': 1} is not served"),
    (UnsupportedError, {"ensure_weight_tying": True}, "ensure_weight_tying=True is not served"),
    (ConfigError, {"target_parameters": "x"}, "is not of type"),
    (UnsupportedError, {"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs="),
    (TargetModuleError, {"target_modules": []}, "matches no linear module"),
    (TargetModuleError, {"target_modules": "("}, "is not a regular expression"),
    (TargetModuleError, {"target_modules": "(" * 5000}, "is not a regular expression"),
    (TargetModuleError, {"target_modules": "([a-z_0-9.]+)+#"}, "matches no linear module"),
    (UnsafeFileError, {"target_modules": EVIL}, "takes more than 1 s to match"),
    (UnsafeFileError, {"rank_pattern": {EVIL: 3}}, "takes more than 1 s to match"),
    (UnsafeFileError, {"exclude_modules": EVIL}, "takes more than 1 s to match"),
    (
        UnsafeFileError,
        {"rank_pattern": {f"a{i}[a-z]*": 3 for i in range(40_000)}},
        "takes more than 1 s to match",
    ),
]


@pytest.mark.parametrize(("error", "values", "text"), VALUES, ids=lambda v: str(v)[:40])
def test_values_of_the_wrong_kind(error, values, text, base, copied):
    edit_config(copied, **values)
    assert text in refused(base, copied, error)


def test_harmless_values_are_accepted(base, copied):
    edit_config(
        copied,
        auto_mapping={"parent_library": "harmless_marker", "base_model_class": "x"},
        megatron_core="harmless_marker",
        base_model_name_or_path="/etc/passwd",
        unknown_and_unset=None,
        target_modules=["q_proj", "v_proj", "not_in_this_model"],
    )
    model = llama()
    pyfast.load_adapter(model, copied)
    assert len(pyfast.adapter_parameters(model)) == 8


def test_missing_files(base, copied):
    (copied / WEIGHTS).unlink()
    assert refused(base, copied, AdapterNotFoundError) == (
        f"[PF019] {copied / WEIGHTS} is missing; pass a folder that holds {CONFIG} and {WEIGHTS}, as "
        "save_adapter and PEFT write them. Nothing was changed"
    )
    (copied / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert refused(base, copied, UnsafeFileError) == (
        f"[PF014] '{copied / 'adapter_model.bin'}' is a Python pickle and can run code when read; "
        "pyfast does not open it. Fix, on a machine you trust: pyfast convert"
    )
    (copied / CONFIG).unlink()
    assert f"{CONFIG} is missing" in refused(base, copied, AdapterNotFoundError)
    for missing in (copied / "nowhere", copied / WEIGHTS):
        # FileNotFoundError by its meaning, ValueError because PEFT raises that.
        for error in (AdapterNotFoundError, FileNotFoundError, ValueError):
            assert refused(base, missing, error) == (
                f"[PF019] there is no adapter directory {str(missing)!r}; pass the folder that "
                "save_adapter or PEFT wrote, or fetch one first with "
                "huggingface_hub.snapshot_download. Nothing was changed"
            )
    with pytest.raises(ValueError, match="Can't find"):
        peft.PeftModel.from_pretrained(llama(), copied / "nowhere")


@pytest.mark.parametrize(
    "name", ["/x", "..", "a/../../b", "\\", "a\0", "x" * 4096, "\uff0e\uff0e", ""]
)
def test_adapter_names(name, base, good, tmp_path):
    refused(base, good, AdapterStateError, adapter_name=name)
    with pytest.raises(AdapterStateError):
        pyfast.save_adapter(pyfast.apply(llama(), LoraConfig()), tmp_path / "d", name)
    assert not (tmp_path / "d").exists()


def test_taken_name_and_merged_model(good):
    model = pyfast.load_adapter(llama(), good)
    assert "already has an adapter 'default'" in refused(model, good, AdapterStateError)
    pyfast.merge(model)
    assert "merged" in refused(model, good, AdapterStateError, adapter_name="b")


def test_headers_that_promise_too_much(base, copied):
    path = copied / WEIGHTS
    size = 1 << 50
    header = {FIRST: {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}
    data = json.dumps(header).encode()
    for prefix in (len(data), 1 << 62, 0):
        path.write_bytes(struct.pack("<Q", prefix) + data)
        assert "is damaged" in refused(base, copied, AdapterMismatchError)
    # A sparse file that does hold what the header says is refused by its shape, before it is read.
    size = 1 << 32
    header = {FIRST: {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}
    data = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + 4 * size)
    assert "7 tensors missing" in refused(base, copied, AdapterMismatchError)


def test_altered_values_are_noticed(base, copied):
    path = copied / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert refused(base, copied, AdapterMismatchError) == (
        f"[PF002] {path} is damaged: its tensors do not have the checksum in its header. "
        "The adapter was NOT applied. Fix: fetch or save it again"
    )


def mutate(data, chance):
    """One of the usual ways in which a file goes wrong."""
    data = bytearray(data)
    kind = chance.randrange(6)
    if kind == 0:
        del data[chance.randrange(len(data)) :]
    elif kind == 1:
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        start = chance.randrange(len(data))
        del data[start : start + chance.randint(1, 40)]
    elif kind == 3:
        start = chance.randrange(len(data))
        data[start:start] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 20)))
    elif kind == 4:
        data[chance.randrange(len(data))] = chance.choice(b'0"{}[],:-e9')
    else:
        data[: chance.randint(1, 600)] = b""
    return bytes(data)


def test_mutated_adapters(good, tmp_path):
    """A typed error, or exactly the weights that were saved."""
    chance = random.Random(1)
    originals = {name: (good / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    expected = pyfast.adapter_state_dict(pyfast.load_adapter(llama(), good))
    model = llama()
    before = fingerprint(model)
    outcomes = {}
    for round_number in range(300):
        name = chance.choice((CONFIG, WEIGHTS))
        for other, data in originals.items():
            (tmp_path / other).write_bytes(mutate(data, chance) if other == name else data)
        start = time.monotonic()
        try:
            pyfast.load_adapter(model, tmp_path)
        except PyfastError as error:
            outcome = type(error).__name__
        else:
            outcome = "accepted"
            found = pyfast.adapter_state_dict(model)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
            model = llama()
        assert time.monotonic() - start < 2.5
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if round_number % 10 == 0:
            assert fingerprint(model) == before
    assert outcomes["AdapterMismatchError"] > 50
    assert outcomes["ConfigError"] > 50
