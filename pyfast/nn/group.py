# SPDX-License-Identifier: Apache-2.0
"""Adapted linears that read one input (q, k and v; gate and up), computed together by `lora_group`.

The member that is called first computes all that can be computed with it and keeps the others' outputs;
they return them when they are called with the same tensor in the same state. In any other case a member
computes its own output as if there were no group, so that no model's forward has to know of it; so it does
while outputs of another input wait, since calls that go from input to input would compute all members each;
they wait until every member that they are of was called with another input.
`disband_groups` lets every layer of a model compute its own.

What a member does must follow from its arguments and the calls before it in the same checkpointed
region, since the region is run again: a group never learns from calls that went by.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyfast.nn.adapter_layer import has_hooks
from pyfast.nn.weight import DenseWeight, NF4Weight, weight_of
from pyfast.ops._scratch import raw_stream
from pyfast.ops.lora_group import lora_group

State = tuple[Any, ...]


class Part(NamedTuple):
    """A linear layer that is one LoRA product over a dense or NF4 weight."""

    weight: DenseWeight | NF4Weight
    a: Tensor
    b: Tensor
    scale: float
    dropout: float
    drops: bool
    """Whether dropout is on now."""

    def fits(self, other: Part) -> bool:
        """Whether the two can be computed together if they have one input."""
        mine, theirs = self.weight, other.weight
        if isinstance(mine, NF4Weight) and isinstance(theirs, NF4Weight):
            alike = (mine.blocksize, mine.compute_dtype) == (theirs.blocksize, theirs.compute_dtype)
        else:
            alike = type(mine) is type(theirs) and mine.dtype is theirs.dtype
        return (
            alike
            and mine.in_features == theirs.in_features
            and mine.device == theirs.device
            and self.scale == other.scale
        )

    @property
    def tensor(self) -> Tensor:
        """The dense weight, or the NF4 one's bytes."""
        weight = self.weight
        return weight.packed if isinstance(weight, NF4Weight) else weight.tensor

    def scales(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """An NF4 weight's, as `lora_group` takes them."""
        weight = self.weight
        if not isinstance(weight, NF4Weight):
            return None
        return weight.absmax, weight.nested_absmax, weight.nested_offset

    def state(self) -> State:
        """What changes if what the output depends on is changed or replaced."""
        weight, a, b, bias, scales = self.tensor, self.a, self.b, self.weight.bias, self.scales()
        return (
            self.scale, self.drops,
            weight.data_ptr(), weight._version, weight.requires_grad,
            a.data_ptr(), a._version, a.requires_grad,
            b.data_ptr(), b._version, b.requires_grad,
            None if bias is None else (bias.data_ptr(), bias._version, bias.requires_grad),
            None if scales is None else [
                None if part is None else (part.data_ptr(), part._version) for part in scales
            ],
        )  # fmt: skip


def part_of(
    layer: nn.Module,
    base: nn.Module,
    a: nn.Module,
    b: nn.Module,
    scale: float,
    dropout: float,
    drops: bool,
) -> Part | None:
    """A layer's part; None where hooks watch it or its modules, where its weight is NF4 on the CPU (there
    each is decoded in parts), and where one of its weights is no parameter but made anew for each use."""
    if has_hooks(layer) or has_hooks(base) or has_hooks(a) or has_hooks(b):
        return None
    weight, a_rk, b_nr = weight_of(base), a._parameters.get("weight"), b._parameters.get("weight")
    if a_rk is None or b_nr is None:
        return None
    if isinstance(weight, NF4Weight):
        tensor, served = weight.packed, weight.packed.is_cuda
    elif isinstance(weight, DenseWeight):
        tensor, served = weight.tensor, "weight" in base._parameters
    else:
        return None
    # Changes to tensors made in inference mode would go unnoticed.
    if not served or tensor.is_inference():
        return None
    if a_rk.is_inference() or b_nr.is_inference():
        return None
    return Part(weight, a_rk, b_nr, scale, dropout, drops)


class GroupMember:
    """Mixed in front of a layer's class, whose forward asks `live_group` first."""

    input_group: InputGroup | None = None
    input_name = ""
    """What the group calls this layer."""

    def frozen_layer(self) -> nn.Module:
        """The layer inside that holds the weight."""
        raise NotImplementedError

    def lora_part(self) -> Part | None:
        """This layer as it is now; None if it is anything but one LoRA product."""
        raise NotImplementedError

    def live_group(self) -> InputGroup | None:
        """The group, which may have this layer's output; a compiled graph has none."""
        return None if torch.compiler.is_compiling() else self.input_group

    def company(self) -> dict[str, Part]:
        """The members that are computed together with this one while dropout is off, it among them; empty if
        there are no others."""
        return {} if self.input_group is None else self.input_group.together(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self.input_group is not None:
            self.input_group.seat(self.input_name, self)

    def extra_repr(self) -> str:
        """What the layer says of itself, and the names of those that it is computed with."""
        own: str = super().extra_repr()  # type: ignore[misc]
        parts = self.company()
        return ", ".join(filter(None, [own, f"group={'+'.join(parts)}" if parts else ""]))


class InputGroup:
    """The members by name, held weakly, and the outputs that they have yet to take.

    A copy is empty; the copies of the members take their seats in it as they are made.
    """

    def __init__(self) -> None:
        self._seats: dict[str, weakref.ref[GroupMember]] = {}
        self._kept: _Kept | None = None

    def __reduce__(self) -> Any:
        return InputGroup, ()

    def _at(self, name: str) -> GroupMember | None:
        found = self._seats.get(name)
        return None if found is None else found()

    def seat(self, name: str, member: GroupMember) -> None:
        """Let a layer be a member, unless another one has the seat: a shallow copy's original."""
        if self._at(name) is None:
            self._seats[name] = weakref.ref(member)

    def together(self, member: GroupMember) -> dict[str, Part]:
        """See `GroupMember.company`."""
        mine = member.lora_part() if self._at(member.input_name) is member else None
        return {} if mine is None else self._together(member, mine)

    def _together(self, member: GroupMember, mine: Part) -> dict[str, Part]:
        found = {}
        for name in self._seats:
            other = self._at(name)
            part = mine if other is member else other.lora_part() if other is not None else None
            if part is not None and mine.fits(part):
                found[name] = part
        return found if len(found) > 1 else {}

    def output(self, member: GroupMember, x: Tensor, mine: Part | None) -> Tensor | None:
        """A member's output for x, kept for it or computed with the others'; None if it has to compute its
        own. `mine` is its part."""
        name = member.input_name
        if self._at(name) is not member:  # a replica that shares the original's attributes
            return None
        now, kept = _state(x), self._kept
        if kept is not None:
            same = kept.input() is x and kept.state == now
            if not same and kept.awaited_beside(x):
                kept.passed.add(name)
                if kept.passed >= kept.outputs.keys():  # nobody came back to its input
                    self._kept = None
                return None
            found = kept.outputs.pop(name, None) if same else None
            if not same or not kept.outputs:
                self._kept = None
            if found is not None and mine is not None and mine.state() == found.made_from:
                return found.taken()
        if now is None or mine is None or mine.drops:
            return None
        parts = {n: p for n, p in self._together(member, mine).items() if not p.drops}
        if len(parts) < 2:
            return None
        self._kept = None  # its memory is free for what follows
        outputs = dict(zip(parts, _compute(x, list(parts.values())), strict=True))
        node = next((each.node for each in outputs.values() if each.node is not None), None)
        if node is not None:
            node.count = 0
        own = outputs.pop(name)
        self._kept = made = _Kept(x, now, outputs, node)
        _recent.add(made)  # another thread may have taken it from the group
        return own.taken()


class _Output(NamedTuple):
    """What a member's call returns."""

    y: Tensor
    node: Any
    """The group's in the graph, which that of a cast may follow; None if y has no derivative."""
    made_from: State
    """That of the part."""

    def taken(self) -> Tensor:
        """Let the group's node await this derivative too before it frees what it saved."""
        if self.node is not None:
            self.node.count += 1
        return self.y


def _compute(x: Tensor, parts: list[Part]) -> list[_Output]:
    weight, inner = parts[0].weight, x
    nf4: dict[str, Any] = {}
    if isinstance(weight, NF4Weight):
        inner = x.to(weight.compute_dtype or x.dtype)
        nf4 = {"nf4": [part.scales() for part in parts], "blocksize": weight.blocksize}
    ys = lora_group(
        inner,
        [part.tensor for part in parts],
        [part.a for part in parts],
        [part.b for part in parts],
        scales=[part.scale for part in parts],
        biases=[part.weight.bias for part in parts],
        **nf4,
    )
    restored = isinstance(weight, NF4Weight) and weight.compute_dtype is not None
    return [
        _Output(y.to(x.dtype) if restored else y, y.grad_fn, part.state())
        for y, part in zip(ys, parts, strict=True)
    ]


def _state(x: Tensor) -> State | None:
    """What outputs depend on besides the members, and what must not change until they are taken; None where
    nothing is kept: changes to x cannot be noticed, or hooks, a trace or a transform of torch.func have to
    see each member's call."""
    kind = x.device.type if type(x) in (Tensor, nn.Parameter) else ""
    if (
        kind not in ("cpu", "cuda")
        or x.is_inference()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    ):
        return None
    return (
        x._version,
        x.data_ptr(),  # `x.data = other` leaves the version
        x.requires_grad,
        x.is_leaf,  # so does detach_
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),  # what is made there can have no gradient later
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        # A checkpointed region has its own: what is saved inside must not serve outside of it.
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        raw_stream(x.device.index) if kind == "cuda" else None,
    )


class _Kept:
    """Outputs that wait for their members: until one is called in another state, or all with another input,
    until the backward through them, the end of x, or the calls of two other groups."""

    def __init__(
        self,
        x: Tensor,
        state: State,
        outputs: dict[str, _Output],
        node: Any,
    ) -> None:
        self.state: State | None = state
        self.outputs = outputs
        self.passed: set[str] = set()  # members that were called with another input meanwhile
        forget = partial(_forget, weakref.ref(self))
        self.input = weakref.ref(x, forget)
        if node is not None:
            node.register_prehook(forget)

    def awaited_beside(self, x: Tensor) -> bool:
        """Whether these are of another input than x, and could be taken right now."""
        mine = self.input()
        return mine is not None and mine is not x and self.state == _state(mine)

    def drop(self) -> None:
        """Let nobody take what is left."""
        self.outputs.clear()
        self.state = None  # of a checkpointed region it holds the inputs


def _forget(kept: weakref.ref[_Kept], *_: Any) -> None:
    found = kept()
    if found is not None:
        found.drop()


_DEAD: weakref.ref[Any] = weakref.ref(set())


class _Recent(threading.local):
    """What a thread's groups kept last, weakly: of two groups at most outputs wait, so that two models may
    take turns. Those of a forward that died between two members wait for nobody, and x, held by their own
    graph, cannot end before they do."""

    older = newer = _DEAD

    def add(self, kept: _Kept) -> None:
        """Drop the older one's for a new one's."""
        _forget(self.older)
        self.older, self.newer = self.newer, weakref.ref(kept)


_recent = _Recent()


def _can_be_part(member: GroupMember) -> bool:
    return isinstance(weight_of(member.frozen_layer()), DenseWeight | NF4Weight)


def disband_groups(model: nn.Module) -> None:
    """Let each layer of a model compute its own output, until `apply` or `accelerate` make groups again.

    A group costs time and memory where not all of its members are called with an input: their outputs are
    computed nevertheless, and kept until the backward or the end of the input.
    """
    for module in model.modules():
        if isinstance(module, GroupMember):
            module.input_group, module.input_name = None, ""


def form_groups(candidates: Iterable[Mapping[str, nn.Module]]) -> None:
    """Make groups of the layers over dense and NF4 weights among modules that read one input, given by name.

    A layer that is found twice, since it serves in several places, stays alone with its company.
    """
    found = [
        {name: m for name, m in each.items() if isinstance(m, GroupMember) and _can_be_part(m)}
        for each in candidates
    ]
    uses = Counter(id(member) for members in found for member in members.values())
    for members in found:
        if len(members) > 1 and all(uses[id(member)] == 1 for member in members.values()):
            group = InputGroup()
            for name, member in members.items():
                member.input_group, member.input_name = group, name
                group.seat(name, member)
