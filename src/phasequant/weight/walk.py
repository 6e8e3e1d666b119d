r"""Codes for every linear, block by block; methods that look at data see what the quantized blocks before produce.

For each block in turn, with the block resident:

    for the groups in the order of computation (sequential; else all at once):
        run the block over all sequences up to the group's input, and add up its moments
        quantize the group's linears, stacked: they read one input, and have one Hessian and one low-rank branch
        (of experts, each expert's on their own; one that few tokens reached borrows from the inputs of all)
    run the block once more: its quantized outputs are the next block's inputs

With `hessian: full` activations and KV stay in 16 bits during the walk; with `rounded` and `mixed` they are rounded as
the plan has them. `target: outputs` walks a second set of hidden states through 16-bit copies, one block at a time.
Memory: one block (two with `outputs`), one group's moments, the hidden states of all sequences on the host.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from phasequant.arch import ModelMap, Place
from phasequant.arch.families import GroupNames
from phasequant.console import progress, warn
from phasequant.nn import SLOT, QuantLinear, in_16_bits, kv_in_16_bits, prepared, quant_linears
from phasequant.numerics import QuantSpec
from phasequant.ranks import Dealt, agreed, world
from phasequant.recipe import LowRankPart, WeightsPart
from phasequant.stream import BlockStream, resident
from phasequant.weight.codes import Told, WeightCodes
from phasequant.weight.gptq import factor, gptq, normalized
from phasequant.weight.kept import KeptCodes
from phasequant.weight.lowrank import Branch, split
from phasequant.weight.moments import Moments, best_weights, shrunk
from phasequant.weight.rtn import round_to_nearest
from phasequant.weight.spread import spread_rows

ROWS_A_CHANNEL = 8  # fewer, and a solve towards outputs fits what is noise

Clips = Mapping[str, Float[Tensor, "O G"]]


@dataclass(frozen=True)
class WeightTask:
    """What a walk is given. `others`: grids of groups that do not take `spec`. `clips(block)`: learned clip ratios by
    linear, for `spec`. `tokens`: where a method looks at data. `kept`: where finished blocks are, and go."""

    model: PreTrainedModel
    map: ModelMap
    spec: QuantSpec
    part: WeightsPart
    lowrank: LowRankPart
    stored: torch.dtype
    clips: Callable[[int], Clips]
    tokens: Int[Tensor, "sequences T"] | None
    device: torch.device
    others: Mapping[Place, QuantSpec] = field(default_factory=dict)
    kept: KeptCodes | None = None

    def at(self, block: int, group: str) -> QuantSpec:
        """The grid of a group's codes."""
        return self.others.get((block, group), self.spec)


def needs_tokens(part: WeightsPart, lowrank: LowRankPart) -> bool:
    """Whether the recipe's weight methods look at data."""
    return part.method == "gptq" or (lowrank.method != "none" and lowrank.weighting == "hessian")


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


def quantize_weights(task: WeightTask) -> list[dict[str, Any]]:
    """Give every linear its codes; one entry a group: block, group, and what `Told` tells."""
    with torch.no_grad():
        found = list(_with_data(task) if needs_tokens(task.part, task.lowrank) else _without_data(task))
    failed = [entry for entry in found if entry["why"] is not None]
    fallen = [entry for entry in failed if entry["rung"] == "rtn" and task.part.method == "gptq"]
    for entry in fallen:
        warn(f"weights of block {entry['block']}, {entry['group']}: rounded to nearest, because {entry['why']}")
    if len(failed) > len(fallen):
        first = next(entry for entry in failed if entry not in fallen)
        warn(
            f"weights: {len(failed) - len(fallen)} groups did not go as asked, first block {first['block']}, "
            f"{first['group']}: {first['rung']} ({first['why']}); more calibration text would help"
        )
    return found


def _without_data(task: WeightTask) -> Iterator[dict[str, Any]]:
    with progress(f"weights ({task.part.method}, {task.spec})", len(task.map.blocks)) as tick:
        for index in task.map.blocks:
            block = task.model.get_submodule(task.map.block_name(index))
            told = _told(task, index, block)
            if told is None:
                told = []
                with resident(block, task.device):
                    for group in task.map.groups:
                        for part in task.map.parts(group):
                            made = _quantize_group(task, block, index, part, None)
                            made.settle()
                            told.append(_entry(index, part, made.told))
                    _keep(task, index, block, told)
            else:
                assert task.kept is not None
                task.kept.settle(index, block, f"{task.map.block_name(index)}.", _linears(task, index))
            yield from told
            tick()


