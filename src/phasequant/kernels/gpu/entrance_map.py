r"""A `LinearMap` as two small products of matrix units on one row: x laid out (a, b), y = g·Lᵀ·(X·R).

    rows      a ⊗ b; blocks that share a matrix, (m, a)·A; A ⊗ I_tail, Aᵀ·(a, tail): the whole row is one program's
              tile, padded to powers of two, and what follows (the range, the codes) finds it in registers
    blocks    a matrix for each block, or one dense one: a block of many rows is a tile, and its matrix is read once

bfloat16 operands, fp32 sums, the precision of fp32's first 16 bits: a factor of fp32 is high + low, two numbers of
bfloat16 (2^-17), and so is what bfloat16 does not hold, x of fp32 or the sums between the products; low·low is left
out. Entries all ±h, Hadamard's, are exact as ±1 with h in the gain g: then one product does for x of bfloat16 and two
for the sums. Against products of fp32, one part of the sums would move 5 % of 8-bit codes by one, two move 0.01 %, as
three do (14336 by Hadamard, 4096 by random factors, on the CPU); TF32 in three parts costs twice as much as three.

Costs for 4096 × 14336 as 128 ⊗ 112, padded to 128 ⊗ 128: 17 GFLOP a product and part, 52 GFLOP of Hadamard's three,
86 GFLOP of a general pair's five: 65 and 110 µs at 790 TFLOP/s, against 98 µs for its bytes at 3 TB/s (bfloat16 gate
and up in, codes out). 64 ⊗ 64 of 4096 × 4096, general: 11 GFLOP, 14 µs, against 17 µs. The factors of a pair are 16 KB
to 128 KB; every program reads them once, for all its rows, and keeps them in shared memory.
"""

from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from phasequant.errors import PhaseQuantError
from phasequant.kernels.gpu import interpreted
from phasequant.kernels.gpu.entrance_grid import nearest, operand
from phasequant.numerics import LinearMap

LARGEST_TILE = 2**15  # values of a row, padded: 64 registers a thread
LARGEST_BLOCK = 128
REGISTERS = 2**16  # of a multiprocessor
HOPPERS = 227 * 2**10  # bytes of shared memory that one program may have there
SPARE = 2**10
SAME_WITHIN = 1e-5  # of the entries of a Hadamard matrix stored in fp32


@dataclass(frozen=True, eq=False, slots=True)
class MapTiles:
    """A map as the kernels read it. `left` (parts, A, A), transposed, and `right` (parts, B, B): bfloat16, padded with
    zeros; or `blocks` (parts, m, A, A). `diagonal` (n,) fp32, which `exact` says is of ±1; `gain` is g."""

    a: int
    b: int
    left: Tensor | None = None
    right: Tensor | None = None
    blocks: Tensor | None = None
    diagonal: Tensor | None = None
    exact: bool = True
    gain: float = 1.0

    @property
    def width(self) -> int:
        """The width it acts on."""
        return self.a * self.b


class RowPlan(NamedTuple):
    """How a row is tiled, and how many programs a multiprocessor holds."""

    A: int
    B: int
    warps: int
    stages: int = 1
    resident: int = 1
    registers: int | None = None


def padded(order: int) -> int:
    """The order of a factor or axis in a tile."""
    return max(16, triton.next_power_of_2(order))


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; of a Hopper GPU where there is none."""
    if device.type != "cuda" or interpreted():
        return HOPPERS
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))


def _bytes(A: int, B: int, left: int, right: int, itemsize: int) -> int:
    """Shared memory of a row's tile with so many parts of either factor: the factors, and one operand on its way."""
    return 2 * (left * A * A + right * B * B) + max(2, itemsize) * A * B


