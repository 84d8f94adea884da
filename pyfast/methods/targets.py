# SPDX-License-Identifier: Apache-2.0
"""Which modules a config names, by PEFT's rules, and strictly: a name that matches nothing is an error."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping

import regex
from torch import nn

from pyfast.errors import TargetModuleError, UnsafeFileError
from pyfast.families import family_of
from pyfast.nn import AdapterLayer, SavedModule, weight_of

ALL_LINEAR = "all-linear"
_PATTERN_SECONDS = 1.0


def full_match(pattern: str, text: str) -> bool:
    """Whether a regular expression matches the whole text; a pattern may come from an untrusted file.

    Raises:
        TargetModuleError: the pattern is not a regular expression.
        UnsafeFileError: matching takes longer than a second (catastrophic backtracking).
    """
    try:
        return regex.fullmatch(pattern, text, timeout=_PATTERN_SECONDS) is not None
    except regex.error as error:
        raise TargetModuleError(f"{pattern!r} is not a regular expression: {error}") from None
    except TimeoutError:
        raise UnsafeFileError(
            f"the pattern {pattern!r} takes more than {_PATTERN_SECONDS:g} s on one module name; "
            "use a list of names"
        ) from None


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path to base module of every linear layer that can carry an adapter; adapted ones by their path."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, AdapterLayer):
            found[path] = module.base_layer
            inside.append(path + ".")
        elif isinstance(module, SavedModule):
            inside.append(path + ".")
        elif weight_of(module) is not None:
            found[path] = module
    return found


def output_layers(model: nn.Module) -> set[str]:
    """Paths of the output embedding (lm_head), which "all-linear" and `quantize` leave alone."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None:
        return set()
    return {path for path, module in model.named_modules() if module is head}


def _named(names: Iterable[str], path: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def match_targets(
    model: nn.Module,
    targets: str | Iterable[str] | None,
    *,
    exclude: str | Iterable[str] | None = None,
    layers: int | Iterable[int] | None = None,
    layers_pattern: str | Iterable[str] | None = None,
    allow_unmatched: bool = False,
) -> list[str]:
    """Paths of the linear modules that `target_modules` names, in the model's order.

    Args:
        model: any module tree.
        targets: "all-linear", a regular expression for the whole path, or names that end a path; None
            means the family's default.
        exclude: same forms; removed from the result.
        layers: keep only these layer indices.
        layers_pattern: name of the list of layers, where the first number in the path is not the index.
        allow_unmatched: let single names match nothing.

    Raises:
        TargetModuleError: a name, or the whole, matches no linear module.
    """
    linears = linear_modules(model)
    model_name = type(model).__name__
    if targets is None:
        family = family_of(getattr(getattr(model, "config", None), "model_type", None))
        if family is None:
            raise TargetModuleError(
                f"{model_name} has no default targets; set target_modules, for example "
                f"target_modules={ALL_LINEAR!r}. Nothing was changed"
            )
        targets = family.lora_targets
    if targets == ALL_LINEAR:
        heads = output_layers(model)
        matched = [path for path in linears if path not in heads]
    elif isinstance(targets, str):
        matched = [path for path in linears if full_match(targets, path)]
    else:
        names = list(targets)
        matched = [path for path in linears if _named(names, path)]
        missed = [name for name in names if not any(_named([name], path) for path in linears)]
        if missed and not allow_unmatched:
            raise TargetModuleError(
                _missed_text("target_modules", missed, names, linears, model_name)
            )
    matched = _filtered(matched, exclude, layers, layers_pattern)
    if not matched:
        raise TargetModuleError(
            f"target_modules={targets!r} matches no linear module of {model_name} "
            f"({len(linears)} linear modules, for example {next(iter(linears), 'none')!r}). "
            "Nothing was changed"
        )
    return matched


def _filtered(
    matched: list[str],
    exclude: str | Iterable[str] | None,
    layers: int | Iterable[int] | None,
    layers_pattern: str | Iterable[str] | None,
) -> list[str]:
    if isinstance(exclude, str):
        hit = [path for path in matched if full_match(exclude, path)]
    else:
        names = list(exclude or ())
        hit = [path for path in matched if _named(names, path)]
        missed = [name for name in names if not any(_named([name], path) for path in matched)]
        if missed:
            raise TargetModuleError(
                f"exclude_modules: {missed} excludes no target. Nothing was changed"
            )
    if exclude and not hit:
        raise TargetModuleError(
            f"exclude_modules={exclude!r} excludes no target. Nothing was changed"
        )
    kept = [path for path in matched if path not in set(hit)]
    if layers is None:
        return kept
    wanted = {layers} if isinstance(layers, int) else set(layers)
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or ())
    return [path for path in kept if layer_index(path, patterns) in wanted]