def _told(task: WeightTask, index: int, block: nn.Module) -> list[dict[str, Any]] | None:
    """What was told of a block that an earlier run finished; None where it is still to be done."""
    if task.kept is None:
        return None
    task.kept.see(index, block)
    return task.kept.told(index)


def _keep(task: WeightTask, index: int, block: nn.Module, told: list[dict[str, Any]]) -> None:
    """Write a block that has its codes."""
    if task.kept is not None:
        task.kept.write(index, block, f"{task.map.block_name(index)}.", told)


def _linears(task: WeightTask, index: int) -> dict[str, QuantSpec]:
    """The grid of every linear of a block."""
    return {name: task.at(index, group.name) for group in task.map.groups for name in group.linears}


def _with_data(task: WeightTask) -> Iterator[dict[str, Any]]:
    assert task.tokens is not None
    part = task.part
    widest = max(task.map.width_in(group.name) for group in task.map.groups)
    if part.method == "gptq" and part.target == "outputs" and task.tokens.numel() < ROWS_A_CHANNEL * widest:
        warn(
            f"weights.target=outputs solves for up to {widest} inputs from {task.tokens.numel()} tokens, fewer than "
            f"{ROWS_A_CHANNEL} for each: it may fit their noise; take more weights.sequences, or weights.target=weights"
        )
    rounds = [[group] for group in task.map.groups] if part.sequential else [list(task.map.groups)]
    with ExitStack() as stack:
        if part.hessian == "full":
            stack.enter_context(in_16_bits(task.model))
            stack.enter_context(kv_in_16_bits(task.model))
        stream = BlockStream(task.model, task.map, task.tokens, task.device, spread=True)
        original = list(stream.hidden)
        if task.kept is not None:
            task.kept.add([task.tokens, *original, torch.tensor(world().size)])
        for step in stream.steps(f"weights ({part.method}, {task.spec})"):
            arguments = stream.arguments[step.index]
            aims = part.method == "gptq" and part.target == "outputs"
            twin = _sixteen_bit_twin(step.block, task) if aims else None
            made: list[_Made] = []
            twins_outputs: list[Tensor] = []
            told = _told(task, step.index, step.block)
            if told is not None:
                yield from told
                if twin is not None:
                    original = _outputs(twin, original, arguments, task.device)
                assert task.kept is not None
                place = step.index, step.block, f"{task.map.block_name(step.index)}.", _linears(task, step.index)
                task.kept.show(*place)
                step.drain()
                task.kept.settle(*place)
                continue
            told = []
            for groups in rounds:
                last = twins_outputs if groups is rounds[-1] else None
                moments = _moments(
                    task, step.block, twin, groups, stream.hidden, original, arguments, last, stream.dealt
                )
                for group_part in (p for group in groups for p in task.map.parts(group)):
                    own = moments.pop(group_part.linears[0])
                    found = _quantize_group(task, step.block, step.index, group_part, own)
                    found.show()
                    made.append(found)
                    told.append(_entry(step.index, group_part, found.told))
            step.drain()
            for found in made:
                found.settle()
            _keep(task, step.index, step.block, told)
            yield from told
            if twin is not None:
                original = twins_outputs


def _outputs(
    block: nn.Module, hidden: Sequence[Tensor], arguments: Mapping[str, Any], device: torch.device
) -> list[Tensor]:
    """What a block gives for every sequence."""
    found = []
    for row in hidden:
        with torch.no_grad():
            y = block(row.to(device)[None], **arguments)
        found.append((y[0] if isinstance(y, tuple) else y)[0].to(row.device))
    return found


def _sixteen_bit_twin(block: nn.Module, task: WeightTask) -> nn.Module:
    twin = copy.deepcopy(block)
    for _, linear in quant_linears(twin):
        linear.input_spec = None
    attention = twin.get_submodule(task.map.family.attention)
    if hasattr(attention, SLOT):
        getattr(attention, SLOT).enabled = False
    return twin