def row_plan(a: int, b: int, left: int, right: int, itemsize: int, inputs: int, device: torch.device) -> RowPlan:
    """For a row of `inputs` tensors under a map with factors of so many parts. A thread holds up to 32 values, or 64 of
    a wide row; where shared memory holds one program alone, it fetches the next row while it computes."""
    A, B = padded(a), padded(b)
    warps = 16 if A * B > 2**14 else min(max(A * B // 1024, 4), 8)
    registers = 128 if 1024 * warps < A * B else 96
    room, needs = shared_memory(device), _bytes(A, B, left, right, itemsize)
    resident = max(1, min(REGISTERS // (registers * 32 * warps), (room + SPARE) // (needs + SPARE)))
    ahead = resident == 1 and needs + inputs * itemsize * A * B + SPARE <= room
    return RowPlan(A, B, warps, 2 if ahead else 1, resident, 128 if resident > 1 else None)


def _magnitude(matrices: Float[Tensor, "m n n"]) -> float | None:
    """h where all entries are ±h."""
    size = float(matrices.abs().mean())
    same = size > 0 and bool(((matrices.abs() - size).abs() <= SAME_WITHIN * size).all())
    return size if same else None


def _one_factor(linear_map: LinearMap) -> LinearMap:
    """Blocks of pairs as blocks of their Kronecker products."""
    left, right = linear_map.left, linear_map.right
    if right is None or linear_map.blocks == 1 or linear_map.a * linear_map.b > LARGEST_BLOCK:
        return linear_map
    many = max(len(left), len(right))
    pairs = zip(left.expand(many, -1, -1), right.expand(many, -1, -1), strict=True)
    matrices = torch.stack([torch.kron(a.contiguous(), b.contiguous()) for a, b in pairs])
    return LinearMap(linear_map.kind, matrices, None, linear_map.blocks, diagonal=linear_map.diagonal)


def map_fits(linear_map: LinearMap, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether the kernels take a map of rows of `dtype`: why not, or "rows" or "blocks", how they do."""
    one = _one_factor(linear_map)
    if one.a == 1 and one.right is None:
        return True, "rows"
    if one.blocks > 1 and one.b > 1:
        return False, f"takes blocks up to {LARGEST_BLOCK} wide, not {linear_map.shape_name}"
    if one.b == 1 and (one.blocks == 1 or len(one.left) > 1):
        fits = one.a <= LARGEST_BLOCK
        return fits, "blocks" if fits else f"takes dense matrices up to {LARGEST_BLOCK}, not {linear_map.shape_name}"
    parts = [0 if f is None else 1 if _magnitude(f) is not None else 2 for f in (one.left, one.right)]
    if one.b == 1:
        (a, b), parts = (one.blocks, one.a), parts[::-1]
    else:
        a, b = one.a, one.b
    A, B = padded(a), padded(b)
    needs, room = _bytes(A, B, parts[0], parts[1], dtype.itemsize) + SPARE, shared_memory(device)
    if A * B > LARGEST_TILE or needs > room:
        return False, (
            f"{linear_map.shape_name} takes a tile of {A} by {B} and {needs} bytes of shared memory; there are "
            f"{LARGEST_TILE} values and {room} bytes"
        )
    return True, "rows"


def _parts(matrices: Float[Tensor, "m n n"], device: torch.device) -> tuple[Float[Tensor, "parts m N N"], float]:
    """(high, low) of bfloat16, padded, and 1; or ±1 and the magnitude of every entry, where there is but one."""
    values = matrices.to(torch.float64)
    size = _magnitude(values)
    if size is not None:
        parts = values.sign().bfloat16()[None]
    else:
        high = values.bfloat16()
        parts = torch.stack((high, (values - high.double()).bfloat16()))
    room = padded(values.shape[-1]) - values.shape[-1]
    parts = torch.nn.functional.pad(parts, (0, room, 0, room))
    return parts.contiguous().to(device), size or 1.0


def map_tiles(linear_map: LinearMap, dtype: torch.dtype, device: torch.device) -> MapTiles:
    """A map laid out for the kernels, on their device: made once for a model, not in every call."""
    fits, how = map_fits(linear_map, dtype, device)
    if not fits:
        raise PhaseQuantError(f"the entrance kernels do not take this map: {how}")
    one = _one_factor(linear_map)
    diagonal, exact = None, True
    if one.diagonal is not None:
        diagonal = one.diagonal.to(device, torch.float32)
        exact = bool((one.diagonal.abs() == 1).all())
    if one.a == 1 and one.right is None:  # nothing but a diagonal, and factors of order 1
        each = one.left.reshape(-1).repeat_interleave(one.size // len(one.left))
        each = each if one.diagonal is None else each * one.diagonal
        return MapTiles(1, one.size, diagonal=each.to(device, torch.float32), exact=False)
    left, gain = _parts(one.left, device)
    if how == "blocks":
        return MapTiles(one.blocks, one.a, None, None, left, diagonal, exact, gain)
    if one.b == 1:
        return MapTiles(one.blocks, one.a, None, left[:, 0], None, diagonal, exact, gain)
    right = None
    if one.right is not None:
        right, more = _parts(one.right, device)
        right, gain = right[:, 0], gain * more
    return MapTiles(one.a, one.b, left[:, 0].mT.contiguous(), right, None, diagonal, exact, gain)


@triton.jit
@no_type_check
def times(x, high, low, X: tl.constexpr, PARTS: tl.constexpr):
    """x·R of fp32 x, which bfloat16 holds where X is 1, and R = high, or high + low where PARTS is 2. (The low part
    comes last: it may then take the place of the first in shared memory.)"""
    first = nearest(x, tl.bfloat16)
    sums = tl.dot(operand(first), high)
    if PARTS == 2:
        sums = tl.dot(operand(first), low, sums)
    if X == 2:
        sums = tl.dot(operand(nearest(x - first, tl.bfloat16)), high, sums)
    return sums


@triton.jit
@no_type_check
def under(high, low, x, X: tl.constexpr, PARTS: tl.constexpr):
    """Lᵀ·x, as `times`."""
    first = nearest(x, tl.bfloat16)
    sums = tl.dot(high, operand(first))
    if PARTS == 2:
        sums = tl.dot(low, operand(first), sums)
    if X == 2:
        sums = tl.dot(high, operand(nearest(x - first, tl.bfloat16)), sums)
    return sums


@triton.jit
@no_type_check
def factor(pointer, stride, ORDER: tl.constexpr, PART: tl.constexpr):
    """One part of a padded factor."""
    k = tl.arange(0, ORDER)
    return operand(tl.load(pointer + PART * stride + k[:, None] * ORDER + k[None, :]))
