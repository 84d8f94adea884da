# SPDX-License-Identifier: Apache-2.0
"""Where LoRA's adapters go: linear layers, embeddings, and the 3-D parameters of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyfast.errors import AdapterStateError, TargetModuleError, UnsupportedError
from pyfast.families import family_of
from pyfast.methods.base import as_names, refuse_meta
from pyfast.methods.targets import linear_modules, match_targets, named
from pyfast.nn import Attachment, Switchable
from pyfast.nn.adapter_layer import link_of
from pyfast.nn.embedding import LoraEmbedding, is_plain_embedding
from pyfast.nn.expert_lora import LoraExperts
from pyfast.nn.experts import expert_tensors, projections, quantized_experts
from pyfast.nn.weight import forward_replaced

_EXPERTS = "experts"


def embedding_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path to base module of every embedding that can be adapted; adapted ones by their path."""
    return _bases(model, LoraEmbedding, is_plain_embedding)


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The same for modules of experts with 3-D parameters."""
    return _bases(model, LoraExperts, lambda module: bool(projections(module)))


def _bases(
    model: nn.Module,
    adapted: type[LoraEmbedding] | type[LoraExperts],
    can_be: Callable[[nn.Module], bool],
) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, adapted):
            found[path] = module.frozen
        elif path and can_be(module):
            found[path] = module
        if isinstance(module, Switchable):
            inside.append(f"{path}." if path else "")
    return found


@dataclass(frozen=True)
class Places:
    """What one adapter goes to: base modules by path."""

    linears: dict[str, nn.Module]
    embeddings: dict[str, nn.Module]
    experts: dict[str, tuple[nn.Module, list[str]]]
    """Path to a module of experts and the names of its parameters, innermost first."""

    def paths(self) -> list[str]:
        """The paths that patterns of rank and alpha are for."""
        parameters = [
            f"{path}.{name}" for path, (_, names) in self.experts.items() for name in names
        ]
        return [*self.linears, *self.embeddings, *parameters]

    def shapes(self, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """File key to shape for all but linear layers."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path, module in self.embeddings.items():
            rows, width = module.weight.shape  # type: ignore[misc]
            shapes[f"{path}.lora_embedding_A"] = (ranks[path], int(rows))
            shapes[f"{path}.lora_embedding_B"] = (int(width), ranks[path])
        for path, (module, names) in self.experts.items():
            for around, name in enumerate(reversed(names)):
                experts, out, inner = projections(module)[name]
                start = f"{path}.{'base_layer.' * around}"
                total = experts * ranks[f"{path}.{name}"]
                shapes[f"{start}lora_A.weight"] = (total, inner)
                shapes[f"{start}lora_B.weight"] = (out, total)
        return shapes

    def put(
        self, model: nn.Module, add: Callable[[str, LoraEmbedding | LoraExperts], None]
    ) -> dict[nn.Module, nn.Module]:
        """Have `add` put an adapter into the layer at each path that is no linear one; the layers that are
        new, by what they take the place of."""
        wrapped: dict[nn.Module, nn.Module] = {}
        for path, module in self.embeddings.items():
            layer = link_of(model.get_submodule(path), LoraEmbedding)
            if layer is None:
                layer = wrapped[module] = LoraEmbedding(module)
                layer.train(module.training)
            add(path, layer)
        for path, (module, names) in self.experts.items():
            outer = model.get_submodule(path)
            if outer is module:
                for around, name in reversed(list(enumerate(reversed(names)))):
                    outer = LoraExperts(outer, name, around)
                wrapped[module] = outer.train(module.training)
            for each in outer.nest():  # type: ignore[operator]
                add(f"{path}.{each.parameter_name}", each)
        return wrapped


def find_places(model: nn.Module, config: Any, saved: list[str], allow_unmatched: bool) -> Places:
    """Match a `LoraConfig`'s targets.

    Raises:
        TargetModuleError: a name matches nothing, or an embedding that the model never calls.
        UnsupportedError: an embedding or experts with a setting that only linear layers have, or offloaded.
        AdapterStateError: other adapters are on other parameters of the same experts.
    """
    linears, embeddings, experts = (
        find(model) for find in (linear_modules, embedding_modules, expert_modules)
    )
    parameters = _named_parameters(config, experts, saved, allow_unmatched)
    found: list[str] = []
    if config.target_modules or not config.target_parameters:
        alone = config.target_modules == _EXPERTS  # no regular expression that could mean a layer
        found = match_targets(
            model,
            [_EXPERTS] if alone else config.target_modules,
            exclude=config.exclude_modules,
            layers=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
            saved=saved,
            others={**embeddings, **experts},
            allow_unmatched=allow_unmatched,
        )
    names = {
        path: [n for n in projections(m) if path in found or f"{path}.{n}" in parameters]
        for path, m in experts.items()
    }
    places = Places(
        {path: linears[path] for path in found if path in linears},
        {path: embeddings[path] for path in found if path in embeddings},
        {path: (experts[path], chosen) for path, chosen in names.items() if chosen},
    )
    if not places.paths():
        raise TargetModuleError(
            f"target_parameters={config.target_parameters} matches nothing outside of modules_to_save="
            f"{saved} in {type(model).__name__}, and there are no target_modules. Nothing was changed"
        )
    _check_embeddings(model, config, places)
    _check_experts(model, config, places)
    return places