def _moments(
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
        _share([found[part.linears[0]] for part in task.map.parts(group)])
    return found


def _share(experts: list[Moments]) -> None:
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


@dataclass
class _Made:
    """The codes of one group's linears. Until the block's outputs are known they stand in it as dense weights, which
    run faster than codes that are unpacked at every call."""

    linears: list[QuantLinear]
    codes: list[WeightCodes]
    branches: list[Branch | None]
    told: Told
    rounded: bool  # what the branch reads
    spec: QuantSpec

    def show(self) -> None:
        """Have the linears compute with the rounded weights."""
        for linear, made, branch in zip(self.linears, self.codes, self.branches, strict=True):
            assert linear.weight_dense is not None
            linear.weight_dense.data = made.values(self.spec).to(linear.weight_dense.dtype)
            if branch is not None:
                linear.set_branch(branch.down, branch.up, rounded=self.rounded)

    def settle(self) -> None:
        """Give the linears their codes."""
        for linear, made, branch in zip(self.linears, self.codes, self.branches, strict=True):
            linear.set_codes(made.codes, made.scale, made.zero, self.spec, made.peak)
            if branch is not None:
                linear.set_branch(branch.down, branch.up, rounded=self.rounded)


def _quantize_group(
    task: WeightTask, block: nn.Module, index: int, group: GroupNames, moments: Moments | None
) -> _Made:
    linears = [linear for name in group.linears if isinstance(linear := block.get_submodule(name), QuantLinear)]
    weights = [linear.dense_weight().float() for linear in linears]
    rows = [len(weight) for weight in weights]
    stacked = torch.cat(weights)
    spec = task.at(index, group.name)
    learned = task.clips(index) if spec == task.spec else {}
    clips = None
    if all(name in learned for name in group.linears):
        clips = torch.cat([learned[name].to(stacked) for name in group.linears])
    expert = "" if group.expert is None else f", expert {group.expert}"
    branch, made, told = _codes(task, spec, stacked, clips, moments, group.name, f"block {index}, {group.name}{expert}")
    if moments is not None and moments.borrowed:
        told.why = told.why or (
            f"{moments.tokens} rows reached expert {group.expert}, fewer than its {len(moments.hessian)} input "
            "channels: its Hessian borrows from the inputs of all experts"
        )
        told.notes |= {"tokens": float(moments.tokens), "borrowed": float(moments.borrowed)}
    codes = made.rows(rows)
    branches: list[Branch | None] = [None] * len(linears)
    if branch is not None:
        # laid out as a loader lays them out: products of another layout are rounded otherwise
        branches = [Branch(branch.down.contiguous(), up.contiguous()) for up in branch.up.split(rows)]
    return _Made(linears, codes, branches, told, task.lowrank.input == "rounded", spec)


def _codes(
    task: WeightTask,
    spec: QuantSpec,
    weight: Tensor,
    clips: Tensor | None,
    moments: Moments | None,
    group: str,
    place: str,
) -> tuple[Branch | None, WeightCodes, Told]:
    part, lowrank = task.part, task.lowrank
    why = None
    if moments is not None:
        weight, why = best_weights(weight, moments, part.damping)
    rank = lowrank.rank_of(group)
    branch: Branch | None = None
    notes: dict[str, float] = {}
    if rank:
        root, blind = _root(moments if lowrank.weighting == "hessian" else None, part.damping)
        why = why or blind
        branch, weight, notes = agreed(split(
            weight, spec, rank, lowrank.method, root=root,
            iterations=lowrank.iterations, shrink=lowrank.shrink, stored=task.stored, place=place,
        ))  # fmt: skip

    def solve(rows: Tensor, own: Tensor | None) -> tuple[WeightCodes, Told]:
        if part.method == "rtn" or moments is None:
            return round_to_nearest(rows, spec, own), Told("rtn")
        return gptq(
            rows,
            moments.hessian,
            spec,
            own,
            damping=part.damping,
            order=part.order,
            rounds=part.rounds,
            place=place,
        )

    made, told = spread_rows(solve, weight, clips, None if moments is None else moments.hessian, spec)
    told.notes |= notes
    told.why = told.why or why
    return branch, made, told


def _root(moments: Moments | None, damping: float) -> tuple[Tensor | None, str | None]:
    """S, upper triangular, of the damped H = S·Sᵀ; (None, why) where H is not of use."""
    if moments is None:
        return None, None
    upper, rung = factor(normalized(moments.hessian)[0], damping)
    return upper, None if upper is not None else f"the branch was chosen without data: {rung}"


def _entry(index: int, group: GroupNames, told: Told) -> dict[str, Any]:
    expert = {} if group.expert is None else {"expert": group.expert}
    return {"block": index, "group": group.name, **expert, **asdict(told)}
