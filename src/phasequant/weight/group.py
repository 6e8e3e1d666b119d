r"""Codes of one group: its linears, stacked, for they read one input.

    W ─best for the outputs─► W' ─less a low-rank branch─► W' - B·A ─RTN or GPTQ─► codes

The first where the moments hold the 16-bit model's inputs (`target: outputs`), the second where the recipe has a branch
for the group; H is the group's, and of experts each expert's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phasequant.arch.families import GroupNames
from phasequant.nn import QuantLinear
from phasequant.numerics import QuantSpec
from phasequant.ranks import agreed
from phasequant.weight.codes import Told, WeightCodes
from phasequant.weight.gptq import factor, gptq, normalized
from phasequant.weight.lowrank import Branch, split
from phasequant.weight.moments import Moments
from phasequant.weight.rtn import round_to_nearest
from phasequant.weight.spread import spread_best, spread_rows
from phasequant.weight.task import WeightTask


@dataclass
class Made:
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


def quantize_group(task: WeightTask, block: nn.Module, index: int, group: GroupNames, moments: Moments | None) -> Made:
    """Codes of a group's linears, not given to them yet. `moments`: of its inputs, where a method looks at them."""
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
    return Made(linears, codes, branches, told, task.lowrank.input == "rounded", spec)


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
        weight, why = spread_best(weight, moments, part.damping)
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
