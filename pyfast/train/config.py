# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning run can be told: one dataclass a component, every field with a default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass
class AdapterOptions:
    """The low-rank adapter of `lora` and `qlora`.

    Attributes:
        r: Rank.
        alpha: Scale numerator; the update is multiplied by alpha / r.
        dropout: Probability that an input element of the adapter is dropped in training.
        targets: "all-linear", one regular expression, or a list of module names.
        rslora: Scale by alpha / sqrt(r) instead.
        init: "kaiming" or "gaussian" has A random and B zero; "pissa", or faster "pissa_niter_<n>" with n
            iterations (16, say), starts with the principal part of each weight, which loses it (PiSSA).
        dora: Learn the norm of each output's weights apart from their direction (DoRA).
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    init: str = "kaiming"
    dora: bool = False


@dataclass
class PromptOptions:
    """The virtual tokens of `p-tuning`.

    Attributes:
        tokens: How many there are.
        encoder: The network that makes them: "mlp" or "lstm" (PEFT's), or "nemo" (two linears).
        hidden: Size inside the network; by default the model's hidden size, for "nemo" 1024.
    """

    tokens: int = 20
    encoder: Literal["mlp", "lstm", "nemo"] = "mlp"
    hidden: int | None = None


@dataclass
class BottleneckOptions:
    """The small networks of `adapters`.

    Attributes:
        size: Their inner size.
        placement: "houlsby" has them behind attention and MLP, "pfeiffer" behind the MLP alone.
        activation: Between their two linears.
        layer_norm: Have a LayerNorm in front of them.
        bias: Have biases in the linears.
    """

    size: int = 32
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    activation: Literal["silu", "gelu", "relu"] = "silu"
    layer_norm: bool = True
    bias: bool = False


@dataclass
class QuantOptions:
    """NF4 quantisation of the frozen weights under `qlora`.

    Attributes:
        blocksize: Weights that share one scale.
        nested: Quantise the scales too (0.37 bit a weight less).
    """

    blocksize: int = 64
    nested: bool = True


@dataclass
class DatasetOptions:
    """How the records are read, cut and split.

    Attributes:
        eval_data: Held-out file, as `data`; without it a part of `data` is held out.
        eval_fraction: Share of the records to hold out when `eval_data` is not given; 0 holds out none.
        split_by: Records with the same prompt, or (default) the same prompt or answer, stay on one
            side of the split.
        deduplicate: Drop records whose prompt and answer repeat an earlier one.
        max_length: Tokens kept of a record; the rest is cut from the end and counted.
        packing: Lay the records of a forward pass end to end in rows of at most `max_length` tokens, or in
            one row where attention runs over each record alone: less padding, the same loss and gradients.
        on_bad_record: "raise" at the first record that cannot be used, or "skip" and count them.
        max_bad_fraction: With "skip", stop when more than this share of the records is bad.
    """

    eval_data: str | None = None
    eval_fraction: float = 0.1
    split_by: Literal["prompt_and_answer", "prompt"] = "prompt_and_answer"
    deduplicate: bool = True
    max_length: int = 512
    packing: bool = False
    on_bad_record: Literal["raise", "skip"] = "raise"
    max_bad_fraction: float = 0.01


@dataclass
class OptimizerOptions:
    """AdamW.

    Attributes:
        name: "adamw" is torch's; "adamw_8bit", "paged_adamw_8bit" and "paged_adamw_32bit" are those of
            bitsandbytes, whose state is smaller, or moves to the host where a GPU's memory is short.
        lr: Peak learning rate; by default 5e-4 for lora, qlora and adapters, 3e-3 for ia3, 1e-3 for p-tuning,
            2e-5 for full fine-tuning.
        weight_decay: Decoupled decay, applied to matrices only.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        max_grad_norm: Gradients are scaled down to this global norm; 0 leaves them as they are.
        loraplus_lr_ratio: Of lora and qlora: B learns so many times faster than A (LoRA+; 16, say).
    """

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    loraplus_lr_ratio: float | None = None


@dataclass
class ScheduleOptions:
    """Learning rate over the run.

    Attributes:
        kind: Shape after the warm-up.
        warmup_fraction: Share of all steps in which the rate rises linearly from zero to its peak.
        min_ratio: Rate at the end, as a share of the peak.
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = 0.05
    min_ratio: float = 0.1


@dataclass
class RunOptions:
    """Size, place and bookkeeping of the run.

    Attributes:
        epochs: Passes over the training records; ignored when `steps` is given.
        steps: Number of optimiser steps.
        batch_size: Records in one forward pass.
        accumulation: Forward passes in one optimiser step.
        device: "auto" takes CUDA when there is one.
        dtype: "auto" takes bf16 where the processor computes in it, else fp32.
        activation_checkpointing: Recompute activations in backward: less memory, about a third slower.
        seed: Decides shuffling, split, initial adapter weights and dropout.
        eval_every: Steps between held-out evaluations; 0 evaluates at the start and the end only.
        save_every: Steps between checkpoints; 0 saves at the end only.
        keep_last: Checkpoints kept.
        log_every: Steps between lines where there is no terminal.
        samples: Held-out questions answered before and after training; of a chat, its last answer.
        predict_with_generate: Answer held-out records at each evaluation, greedily, and count the answers
            that are the expected ones up to case, punctuation and articles (SQuAD's exact match).
        max_predict_samples: Records that are answered so.
        max_new_tokens: Length at which such an answer is cut, and one of `samples`.
    """

    epochs: float = 2.0
    steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    activation_checkpointing: bool = False
    seed: int = 0
    eval_every: int = 50
    save_every: int = 100
    keep_last: int = 2
    log_every: int = 10
    samples: int = 4
    predict_with_generate: bool = False
    max_predict_samples: int = 32
    max_new_tokens: int = 64


@dataclass
class FinetuneConfig:
    """A fine-tuning run; what is set and not for its method is an error.

    Attributes:
        model: "default" (SmolLM2-135M-Instruct), a model directory, or a name on the Hugging Face hub.
        method: "lora", "qlora" (4-bit frozen weights), "sft" (all weights), "ia3" (vectors that scale
            activations), "p-tuning" (virtual tokens) or "adapters" (small networks behind attention and MLP).
        data: "default", or JSONL of {"input", "output"}, {"prompt", "completion"}, {"messages"},
            {"conversations"} (NeMo's with "system" and "mask", or ShareGPT's) or {"instruction", "input",
            "output"} records: a file, or a list as '[a.jsonl, b.jsonl]'. A .json
            file may be one array of them.
        output_dir: Where everything is written; by default a new directory under outputs/.
        resume: Go on from the newest checkpoint in `output_dir`.
    """

    model: str = "default"
    method: Literal["lora", "qlora", "sft", "ia3", "p-tuning", "adapters"] = "lora"
    data: str | list[str] = "default"
    output_dir: str | None = None
    resume: bool = False
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    prompt: PromptOptions = field(default_factory=PromptOptions)
    bottleneck: BottleneckOptions = field(default_factory=BottleneckOptions)
    quant: QuantOptions = field(default_factory=QuantOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def data_files(self) -> list[str]:
        """The training files as a list; empty for the default data."""
        if self.data == "default":
            return []
        return [self.data] if isinstance(self.data, str) else list(self.data)

    @property
    def peak_lr(self) -> float:
        """The learning rate asked for, or the method's default."""
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        return _RATES.get(self.method, 5e-4)


_RATES = {"sft": 2e-5, "ia3": 3e-3, "p-tuning": 1e-3}


def in_full(name: str) -> str:
    """The absolute path of what is here under a name; another name, such as a hub's, as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def to_dict(config: FinetuneConfig) -> dict[str, Any]:
    """The configuration as plain values that YAML and JSON can hold, and that mean the same anywhere."""
    values = dataclasses.asdict(config)
    values["optimizer"]["betas"] = list(values["optimizer"]["betas"])
    if config.model != "default":
        values["model"] = in_full(config.model)
    if config.data_files:
        values["data"] = [in_full(file) for file in config.data_files]
    for part, name in ((values, "output_dir"), (values["dataset"], "eval_data")):
        if part[name] is not None:
            part[name] = in_full(part[name])
    return values
