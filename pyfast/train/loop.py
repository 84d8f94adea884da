# SPDX-License-Identifier: Apache-2.0
"""The training loop: read it from `finetune` down."""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pyfast.errors import EmptyTargetError, NoGradientError, NonFiniteError
from pyfast.train import checkpoint as ckpt
from pyfast.train.checkpoint import Checkpoint, Progress
from pyfast.train.config import FinetuneConfig, ScheduleOptions
from pyfast.train.data import IGNORED, Batch, Data, Example, collate, load_data, step_indices
from pyfast.train.exact_match import chosen, exact_match
from pyfast.train.metrics import Metrics, say
from pyfast.train.model import (
    Place,
    check_data,
    choose_place,
    evaluating,
    prepare_model,
    trainable_parameters,
    write_weights,
)
from pyfast.train.optim import check_optimizer, make_optimizer
from pyfast.train.packing import collate_packed, prepare_packing, row_capacity
from pyfast.train.run import (
    Result,
    StopSignals,
    check_length,
    check_output,
    describe,
    finish,
    prepare_output,
    resume_settings,
    seed_everything,
    writing,
)
from pyfast.train.samples import Samples
from pyfast.train.validate import validate


def finetune(config: FinetuneConfig) -> Result:
    """Fine-tune a model and write adapter (or model), checkpoints, metrics and loss curve.

    SIGINT and SIGTERM stop the run after the current step, with a checkpoint: SIGINT then raises
    KeyboardInterrupt and SIGTERM SystemExit. A second signal stops at once.

    Raises:
        ConfigError: A setting is wrong, the data do not fit the model, or the output directory is in use.
        DataError, EmptyTargetError: A record cannot be used, or no answer is left to learn.
        NoGradientError: Nothing would train.
        NonFiniteError: Loss or gradient is NaN or infinite; the weights of the last step are kept.
        ResumeError, CheckpointCorruptError: A checkpoint cannot be used.
        UnsupportedError: The model cannot be trained so.
        CheckpointWriteError: A checkpoint, or anything else in the output directory, cannot be written.
    """
    validate(config)
    place = choose_place(config.run)
    check_optimizer(config, place.device)
    output = check_output(config)
    config = replace(config, output_dir=str(output))
    checkpoint = ckpt.load(output / "checkpoints") if config.resume else None
    seed_everything(config.run.seed)
    saved_model = checkpoint.path / "model" if checkpoint and config.method == "sft" else None
    model, tokenizer = prepare_model(config, place, saved_model)
    parameters = trainable_parameters(model)
    data = load_data(config, tokenizer, model.config.is_encoder_decoder)
    if not data.train.items:
        raise EmptyTargetError(
            f"no record is left to train on: the split holds out all {len(data.evaluation.items)}. "
            "Fix: more distinct records, or --dataset.eval_fraction 0"
        )
    check_data(model, tokenizer, data)
    if config.dataset.packing:
        prepare_packing(model, data.train.items, place)
    trainer = Trainer(config, place, model, tokenizer, parameters, data, output)
    describe(config, place, model, parameters, data, trainer.total)
    if checkpoint:
        trainer.resume(checkpoint)
    with writing(output, checkpoint):  # from here on a run leaves something behind
        prepare_output(config, output)
        return _train(trainer)


