r"""Grids: scale, round, clamp, and back; what is said here is the integer kind, for the others see `floating`.

For a row x (or a group of a row) and b bits, with clip ratio c:

    symmetric    q_max = 2^(b-1) - 1,  s = c·max|x| / q_max
                 q = clamp(round(x/s), -q_max-1, q_max),  x̂ = s·q
    asymmetric   q_max = 2^b - 1,      s = (c·max(x,0) - c·min(x,0)) / q_max,  z = round(-c·min(x,0)/s)
                 q = clamp(round(x/s) + z, 0, q_max),     x̂ = s·(q - z)

A static grid takes max and min from calibration (`static_grid`). An all-zero row gets s = 1. Rounding is to nearest,
ties to even (torch.round). The asymmetric range always includes
zero, so that z is itself a code and fits the grid's own bits (QuaRot's group-wise variant does not do this; with it, z
of an offset group is unbounded and cannot be stored).

Source: QuaRot (arXiv 2404.00456), `quant_utils.py`; the clip search is that repository's `--w_clip`. Its exponent 2.4
punishes a clipped outlier more than a square would: un-rotated SmolLM2 (W4A16) 61 against 86 perplexity.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from phasequant.errors import PhaseQuantError
from phasequant.numerics.floating import e2m1_values, float_scale, round_float
from phasequant.numerics.rows import wide_rows
from phasequant.numerics.spec import QuantSpec

MSE_STEPS = 80  # ratios 1 - i/100, i = 0 … 79
MSE_NORM = 2.4  # Σ |Q(w) - w|^2.4
SEARCHED_AT_ONCE = 2**18  # values: the search's temporaries stay in a CPU's cache


def to_groups(x: Float[Tensor, "*rows width"], spec: QuantSpec) -> Float[Tensor, "*shared G n"]:
    """View `x` so that the values of the last axis share one scale. A per-tensor grid becomes one row of one group, a
    per-column one a row for each."""
    if spec.granularity == "tensor":
        return x.reshape(1, -1)
    if spec.granularity == "column":
        return x.reshape(-1, x.shape[-1]).T
    return x.unflatten(-1, (spec.groups(x.shape[-1]), -1))


def from_groups(grouped: Shaped[Tensor, "*shared G n"], shape: torch.Size, spec: QuantSpec) -> Shaped[Tensor, "..."]:
    """The inverse of `to_groups`."""
    return (grouped.T if spec.granularity == "column" else grouped).reshape(shape)


def _range_to_grid(low: Tensor, high: Tensor, spec: QuantSpec, peak: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point (zeros where symmetric) for values within [low, high], low ≤ 0 ≤ high."""
    if not spec.is_int:
        scale = float_scale(spec.kind, torch.maximum(-low, high), peak)
        return scale, torch.zeros_like(scale)
    # Divided by a tensor: CUDA multiplies by the reciprocal of a number, and the last bit would be another.
    steps = torch.full_like(high, spec.highest)
    if spec.symmetric:
        scale = torch.maximum(-low, high) / steps
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, torch.zeros_like(scale)
    scale = (high - low) / steps
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round(-low / scale).clamp(0, spec.highest)


