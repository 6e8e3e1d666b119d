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

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from phasequant.arch.families import GroupNames
from phasequant.console import progress, warn
from phasequant.nn import in_16_bits, kv_in_16_bits
from phasequant.numerics import QuantSpec
from phasequant.ranks import world
from phasequant.stream import BlockStream, resident
from phasequant.weight.codes import Told
from phasequant.weight.group import Made, quantize_group
from phasequant.weight.inputs import block_outputs, moments_of, sixteen_bit_twin
from phasequant.weight.task import WeightTask, needs_tokens

ROWS_A_CHANNEL = 8  # fewer, and a solve towards outputs fits what is noise


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
                            made = quantize_group(task, block, index, part, None)
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
            twin = sixteen_bit_twin(step.block, task) if aims else None
            made: list[Made] = []
            twins_outputs: list[Tensor] = []
            told = _told(task, step.index, step.block)
            if told is not None:
                yield from told
                if twin is not None:
                    original = block_outputs(twin, original, arguments, task.device)
                assert task.kept is not None
                place = step.index, step.block, f"{task.map.block_name(step.index)}.", _linears(task, step.index)
                task.kept.show(*place)
                step.drain()
                task.kept.settle(*place)
                continue
            told = []
            for groups in rounds:
                last = twins_outputs if groups is rounds[-1] else None
                moments = moments_of(
                    task, step.block, twin, groups, stream.hidden, original, arguments, last, stream.dealt
                )
                for group_part in (p for group in groups for p in task.map.parts(group)):
                    own = moments.pop(group_part.linears[0])
                    found = quantize_group(task, step.block, step.index, group_part, own)
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


def _entry(index: int, group: GroupNames, told: Told) -> dict[str, Any]:
    expert = {} if group.expert is None else {"expert": group.expert}
    return {"block": index, "group": group.name, **expert, **asdict(told)}