def _train(trainer: Trainer) -> Result:
    """Make the steps that are left, and close the run."""
    config, output, progress = trainer.config, trainer.output, trainer.progress
    model, tokenizer = trainer.model, trainer.tokenizer
    samples = Samples(config, trainer.data, output)
    with (
        Metrics(output, trainer.total, progress.step, config.run.log_every) as metrics,
        StopSignals() as stop,
    ):
        if progress.step == 0:
            samples.ask(model, tokenizer, "before")
            trainer.evaluate(metrics)
            progress.eval_loss_before = progress.eval_loss
            progress.exact_match_before = progress.exact_match
        while progress.step < trainer.total and stop.signal is None:
            metrics.train(progress.step + 1, trainer.step())
            last = progress.step == trainer.total
            if last or due(progress.step, config.run.eval_every):
                trainer.evaluate(metrics)
            if last or due(progress.step, config.run.save_every):
                trainer.save()
        if stop.signal is not None:
            stop.leave(trainer.save(), progress.step, trainer.total, output)
        samples.ask(model, tokenizer, "after")
    return finish(config, output, model, tokenizer, progress, samples)


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is due after this one."""
    return every > 0 and step % every == 0


def learning_rate(step: int, total: int, peak: float, schedule: ScheduleOptions) -> float:
    """The rate of optimiser step `step` (from 0) of `total`.

    It rises linearly over the first `warmup_fraction` of the steps, reaching `peak` at its last one,
    and then falls along a half cosine or a line to `min_ratio * peak` at the last step.
    """
    warmup = math.ceil(schedule.warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    done = (step - warmup + 1) / max(1, total - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1 - done
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * shape)


@dataclass
class Trainer:
    """Everything that one run trains with; `progress` says how far it has come."""

    config: FinetuneConfig
    place: Place
    model: Any
    tokenizer: Any
    parameters: dict[str, torch.nn.Parameter]
    data: Data
    output: Path

    def __post_init__(self) -> None:
        run = self.config.run
        self.progress = Progress()
        self.lengths = [item.num_tokens for item in self.data.train.items]
        self.step_size = run.batch_size * run.accumulation
        self.total = run.steps or max(
            1, round(run.epochs * math.ceil(len(self.lengths) / self.step_size))
        )
        self.full = self.config.method == "sft"
        self.settings = resume_settings(self.config, self.place, self.data)
        self.optimizer = make_optimizer(self.config, self.model, self.parameters)
        self.model.train()

    def step(self) -> dict[str, float]:
        """One optimiser step over all micro-batches.

        loss = sum of the cross-entropies of all answer tokens / their number, so that accumulation
        gives the gradient of the one large batch, whatever the lengths of the records.

        Returns:
            loss, lr, grad_norm (before clipping), tokens_per_second and seconds.

        Raises:
            NonFiniteError: Before any weight has changed.
        """
        started = time.monotonic()
        done = self.progress.step
        rate = learning_rate(done, self.total, self.config.peak_lr, self.config.schedule)
        indices = step_indices(self.lengths, self.step_size, self.config.run.seed, done)
        items = [self.data.train.items[index] for index in indices]
        num_targets = sum(item.num_targets for item in items)
        loss = 0.0
        for batch in self._batches(items):
            part = self._summed_loss(batch) / num_targets
            if not torch.isfinite(part):
                raise self._non_finite(f"the loss is {float(part.detach())}", batch, rate)
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        if all(parameter.grad is None for parameter in self.parameters.values()):
            raise NoGradientError(
                f"after backward, none of {len(self.parameters)} trainable tensors has a gradient "
                f"(first: {next(iter(self.parameters))}). Fix: check that the forward pass uses them."
            )
        limit = self.config.optimizer.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))
        if not math.isfinite(norm):
            raise self._non_finite(f"the gradient's norm is {norm}", batch, rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens, seconds = sum(item.num_tokens for item in items), time.monotonic() - started
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.seconds += seconds
        rates = {"tokens_per_second": tokens / seconds, "seconds": seconds}
        return {"loss": loss, "lr": rate, "grad_norm": norm, **rates}

    def _batches(self, items: list[Example]) -> list[Batch]:
        size = self.config.run.batch_size
        pad, device = self.tokenizer.pad_token_id or 0, self.place.device
        parts = [items[i : i + size] for i in range(0, len(items), size)]
        if self.config.dataset.packing:
            capacity = row_capacity(self.model, self.config.dataset.max_length)
            return [collate_packed(part, capacity, pad, device) for part in parts]
        return [collate(part, pad, device) for part in parts]

    def _summed_loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the next token, summed over the answer tokens of the batch, in fp32."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if (
            self.model.config.is_encoder_decoder
        ):  # its decoder has a start token before the first label
            targets = batch["labels"]
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(targets)
        else:
            targets = batch["labels"][:, 1:]
        # The output projection is a third of a small model: run it only where some row has a target.
        columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
        targets = targets[:, columns]
        reduced = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        if reduced:
            inputs["logits_to_keep"] = columns
        # Adapters sit on weights that are bf16 already; full fine-tuning keeps fp32 weights.
        autocast = self.full and self.place.dtype == torch.bfloat16
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=autocast):
            logits = self.model(**inputs, use_cache=False).logits
        if not reduced:
            logits = logits[:, columns]
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def evaluate(self, metrics: Metrics) -> None:
        """Loss per answer token of the held-out records, and how many of some are answered exactly, where
        that is asked for; nothing when there are none."""
        items = sorted(self.data.evaluation.items, key=lambda item: item.num_tokens)
        if not items:
            return
        with evaluating(self.model):
            total = math.fsum(float(self._summed_loss(batch)) for batch in self._batches(items))
        loss, match, run = total / sum(item.num_targets for item in items), None, self.config.run
        if run.predict_with_generate:
            asked = chosen(items, run.max_predict_samples, self.config.dataset.max_length)
            match = exact_match(self.model, self.tokenizer, asked, run.max_new_tokens)
        self.progress.eval_loss, self.progress.exact_match = loss, match
        metrics.evaluation(self.progress.step, loss, match)

    def save(self) -> Path:
        """Write a checkpoint of the last finished step."""
        return ckpt.save(
            self.output / "checkpoints",
            ckpt.training_tensors(self.parameters, self.optimizer, with_parameters=not self.full),
            ckpt.trainer_values(self.progress, self.settings),
            lambda directory: write_weights(
                self.model, self.tokenizer, directory, self.config.method
            ),
            self.config.run.keep_last,
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on exactly where the checkpoint was written."""
        check_length(checkpoint, self.config, self.model)
        ckpt.check_settings(checkpoint, self.settings)
        ckpt.restore(checkpoint, self.parameters, self.optimizer, with_parameters=not self.full)
        self.progress = checkpoint.progress
        say(f"Resumed from {checkpoint.path}: {self.progress.step} of {self.total} steps are done.")

    def _non_finite(self, what: str, batch: Batch, rate: float) -> NonFiniteError:
        """The error, with the first module whose output is not finite; gradients are dropped."""
        self.optimizer.zero_grad()
        found: list[str] = []

        def watch(name: str) -> Any:
            def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
                value = output[0] if isinstance(output, tuple) else output
                if (
                    not found
                    and isinstance(value, torch.Tensor)
                    and not torch.isfinite(value).all()
                ):
                    found.append(f"{name} ({str(value.dtype).removeprefix('torch.')})")

            return hook

        hooks = [
            module.register_forward_hook(watch(name))
            for name, module in self.model.named_modules()
            if name
        ]
        with torch.no_grad():
            self._summed_loss(batch)
        for handle in hooks:
            handle.remove()
        place = (
            f"first non-finite output: {found[0]}"
            if found
            else "all outputs of the forward pass are finite"
        )
        latest = ckpt.read_latest(self.output / "checkpoints")
        return NonFiniteError(
            f"step {self.progress.step + 1}: {what}; {place}. Weights and optimiser are as after step "
            f"{self.progress.step}; last checkpoint: {latest or 'none'}. Fix: a lower --optimizer.lr "
            f"(now {rate:.3g}), or --run.dtype fp32"
        )
