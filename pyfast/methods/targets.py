# SPDX-License-Identifier: Apache-2.0
"""Which modules a config names, by PEFT's rules, and strictly: a name that matches nothing is an error."""

from __future__ import annotations

import difflib
import itertools
import time
from collections.abc import Iterable, Mapping

import regex
from torch import Tensor, nn

from pyfast.errors import (
    AdapterStateError,
    ConfigError,
    TargetModuleError,
    UnsafeFileError,
    UnsupportedError,
)
from pyfast.families import automatic, family_of
from pyfast.methods.base import as_names, check_model
from pyfast.methods.of_peft import is_peft_layer
from pyfast.nn import DENSE_DTYPES, AdapterLayer, SavedModule, Switchable, Weight, weight_of
from pyfast.nn.expert_lora import NOT_LINEAR

ALL_LINEAR = "all-linear"
_PATTERN_SECONDS = 1.0
# Heads of transformers' classifiers, which have no output embedding (PEFT spares them by these names too).
_CLASSIFIER_HEADS = ("score", "classifier")


class Matcher:
    """Regular expressions that may come from an untrusted file: one second for all questions together."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + _PATTERN_SECONDS

    def full(self, pattern: str, text: str) -> bool:
        """Whether the pattern matches the whole text.

        Raises:
            TargetModuleError: the pattern is not a regular expression.
            UnsafeFileError: the time is up (catastrophic backtracking, or very many patterns).
        """
        try:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            return regex.fullmatch(pattern, text, timeout=left) is not None
        except (regex.error, RecursionError, OverflowError) as error:
            raise TargetModuleError(
                f"{_short(pattern)} is not a regular expression: {error}. Nothing was changed"
            ) from None
        except TimeoutError:
            raise UnsafeFileError(
                f"the pattern {_short(pattern)} takes more than {_PATTERN_SECONDS:g} s to match; use a "
                "list of names. Nothing was changed"
            ) from None

    def ending(self, pattern: str, path: str) -> bool:
        """Whether the pattern matches the whole path or an end of it that starts at a dot."""
        return self.full(rf"(.*\.)?({pattern})", path)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path to base module of every linear layer; adapted ones by their path, shared ones by the first.

    Those of 8-bit floats are there too, so that `served_weight` refuses them where they are asked for.

    Raises:
        AdapterStateError: the model carries PEFT's adapters, whose own linears must not be mistaken.
    """
    check_model(model)
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in inside):
            continue
        if is_peft_layer(module):
            raise AdapterStateError(
                f"{path!r} carries an adapter of PEFT; serve it as it is with pyfast.accelerate(model), or "
                "take PEFT's adapters off first. Nothing was changed"
            )
        start = f"{path}." if path else ""
        if isinstance(module, AdapterLayer) and not isinstance(module, NOT_LINEAR):
            found[path] = module.frozen
            inside.append(start)
        elif isinstance(module, Switchable):
            inside.append(start)
        elif unread := _read_by_owner(module):
            inside += [start + name for name in unread]
        elif path and (weight_of(module) is not None or _float8(module)):
            found[path] = module
    return found


def _read_by_owner(module: nn.Module) -> tuple[str, ...]:
    """Names inside one of torch's own modules that reads weights and does not call the layers that hold
    them: its attention does so with all of its output layer, its encoder layer outside of training."""
    if isinstance(module, nn.MultiheadAttention):
        return ("",)
    plain = type(module).forward is nn.TransformerEncoderLayer.forward
    return ("linear1", "linear2") if plain else ()