def _round_to_grid(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Codes; of floating-point grids the values of the codes, before scaling."""
    if not spec.is_int:
        return round_float(spec.kind, x / scale)[1]
    return torch.clamp(torch.round(x / scale) + zero, spec.lowest, spec.highest)


def grid(
    x: Float[Tensor, "*rows width"],
    spec: QuantSpec,
    ratio: Float[Tensor, "*shared G"] | None = None,
    mse_step: int = 1,
    peak: Float[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "*shared G"], Float[Tensor, "*shared G"]]:
    """Scale and zero point of each group of `x`; zero points are 0 where the grid is symmetric.

    With `clip="mse"` each group tries 80 clip ratios from 1.00 down to 0.21 and keeps the one with the least
    Σ|Q(x)-x|^2.4. `ratio`: a clip ratio for every group, instead of the grid's own. `mse_step`: try
    only every so many of the 80. `peak`: the tensor's largest magnitude, from which NVFP4 takes its second scale;
    without it every row has its own.
    """
    if spec.mixed:
        wide = wide_rows(x, spec)[..., None]
        both = zip(grid(x, spec.wide), grid(x, spec.narrow, ratio), strict=True)
        scale, zero = (torch.where(wide, high, low) for high, low in both)
        return scale, zero
    grouped = to_groups(x, spec)
    if spec.static:
        raise PhaseQuantError(f"the grid '{spec}' has a calibrated range, and none was given")
    low = grouped.amin(-1).clamp(max=0)
    high = grouped.amax(-1).clamp(min=0)
    if ratio is not None:
        return _range_to_grid(low * ratio, high * ratio, spec, peak)
    if spec.clip != "mse":
        return _range_to_grid(low * float(spec.clip), high * float(spec.clip), spec, peak)
    rows = max(1, SEARCHED_AT_ONCE // grouped[0].numel()) if x.device.type == "cpu" else len(grouped)
    parts = zip(grouped.split(rows), low.split(rows), high.split(rows), strict=True)
    scales, zeros = zip(*(_searched(*part, spec, mse_step, peak) for part in parts), strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _searched(
    grouped: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, mse_step: int, peak: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point with the least Σ|Q(x)-x|^2.4, of every group."""
    best_scale, best_zero = _range_to_grid(low, high, spec, peak)
    best_error = torch.full_like(low, torch.inf)
    for step in range(0, MSE_STEPS, mse_step):
        fraction = 1.0 - step / 100
        scale, zero = _range_to_grid(low * fraction, high * fraction, spec, peak)
        rounded = _round_to_grid(grouped, scale[..., None], zero[..., None], spec).sub_(zero[..., None])
        error = rounded.mul_(scale[..., None]).sub_(grouped).abs_()
        error = error.log2_().mul_(MSE_NORM).exp2_().sum(-1)  # less than half the time of pow
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def weight_scale(scale: Float[Tensor, "*shared G"], spec: QuantSpec) -> Float[Tensor, "*shared G"]:
    """The scale of an integer weight grid as a number of bfloat16, which every kernel and every server's format holds
    exactly (it moves a scale by 0.2 % at most); others as they are. Codes are made for what this returns."""
    return scale.to(torch.bfloat16).to(scale.dtype) if spec.is_int else scale


def round_to_codes(
    x: Float[Tensor, "*rows width"],
    scale: Float[Tensor, "*shared G"],
    zero: Float[Tensor, "*shared G"],
    spec: QuantSpec,
) -> Shaped[Tensor, "*rows width"]:
    """Codes of `x` on a given grid, of `codes_type`. Rows of a mixed grid are clamped to their own bits."""
    if spec.mixed:
        wide, narrow = (round_to_codes(x, scale, zero, one) for one in (spec.wide, spec.narrow))
        return torch.where(wide_rows(x, spec)[..., None], wide, narrow)
    codes, _ = round_values(to_groups(x, spec), scale[..., None], zero[..., None], spec)
    return from_groups(codes, x.shape, spec).to(codes_type(spec))


def codes_type(spec: QuantSpec) -> torch.dtype:
    """The type codes are handed around in: int8 where symmetric, uint8 where not; E2M1 nibbles as uint8; E4M3."""
    if not spec.is_int:
        return torch.float8_e4m3fn if spec.kind == "fp8" else torch.uint8
    return torch.int8 if spec.symmetric else torch.uint8


def round_values(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Codes (as floating-point numbers) and the values they stand for, on scales that broadcast against `x`."""
    if not spec.is_int:
        codes, values = round_float(spec.kind, x / scale)
        return codes, values * scale
    codes = _round_to_grid(x, scale, zero, spec)
    return codes, (codes - zero) * scale


def quantize(
    x: Float[Tensor, "*rows width"],
    spec: QuantSpec,
    ratio: Float[Tensor, "*shared G"] | None = None,
    mse_step: int = 1,
    peak: Float[Tensor, ""] | None = None,
) -> tuple[Shaped[Tensor, "*rows width"], Float[Tensor, "*shared G"], Float[Tensor, "*shared G"]]:
    """Codes, scales and zero points of `x`; `ratio`, `mse_step`, `peak` as in `grid`."""
    scale, zero = grid(x, spec, ratio, mse_step, peak)
    return round_to_codes(x, scale, zero, spec), scale, zero


def dequantize(
    codes: Shaped[Tensor, "*rows width"],
    scale: Float[Tensor, "*shared G"],
    zero: Float[Tensor, "*shared G"],
    spec: QuantSpec,
) -> Float[Tensor, "*rows width"]:
    """x̂ = s·(q - z), in the scale's precision."""
    fp4 = spec.kind in ("nvfp4", "mxfp4")
    grouped = to_groups(e2m1_values(codes, scale.dtype) if fp4 else codes.to(scale.dtype), spec)
    return from_groups((grouped - zero[..., None]) * scale[..., None], codes.shape, spec)


def fake_quantize(
    x: Float[Tensor, "*rows width"], spec: QuantSpec, calibrated: Float[Tensor, "2 m"] | None = None
) -> Float[Tensor, "*rows width"]:
    """Round `x` to its grid and back: what a reader of the codes sees. `calibrated`: the range of a static grid."""
    if spec.mixed:
        wide, narrow = (fake_quantize(x, one) for one in (spec.wide, spec.narrow))
        return torch.where(wide_rows(x, spec)[..., None], wide, narrow)
    scale, zero = grid(x, spec) if calibrated is None else static_grid(calibrated, spec)
    grouped = to_groups(x, spec)
    codes = _round_to_grid(grouped, scale[..., None], zero[..., None], spec)
    return from_groups((codes - zero[..., None]) * scale[..., None], x.shape, spec)


def static_grid(calibrated: Float[Tensor, "2 m"], spec: QuantSpec) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Scale and zero point of a static grid from its calibrated (lowest, highest) values: one of a tensor, one for
    each column. The clip is a fraction of them."""
    low, high = calibrated
    return _range_to_grid(low.clamp(max=0) * float(spec.clip), high.clamp(min=0) * float(spec.clip), spec)
