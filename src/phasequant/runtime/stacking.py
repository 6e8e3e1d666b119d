r"""Linears that read one input, as one: W = [W_1; W_2; …], the same rows, so the same outputs to the bit.

    q, k, v → one product of N·H + 2·K·H outputs        gate, up → one of 2·F

One rounding of the input instead of three, one product large enough to fill a GPU. Codes, scales and biases are rows
and are put one after another; low-rank branches A_i, B_i become A = [A_1; A_2; …] and a block-diagonal B (branches that
share one A keep it). The linears that went in become views of what came out: nothing is held twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from phasequant.errors import PhaseQuantError
from phasequant.nn import QuantLinear


def stack(linears: Sequence[nn.Module]) -> nn.Module:
    """One linear with the rows of all. `QuantLinear`s must read one grid through one map, in weights of one grid."""
    first = linears[0]
    if len(linears) == 1:
        return first
    if all(isinstance(linear, QuantLinear) for linear in linears):
        return _stack_codes([linear for linear in linears if isinstance(linear, QuantLinear)])
    if not all(type(linear) is nn.Linear for linear in linears):
        raise PhaseQuantError(f"cannot stack {', '.join(sorted({type(linear).__name__ for linear in linears}))}")
    return _stack_dense([linear for linear in linears if isinstance(linear, nn.Linear)])


def _stack_dense(linears: list[nn.Linear]) -> nn.Linear:
    weight = torch.cat([linear.weight.data for linear in linears])
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    counts = [linear.out_features for linear in linears]
    for linear, rows in zip(linears, weight.split(counts), strict=True):
        linear.weight = nn.Parameter(rows, requires_grad=False)
    if linears[0].bias is not None:
        made.bias = nn.Parameter(torch.cat([linear.bias.data for linear in linears]), requires_grad=False)
    return made


def _stack_codes(linears: list[QuantLinear]) -> QuantLinear:
    first = linears[0]
    for other in linears[1:]:
        if (other.weight_spec, other.input_spec, other.branch_rounded) != (
            first.weight_spec, first.input_spec, first.branch_rounded
        ):  # fmt: skip
            raise PhaseQuantError("linears of one group have different grids: they cannot be stacked")
        if not _same_map(first, other):
            raise PhaseQuantError("linears of one group have different online maps: they cannot be stacked")
    if first.weight_spec is not None and first.weight_spec.kind == "nvfp4":
        seconds = {float(linear.weight_global) for linear in linears if linear.weight_global is not None}
        if len(seconds) > 1:
            raise PhaseQuantError("linears of one group have different second scales: they cannot be stacked")
    counts = [linear.out_features for linear in linears]
    made = QuantLinear(
        first.in_features, sum(counts), bias=False, weight_spec=first.weight_spec, input_spec=first.input_spec,
        online=first.online, branch_rounded=first.branch_rounded, device=torch.device("meta"),
    )  # fmt: skip
    for name in ("weight_packed", "weight_scale", "weight_zero"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is not None:
            joined = torch.cat(parts)
            setattr(made, name, joined)
            for linear, rows in zip(linears, joined.split(counts), strict=True):
                setattr(linear, name, rows)
    made.weight_global, made.input_range = first.weight_global, first.input_range
    if first.weight_dense is not None:
        dense = torch.cat([linear.weight_dense.data for linear in linears if linear.weight_dense is not None])
        made.weight_dense = nn.Parameter(dense, requires_grad=False)
        for linear, rows in zip(linears, dense.split(counts), strict=True):
            linear.weight_dense = nn.Parameter(rows, requires_grad=False)
    if any(linear.bias is not None for linear in linears):
        like = next(linear.bias for linear in linears if linear.bias is not None)
        biases = [like.new_zeros(n) if m.bias is None else m.bias.data for m, n in zip(linears, counts, strict=True)]
        made.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    branches = [(m.lowrank_down, m.lowrank_up) for m in linears if m.lowrank_down is not None]
    if branches:
        down, up = _stack_branches([d for d, _ in branches if d is not None], [u for _, u in branches if u is not None])
        made.set_branch(down, up, rounded=first.branch_rounded)
    return made


def _stack_branches(downs: list[Tensor], ups: list[Tensor]) -> tuple[Tensor, Tensor]:
    if all(torch.equal(downs[0], down) for down in downs[1:]):
        return downs[0], torch.cat(ups)
    return torch.cat(downs), torch.block_diag(*ups)


def _same_map(one: QuantLinear, other: QuantLinear) -> bool:
    if one.online is None or other.online is None:
        return one.online is other.online
    mine, theirs = dict(one.online.named_buffers()), dict(other.online.named_buffers())
    return one.online.layout() == other.online.layout() and all(torch.equal(mine[name], theirs[name]) for name in mine)
