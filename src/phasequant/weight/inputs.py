r"""What stands at the entrances of a block's groups, over all sequences, and its moments.

    block(x), stopped at the last entrance that is wanted  →  rows before they are rounded, of experts each one's own

`target: outputs` also runs a copy of the block whose inputs are not rounded on hidden states that no quantized block
has touched: its rows stand beside the block's, token by token. Memory: one sequence's rows, the groups' moments.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.arch.families import GroupNames
from phasequant.nn import SLOT, QuantLinear, prepared, quant_linears
from phasequant.ranks import Dealt
from phasequant.weight.moments import Moments, shrunk
from phasequant.weight.task import WeightTask


@dataclass
class Seen:
    """Rows at an entrance, and which expert (or experts) each goes to, where there are many."""

    rows: Float[Tensor, "T I"]
    experts: Tensor | None

    def of(self, expert: int | None) -> Float[Tensor, "R I"]:
        """The rows of one expert; all, where there is none."""
        if expert is None:
            return self.rows
        assert self.experts is not None
        return self.rows[(self.experts.reshape(len(self.rows), -1) == expert).any(-1)]


class _Reached(Exception):
    """The input that was waited for has come: the rest of the block need not run."""


def group_inputs(
    block: nn.Module,
    names: Sequence[str],
    hidden: Sequence[Tensor],
    arguments: Mapping[str, Any],
    device: torch.device,
    outputs: list[Tensor] | None = None,
) -> Iterator[dict[str, "Seen"]]:
    """For every sequence, what stands at the entrances `names`, before it is rounded. The block runs only as far as
    needed, or to its end where its `outputs` are wanted."""
    seen: dict[str, Seen] = {}
    hooks = []

    def keep(name: str, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = Seen(prepared(module, args[0].flatten(0, -2).float()), args[1] if len(args) > 1 else None)
            if last:
                raise _Reached

        return hook

    for name in names:
        hooks.append(
            block.get_submodule(name).register_forward_pre_hook(keep(name, name == names[-1] and outputs is None))
        )
    try:
        for row in hidden:
            with torch.no_grad(), suppress(_Reached):
                y = block(row.to(device)[None], **arguments)
                if outputs is not None:
                    outputs.append((y[0] if isinstance(y, tuple) else y)[0].to(row.device))
            yield dict(seen)
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()


def block_outputs(
    block: nn.Module, hidden: Sequence[Tensor], arguments: Mapping[str, Any], device: torch.device
) -> list[Tensor]:
    """What a block gives for every sequence."""
    found = []
    for row in hidden:
        with torch.no_grad():
            y = block(row.to(device)[None], **arguments)
        found.append((y[0] if isinstance(y, tuple) else y)[0].to(row.device))
    return found


def sixteen_bit_twin(block: nn.Module, task: WeightTask) -> nn.Module:
    """A copy of a block that rounds neither its inputs nor its keys and values."""
    twin = copy.deepcopy(block)
    for _, linear in quant_linears(twin):
        linear.input_spec = None
    attention = twin.get_submodule(task.map.family.attention)
    if hasattr(attention, SLOT):
        getattr(attention, SLOT).enabled = False
    return twin


def moments_of(
    task: WeightTask,
    block: nn.Module,
    twin: nn.Module | None,
    groups: Sequence[GroupNames],
    hidden: Sequence[Tensor],
    original: Sequence[Tensor],
    arguments: Mapping[str, Any],
    twins_outputs: list[Tensor] | None,
    dealt: Dealt,
) -> dict[str, Moments]:
    """Moments of some groups' inputs over all sequences, by the first linear of each of their parts; the twin's outputs
    on the way, where they are wanted. Of experts the twin sees nothing: its router may choose others."""
    parts = [part for group in groups for part in task.map.parts(group)]
    found = {
        p.linears[0]: Moments(
            task.map.width_in(p.name), task.device, task.part.hessian, twin is not None and p.expert is None
        )
        for p in parts
    }
    names = [g.input for g in groups]
    ours = group_inputs(block, names, hidden, arguments, task.device)
    theirs: Iterator[dict[str, Seen]] | None = None
    if twin is not None:
        theirs = group_inputs(twin, names, original, arguments, task.device, twins_outputs)
    for seen in ours:
        other = next(theirs) if theirs is not None else None
        for part in parts:
            linear = block.get_submodule(part.linears[0])
            assert isinstance(linear, QuantLinear)
            rounded = None if linear.input_spec is None else linear.rounded
            original_rows = None if other is None or part.expert is not None else other[part.input].rows
            if len(rows := seen[part.input].of(part.expert)):
                found[part.linears[0]].add(rows, rounded, original_rows)
    for one in found.values():
        one.together(dealt)
    for group in groups:
        share([found[part.linears[0]] for part in task.map.parts(group)])
    return found


def share(experts: list[Moments]) -> None:
    """Let the moments of experts that few tokens reached borrow from those of all; less than one row an input channel
    is few."""
    if len(experts) == 1:
        return
    total = sum(one.tokens for one in experts)
    shared = torch.stack([one.hessian for one in experts]).sum(0)
    for one in experts:
        least = len(one.hessian)
        one.borrowed = max(least - one.tokens, 0)
        one.hessian = shrunk(one.hessian, one.tokens, shared, total, least)