def _float8(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return False
    return weight.is_floating_point() and weight.itemsize == 1


def served_weight(path: str, module: nn.Module) -> Weight:
    """The weight of a module that `linear_modules` found.

    Raises:
        UnsupportedError: its dtype is not served.
    """
    weight = weight_of(module)
    if weight is None:
        raise UnsupportedError(
            f"{path!r} is a {type(module).__name__} with a {module.weight.dtype} weight, which is not "
            "served; load the model in torch.bfloat16 or in 4 bits. Nothing was changed"
        )
    return weight


def output_layers(model: nn.Module) -> set[str]:
    """Paths of the output embedding (lm_head) or classifier, which "all-linear" and `quantize` spare."""
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return set()
    head = get()
    heads = [head] if head is not None else [getattr(model, n, None) for n in _CLASSIFIER_HEADS]
    return {p for p, module in model.named_modules() if any(module is head for head in heads)}


def kept_dense(model: nn.Module) -> set[str]:
    """Paths of what `quantize` spares: the output layers, and what transformers keeps in float32 and its own
    4-bit loader leaves dense (T5's `wo`, to whose weight's dtype the model casts activations)."""
    names = getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = {path for path, _ in model.named_modules() if named(names, path)}
    return kept | output_layers(model)


def named(names: Iterable[str], path: str) -> bool:
    """Whether one of the names is the path or ends it after a dot."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def match_targets(
    model: nn.Module,
    targets: str | Iterable[str] | None,
    *,
    exclude: str | Iterable[str] | None = None,
    layers: int | Iterable[int] | None = None,
    layers_pattern: str | Iterable[str] | None = None,
    saved: Iterable[str] = (),
    others: Mapping[str, nn.Module] | None = None,
    allow_unmatched: bool = False,
) -> list[str]:
    """Paths of the linear modules, and of `others`, that `target_modules` names.

    Args:
        model: any module tree.
        targets: "all-linear", a regular expression for the whole path, or names that end a path; None
            means the family's default.
        exclude: same forms; removed from the result.
        layers: keep only these layer indices.
        layers_pattern: name of the list of layers, where the first number in the path is not the index.
        saved: paths of modules trained whole; what lies inside gets no adapter.
        others: path to module of what else a method adapts where it is named, which "all-linear" is not.
        allow_unmatched: let single names match nothing.

    Raises:
        TargetModuleError: a name, or the whole, matches no linear module.
    """
    linears = linear_modules(model)
    model_name = type(model).__name__
    if targets is None:
        family = family_of(getattr(getattr(model, "config", None), "model_type", None))
        targets = (family or automatic(model)).lora_targets
    known = {**linears, **(others or {})}
    if targets == ALL_LINEAR:
        heads = output_layers(model)
        matched = [path for path in linears if path not in heads]
    elif isinstance(targets, str):
        matcher = Matcher()
        matched = [path for path in known if matcher.full(targets, path)]
    else:
        names = as_names("target_modules", targets)
        matched = [path for path in known if named(names, path)]
        missed = [name for name in names if not any(named([name], path) for path in known)]
        if missed and not allow_unmatched:
            _refuse_other_kinds(model, missed[0], known)
            raise TargetModuleError(
                _missed_text("target_modules", missed, names, known, model_name)
            )
        both = sorted(set(saved) & set(matched))
        if both and not allow_unmatched:
            raise TargetModuleError(
                f"modules_to_save and target_modules both name {both[0]!r}; keep it in one of them. "
                "Nothing was changed"
            )
    whole = [f"{path}." for path in saved]
    matched = [path for path in matched if not any(f"{path}.".startswith(p) for p in whole)]
    matched = _filtered(matched, exclude, allow_unmatched)
    if layers is not None:
        matched = _in_layers(matched, known, layers, layers_pattern, allow_unmatched)
    if not matched:
        raise TargetModuleError(
            f"target_modules={_short(targets)} matches no linear module of {model_name} "
            f"({len(linears)} linear modules, for example {next(iter(linears), 'none')!r}). "
            "Nothing was changed"
        )
    return matched


def _refuse_other_kinds(model: nn.Module, name: str, known: Mapping[str, nn.Module]) -> None:
    """Say so if a target exists but cannot carry an adapter, or is a second name of one that can."""
    for path, module in model.named_modules(remove_duplicate=False):
        if path and named([name], path):
            for first, other in known.items():
                if other is module:
                    raise TargetModuleError(
                        f"target_modules: {name!r} names {path!r}, which is the same module as {first!r}; "
                        "use that name, it adapts both. Nothing was changed"
                    )
            outer, _, last = path.rpartition(".")
            owner = model.get_submodule(outer)
            if last.startswith(_read_by_owner(owner)):
                raise UnsupportedError(
                    f"target_modules: {name!r} names {path!r}, whose weight torch's {type(owner).__name__} "
                    "reads without calling the layer, so that an adapter there would be ignored; leave it "
                    "out. Nothing was changed"
                )
            raise UnsupportedError(
                f"target_modules: {name!r} names {path!r}, a {type(module).__name__}; only linear layers "
                "(dense or 4-bit) can carry an adapter, and LoRA's embeddings and experts. Nothing was "
                "changed"
            )


def _filtered(
    matched: list[str], exclude: str | Iterable[str] | None, allow_unmatched: bool
) -> list[str]:
    if not exclude:
        return matched
    if isinstance(exclude, str):
        matcher = Matcher()
        hit = {path for path in matched if matcher.full(exclude, path)}
        missed = [] if hit else [exclude]
    else:
        names = as_names("exclude_modules", exclude)
        hit = {path for path in matched if named(names, path)}
        missed = [name for name in names if not any(named([name], path) for path in matched)]
    if missed and not allow_unmatched:
        raise TargetModuleError(
            f"exclude_modules: {_short(missed[0])} excludes no target. Nothing was changed"
        )
    return [path for path in matched if path not in hit]


def _in_layers(
    kept: list[str],
    linears: Iterable[str],
    layers: int | Iterable[int],
    layers_pattern: str | Iterable[str] | None,
    allow_unmatched: bool,
) -> list[str]:
    wanted = [layers] if not isinstance(layers, Iterable) else list(layers)
    if not all(type(index) is int for index in wanted):
        raise ConfigError(
            f"layers_to_transform={layers!r} must be a layer index or a list of them. "
            "Nothing was changed"
        )
    patterns = as_names("layers_pattern", layers_pattern or ())
    indices = (layer_index(path, patterns) for path in linears)
    known = sorted({index for index in indices if index is not None})
    missed = [index for index in wanted if index not in known]
    if missed and not allow_unmatched:
        there = f"layers {known[0]} to {known[-1]}" if known else "no numbered layers"
        raise TargetModuleError(
            f"layers_to_transform: there is no layer {missed[0]}; the model has {there}. "
            "Nothing was changed"
        )
    return [path for path in kept if layer_index(path, patterns) in wanted]


def layer_index(path: str, patterns: Iterable[str] = ()) -> int | None:
    """Index of the layer a module path lies in: the number after one of the names, or the first number."""
    parts = path.split(".")
    names = list(patterns)
    for before, part in itertools.pairwise(parts):
        if part.isdigit() and (not names or before in names):
            return int(part)
    return None


def match_saved(
    model: nn.Module, names: Iterable[str] | None, *, allow_unmatched: bool = False
) -> list[str]:
    """Paths of the modules that `modules_to_save` names, by PEFT's rule that a name may be any end of a
    path ("norm" also means "input_layernorm"); of nested ones the outermost.

    Raises:
        TargetModuleError: a name matches no module.
        UnsupportedError: it matches a module that carries adapters, or one with quantised weights.
    """
    check_model(model)
    names = as_names("modules_to_save", names or ())
    inside: list[str] = []
    paths = []
    for path, module in model.named_modules():
        if path and not any(path.startswith(prefix) for prefix in inside):
            paths.append(path)
            if isinstance(module, Switchable):
                inside.append(path + ".")
    matched: list[str] = []
    for path in paths:
        inner = any(path.startswith(f"{outer}.") for outer in matched)
        if path.endswith(tuple(names)) and not inner:
            matched.append(path)
    missed = [name for name in names if not any(path.endswith(name) for path in paths)]
    if missed and not allow_unmatched:
        known = dict.fromkeys(paths, model)
        raise TargetModuleError(
            _missed_text("modules_to_save", missed, names, known, type(model).__name__)
        )
    for path in matched:
        module = model.get_submodule(path)
        original = module.original_module if isinstance(module, SavedModule) else module
        if any(isinstance(inner, Switchable) for inner in original.modules()):
            raise UnsupportedError(
                f"modules_to_save: {path!r} carries adapters already; a module cannot be trained whole "
                "beside them. Nothing was changed"
            )
        if any(p.dtype not in DENSE_DTYPES for p in original.parameters()):
            raise UnsupportedError(
                f"modules_to_save: {path!r} holds quantised weights, which cannot be trained. "
                "Nothing was changed"
            )
    return matched


def pattern_values(
    field: str,
    patterns: Mapping[str, float],
    paths: Iterable[str],
    default: float,
    *,
    allow_unmatched: bool = False,
) -> dict[str, float]:
    """Value for every path from `rank_pattern` or `alpha_pattern`: the first key that ends the path.

    Raises:
        TargetModuleError: a key matches none of the paths.
    """
    paths, matcher = list(paths), Matcher()
    values = dict.fromkeys(paths, default)
    free = set(paths)
    for key, value in patterns.items():
        hit = [path for path in paths if matcher.ending(key, path)]
        for path in free.intersection(hit):
            values[path] = value
        free.difference_update(hit)
        if not hit and not allow_unmatched:
            raise TargetModuleError(
                f"{field}: {key!r} matches none of the {len(paths)} target modules. Nothing was changed"
            )
    return values


def _missed_text(
    field: str, missed: list[str], names: list[str], paths: Mapping[str, object], model: str
) -> str:
    lasts = sorted({part for path in paths for part in path.split(".") if not part.isdigit()})
    counts = {name: sum(named([name], path) for path in paths) for name in names}
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
