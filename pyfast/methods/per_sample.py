# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one batch: each sample has its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from pyfast.errors import AdapterStateError, ConfigError, UnsupportedError
from pyfast.methods.base import adapted_modules, as_names, public_path, unwrapped
from pyfast.methods.of_peft import refuse_peft
from pyfast.methods.residual import refuse_residual
from pyfast.methods.state import known_adapter, refuse_busy
from pyfast.nn import SavedModule, Switchable
from pyfast.nn.embedding import LoraEmbedding
from pyfast.nn.per_sample import BASE, Samples


@contextlib.contextmanager
def adapters_per_sample(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Give each sample of the batches inside the block the adapter that is named for it.

    Which adapters are active has no meaning in the block. In `generate` the names are those of the prompts,
    for beams and several returned sequences too. Gradients reach each adapter from its own samples, if it is
    trainable (`set_adapter(model, ["a", "b"])`); where activations are checkpointed, the backward belongs
    into the block as well, since it runs the forward again.

    Args:
        model: a model with adapters: LoRA of linears (dense or NF4, with DoRA too) and embeddings, IA3 of
            linears, bottlenecks, and what is trained whole beside them.
        names: one adapter for each sample, in order; "__base__" stands for none.

    Raises:
        AdapterStateError: an unknown name; adapters are merged, disabled or PEFT's; or a block is around
            this one.
        ConfigError: no names. In the block, when a model is called: other than one name for each sample.
        UnsupportedError: an adapter is of another kind: virtual tokens, or of experts; or one began with
            PiSSA, without which other samples have no base.
    """
    refuse_peft(model, "adapters_per_sample")
    wanted = as_names("adapters_per_sample: names", names)
    holders = adapted_modules(model)
    if not wanted:
        raise ConfigError("adapters_per_sample: names is empty; give one name for each sample")
    if not holders:
        raise AdapterStateError(
            f"adapters_per_sample: {type(model).__name__} has no adapters; apply or load one first"
        )
    for name in dict.fromkeys(wanted):
        if name != BASE:
            known_adapter(model, name)
    for name in dict.fromkeys(wanted):
        refuse_residual(model, "adapters_per_sample", [name])
    refuse_busy(model, "adapters_per_sample")
    taking = []
    for path, module in holders.items():
        held = [n for n in module.adapter_names() if n in wanted or n in module.active]
        if held:
            _check_kind(model, path, module, held[0])
            taking.append(module)
    samples = Samples(wanted)
    with contextlib.ExitStack() as stack:
        for module in taking:
            module.take(samples)
            stack.callback(module.release)
        yield


def _check_kind(model: nn.Module, path: str, holder: Switchable, name: str) -> None:
    """Raise UnsupportedError where a holder of an adapter cannot tell samples apart."""
    fix = "leave it out of the names and, with set_adapter, of the active adapters"
    if not holder.by_sample:
        raise UnsupportedError(
            f"adapters_per_sample: adapter {name!r} has a {type(holder).__name__} at "
            f"{public_path(model, path)!r}, which serves whole batches only; {fix}"
        )
    if not _reads_samples(model, holder):
        raise UnsupportedError(
            f"adapters_per_sample: adapter {name!r} adapts the embedding {public_path(model, path)!r}, which "
            f"is none of tokens, so that its rows are no samples; {fix}"
        )


def _reads_samples(model: nn.Module, holder: Switchable) -> bool:
    """Whether what a holder reads has a row for each sample, which positions, for one, have not."""
    held = holder.original_module if isinstance(holder, SavedModule) else holder
    if not isinstance(held, (nn.Embedding, LoraEmbedding)):
        return True
    parts: list[Any] = [m for m in unwrapped(model).modules() if hasattr(m, "get_input_embeddings")]
    return not parts or any(part.get_input_embeddings() is holder for part in parts)


@contextlib.contextmanager
def samples_copied(model: nn.Module, prompts: int, copies: int) -> Iterator[None]:
    """Let batches have this many copies of each prompt's sample, one after the other, inside the block.

    Raises:
        ConfigError: samples have adapters of their own, and there are other than these prompts.
    """
    found = {module.samples for module in adapted_modules(model).values() if module.samples}
    for samples in found:
        samples.check(prompts, 1)
    before = [(samples, samples.copies) for samples in found]
    for samples in found:
        samples.copies = copies
    try:
        yield
    finally:
        for samples, former in before:
            samples.copies = former
