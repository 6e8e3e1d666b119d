r"""Rounding activations to bytes on a CPU, in as few passes over memory as eager torch allows.

    m = max|x|        the bits of x without their sign, as integers: ordered as |x| is, and read at the width x has
    s = c·m / q_max
    q + o             q = clamp(round(x/s)),  o = 2^(b-1):  the low byte of the fp32 number  x/s + (1.5·2^23 + o)

At 1.5·2^23 the last bit of an fp32 mantissa is worth 1, so the addition rounds to the nearest whole number, ties to
even, as torch.round does: a division, an addition, a change of type, in place of round, clamp and two conversions.
Only what may lie beyond the grid is clamped: a clip below 1, a static range, a scale so small that fp32 rounds it
coarsely. Rows are taken in pieces that stay in a core's cache.

The codes are those of `numerics.integer`, offset by o, for all finite inputs of up to 32 bits.
"""

from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from phasequant.numerics import QuantSpec, static_grid, wide_rows

WHOLE = 1.5 * 2**23
COARSE = 2.0**-120  # scales below are within reach of fp32's subnormal numbers
FEW = 16  # rows
PIECE = 2**17  # values a core takes at once: 512 KiB of fp32


def offset(spec: QuantSpec) -> int:
    """What is added to codes to make them unsigned: the wide grid's where rows have their own."""
    return -(spec.wide if spec.mixed else spec).lowest


def round_rows(
    x: Float[Tensor, "T I"], spec: QuantSpec, calibrated: Float[Tensor, "2 1"] | None = None
) -> tuple[UInt8[Tensor, "T I"], Float[Tensor, "S 1"]]:
    """Codes + `offset(spec)`, and the scales, fp32: one a row (S = T), or one (S = 1)."""
    count, width = x.shape
    rows = max(1, PIECE * torch.get_num_threads() // width)
    space = None if count <= rows else torch.empty(rows, width)
    if space is None:
        x = x.to(torch.float32)
    wide: Tensor | None = None
    if calibrated is not None:
        scale = static_grid(calibrated.to(torch.float32), spec)[0].reshape(1, 1)
    else:
        largest = _largest(x, space)
        if spec.granularity == "tensor":
            largest = largest.amax(0, keepdim=True)
        scale = _scale(largest, spec)
        if spec.above is not None:
            by_largest = spec.rows_by == "absmax"
            wide = largest > spec.above if by_largest else wide_rows(x.to(torch.float32), spec)[:, None]
            scale = torch.where(wide, _scale(largest, spec.wide), scale)
    few = count <= FEW  # clamping is less than asking
    within = spec.clip == 1.0 and not spec.static and not few and bool(scale.amin() > COARSE)
    start = WHOLE + offset(spec)

    def low_bytes(values: Tensor, part: slice) -> Tensor:
        values.add_(_number(start))
        if not within:
            _clamp(values, spec, start, None if wide is None else wide[part])
        return values.view(torch.int32)

    if space is None:
        return low_bytes(x / scale, slice(None)).to(torch.uint8), scale
    codes = torch.empty(count, width, dtype=torch.uint8)
    for at in range(0, count, rows):
        part = slice(at, min(at + rows, count))
        values, s_x = space[: part.stop - at], scale if scale.shape[0] == 1 else scale[part]
        if x.dtype == torch.float32:
            torch.div(x[part], s_x, out=values)
        else:
            values.copy_(x[part]).div_(s_x)
        codes[part].copy_(low_bytes(values, part))
    return codes, scale


def _clamp(values: Float[Tensor, "n I"], spec: QuantSpec, start: float, wide: Tensor | None) -> None:
    """Each row to its own grid's codes, in place."""
    low, high = start + spec.lowest, start + spec.highest
    if wide is None:
        values.clamp_(low, high)
    else:  # clamp by tensors takes four times as long
        torch.minimum(values, torch.where(wide, start + spec.wide.highest, high), out=values)
        torch.maximum(values, torch.where(wide, start + spec.wide.lowest, low), out=values)


def _largest(x: Float[Tensor, "T I"], space: Float[Tensor, "n I"] | None) -> Float[Tensor, "T 1"]:
    """max|x| of every row, fp32; by pieces of the size of `space`, where it is given."""
    if space is None:
        return x.abs().amax(-1, keepdim=True)
    kind = torch.int16 if x.element_size() == 2 else torch.int32
    bits, found = x.view(kind), torch.empty(x.shape[0], 1, dtype=kind)
    unsigned = space.view(kind).flatten()[: space.numel()].view(space.shape)
    for piece, top in zip(bits.split(space.shape[0]), found.split(space.shape[0]), strict=True):
        held = torch.bitwise_and(piece, torch.iinfo(kind).max, out=unsigned[: piece.shape[0]])
        torch.amax(held, -1, keepdim=True, out=top)
    return found.view(x.dtype).to(torch.float32)


def _scale(largest: Float[Tensor, "n 1"], spec: QuantSpec) -> Float[Tensor, "n 1"]:
    """As `numerics.integer` has it."""
    clipped = largest if spec.clip == 1.0 else largest * float(spec.clip)
    scale = clipped / _number(float(spec.highest))
    return torch.where(scale > _number(0.0), scale, _number(1.0))


@cache
def _number(value: float) -> Float[Tensor, ""]:
    """As a tensor: a Python number costs a microsecond more in every operation."""
    return torch.tensor(value, dtype=torch.float32)