def layer_index(path: str, patterns: Iterable[str] = ()) -> int | None:
    """Index of the layer a module path lies in: the number after one of the names, or the first number."""
    parts = path.split(".")
    names = list(patterns)
    for before, part in itertools.pairwise(parts):
        if part.isdigit() and (not names or before in names):
            return int(part)
    return None


def match_saved(model: nn.Module, names: Iterable[str] | None, targets: Iterable[str]) -> list[str]:
    """Paths of the modules that `modules_to_save` names.

    Raises:
        TargetModuleError: a name matches no module, or one that also gets an adapter.
    """
    names = list(names or ())
    inside: list[str] = []
    paths = []
    for path, module in model.named_modules():
        if path and not any(path.startswith(prefix) for prefix in inside):
            paths.append(path)
            if isinstance(module, (AdapterLayer, SavedModule)):
                inside.append(path + ".")
    matched = [path for path in paths if _named(names, path)]
    missed = [name for name in names if not any(_named([name], path) for path in paths)]
    if missed:
        known = dict.fromkeys(paths, model)
        raise TargetModuleError(
            _missed_text("modules_to_save", missed, names, known, type(model).__name__)
        )
    both = sorted(set(matched) & set(targets))
    if both:
        raise TargetModuleError(
            f"modules_to_save and target_modules both name {both[0]!r}; keep it in one of them. "
            "Nothing was changed"
        )
    return matched


def pattern_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """Value for a module path from `rank_pattern` or `alpha_pattern`: the first key that ends the path."""
    for key, value in patterns.items():
        if full_match(rf"(.*\.)?({key})", path):
            return value
    return default


def check_patterns(field: str, patterns: Mapping[str, float], paths: Iterable[str]) -> None:
    """Raise TargetModuleError if a key of a pattern dict matches none of the target paths."""
    paths = list(paths)
    for key in patterns:
        if not any(full_match(rf"(.*\.)?({key})", path) for path in paths):
            raise TargetModuleError(
                f"{field}: {key!r} matches none of the {len(paths)} target modules. Nothing was changed"
            )


def _missed_text(
    field: str, missed: list[str], names: list[str], paths: Mapping[str, object], model: str
) -> str:
    lasts = sorted({part for path in paths for part in path.split(".") if not part.isdigit()})
    counts = {name: sum(_named([name], path) for path in paths) for name in names}
    text = f"{field}: {missed[0]!r} matches no module of {model}"
    hits = ", ".join(f"{name!r} matched {count}" for name, count in counts.items() if count)
    text += f" ({len(missed)} of {len(names)} names" + (f"; {hits})" if hits else ")")
    close = difflib.get_close_matches(missed[0], lasts, n=1, cutoff=0.5)
    if close:
        fixed = [close[0] if name == missed[0] else name for name in names]
        text += f". Closest: {close[0]!r}. Nothing was changed. Fix: {field}={fixed}"
    else:
        text += f". Nothing was changed. Names it has: {lasts[:12]}"
    if field == "target_modules":
        text += ", or allow_unmatched=True"
    return text