def _named_parameters(
    config: Any, experts: Mapping[str, nn.Module], saved: list[str], allow_unmatched: bool
) -> set[str]:
    """Paths of the parameters of experts that `target_parameters` names."""
    names = as_names("target_parameters", config.target_parameters or ())
    known = [f"{path}.{name}" for path, m in experts.items() for name in projections(m)]
    for name in names:
        if not allow_unmatched and not any(named([name], path) for path in known):
            raise UnsupportedError(
                f"LoraConfig: target_parameters={names}: {name!r} names no 3-D parameter of experts (there "
                f"are {len(known)}, for example {next(iter(known), 'none')!r}); name linear layers in "
                "target_modules. Nothing was changed"
            )
    inside = tuple(f"{path}." for path in saved)
    return {path for path in known if named(names, path) and not path.startswith(inside)}


def _check_embeddings(model: nn.Module, config: Any, places: Places) -> None:
    """Refuse embeddings whose adapter would do nothing, and what they cannot have."""
    family = family_of(getattr(getattr(model, "config", None), "model_type", None))
    for path, module in places.embeddings.items():
        if config.use_dora:
            raise UnsupportedError(
                f"target_modules: {path!r} is an embedding, which use_dora=True does not serve; leave it "
                "out, or give it a second adapter without DoRA. Nothing was changed"
            )
        if family is not None and path in family.uncalled:
            raise TargetModuleError(
                f"target_modules: {path!r} holds the weight of other embeddings and is never called itself, "
                "so that an adapter there would do nothing; name those instead. Nothing was changed"
            )
        if forward_replaced(module):
            refuse_meta("target_modules", [(f"{path}.weight", module.weight)])  # type: ignore[list-item]


def _check_experts(model: nn.Module, config: Any, places: Places) -> None:
    """Refuse what experts cannot have."""
    settings = {
        "use_dora": config.use_dora,
        "lora_dropout": config.lora_dropout,
        "init_lora_weights": config.init_lora_weights not in (True, False, "gaussian"),
    }
    wrong = [name for name, is_set in settings.items() if is_set]
    for path, (module, names) in places.experts.items():
        if wrong:
            raise UnsupportedError(
                f"LoRA on the experts {path!r} does not serve {wrong[0]}={getattr(config, wrong[0])!r} (nor "
                "does PEFT's); leave it at its default, or leave the experts out. Nothing was changed"
            )
        layer = model.get_submodule(path)
        if isinstance(layer, LoraExperts):
            held = [each.parameter_name for each in layer.nest()][::-1]
            if held != names:
                raise AdapterStateError(
                    f"the experts {path!r} have adapters on {held}, and a new one must be on the same "
                    f"(PEFT's too), not on {names}; delete the others first. Nothing was changed"
                )
        if any(isinstance(inner, Attachment) for inner in module.modules()):
            raise UnsupportedError(
                f"the experts {path!r} carry adapters of another method (IA3), beside which LoRA on their "
                "parameters is not served; leave them out of one of the two. Nothing was changed"
            )
        if forward_replaced(module):
            refuse_meta("LoRA", ((f"{path}.{n}", p) for n, p in module.named_parameters()))


def parameter_targets(model: nn.Module, adapter_name: str) -> list[str] | None:
    """Shortest names that select exactly the parameters of experts that hold an adapter; None for none."""
    known, held = [], set()
    for path, module in expert_modules(model).items():
        known += [f"{path}.{name}" for name in projections(module)]
        layer = model.get_submodule(path)
        for each in layer.nest() if isinstance(layer, LoraExperts) else ():
            if adapter_name in each.adapter_names():
                held.add(f"{path}.{each.parameter_name}")
    short = sorted({".".join(path.split(".")[-2:]) for path in held})
    exact = {path for path in known if named(short, path)} == held
    return (short if exact else sorted(held)) or None


def tied(model: nn.Module, embeddings: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """A sentence for every adapted embedding whose weight another module shares."""
    texts = []
    for path, module in embeddings.items():
        others = [
            repr(other.removesuffix(".base_layer"))
            for other, each in model.named_modules()
            if each is not module and module.weight in set(each._parameters.values())
        ]
        if others:
            texts.append(
                f"target_modules: {path!r} shares its weight with {' and '.join(others)}, but an adapter "
                "changes its own layer alone (as PEFT's does without ensure_weight_tying), so that a merge "
                f"unties them. Fix, if they must stay tied: leave {path!r} out"
            )
    return tuple(texts)


def experts_left_out(model: nn.Module, saved: list[str]) -> tuple[str, ...]:
    """A sentence for experts and routers that "all-linear" does not adapt: they are no linear layers."""
    inside, linears = tuple(f"{path}." for path in saved), linear_modules(model)
    experts, routers = [], []
    for path, module in model.named_modules():
        names = [*expert_tensors(module), *quantized_experts(module)]
        if not names or f"{path}.".startswith(inside):
            continue
        experts.append(f"{' and '.join(names)} of {path!r}")
        block = path.rpartition(".")[0]
        for name, child in model.get_submodule(block).named_children():
            weight, at = child._parameters.get("weight"), f"{block}.{name}".lstrip(".")
            if weight is not None and weight.ndim == 2 and at not in linears:
                routers.append(repr(at))
    if not experts:
        return ()
    found = [f"{len(experts)} times experts (first: {experts[0]})"]
    found += [f"{len(routers)} routers (first: {routers[0]})"] if routers else []
    return (
        f"target_modules='all-linear' adapts linear layers alone: {' and '.join(found)} of "
        f"{type(model).__name__} stay as they are. PEFT's 'all-linear' adapts them too in models whose "
        "experts it knows, Mixtral among them. Fix: name the layers in target_modules, which leaves these "
        "out without this warning; target_parameters or 'experts' among the names adapts experts",
    )
