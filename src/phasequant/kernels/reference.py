r"""The definition of a quantized linear. Every other kernel is tested against this.

For input codes q_x with scale s_x and zero z_x per token, weight codes q_w with s_w and z_w per output channel (or
group g of the inputs):

    y[t,o] = s_x[t] · Σ_g s_w[o,g] · ( Σ_{i∈g} (q_x[t,i] - z_x[t]) · (q_w[o,i] - z_w[o,g]) )  +  b[o]

plus, where the linear has a low-rank branch, Σ_k B[o,k]·( Σ_i A[k,i]·x[t,i] ), x as it comes or as its grid rounds it.
A fused kernel computes x·Aᵀ where it reads x to round it, and adds (x·Aᵀ)·Bᵀ in its epilogue, between s_x and b.

The inner sum is an integer. It is computed by a floating-point matrix product in a type wide enough to hold every
partial sum exactly (fp32 below 2^24, else fp64), so its value depends neither on the order of summation nor on the
machine. Scaling is fp32: first by s_w, then by s_x. A static grid has one s_x and z_x for all tokens. With 16-bit
inputs, with one s_x a column, and where either grid is of floating-point codes, what the codes stand for is multiplied
in fp32.

Costs as much as a dense fp32 linear plus unpacking: it defines, it is not fast.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.kernels.contract import LinearSpec, LinearTensors
from phasequant.numerics import (
    QuantSpec,
    dequantize,
    fake_quantize,
    grid,
    round_to_codes,
    static_grid,
    summing_type,
    unpack,
)

EXACT_FP32 = 2**24


def centred_codes(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """q - z of every value, in the precision of `x` (integers)."""
    codes = round_to_codes(x, scale, zero, spec).to(x.dtype)
    return codes if spec.symmetric else codes - zero


def input_grid(x: Tensor, weights: LinearTensors, spec: LinearSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point that the input is read on: from its own range, or from the calibrated one."""
    assert spec.input is not None
    if not spec.input.static:
        return grid(x, spec.input)
    assert weights.input_range is not None, "a static grid needs its calibrated range"
    return static_grid(weights.input_range.to(x), spec.input)


def round_input(x: Tensor, weights: LinearTensors, spec: LinearSpec) -> Tensor:
    """The input as its grid rounds it; as it comes where it has none."""
    if spec.input is None:
        return x
    calibrated = None
    if spec.input.static:
        assert weights.input_range is not None, "a static grid needs its calibrated range"
        calibrated = weights.input_range.to(x)
    return fake_quantize(x, spec.input, calibrated)


def dense_weight(weights: LinearTensors, spec: LinearSpec) -> Float[Tensor, "O I"]:
    """The weights as floating-point numbers."""
    if spec.weight is None:
        assert weights.dense is not None
        return weights.dense
    assert weights.packed is not None and weights.scale is not None and weights.zero is not None
    codes = unpack(weights.packed, spec.in_features, spec.weight)
    return dequantize(codes, weights.scale, weights.zero, spec.weight)


def add_rest(y: Tensor, x: Tensor, weights: LinearTensors, spec: LinearSpec) -> Tensor:
    """y + (x·Aᵀ)·Bᵀ + b, of these what there is; `x` is the input before rounding, `y` in the type computed in."""
    if spec.rank:
        assert weights.down is not None and weights.up is not None
        read = round_input(x, weights, spec) if spec.branch_rounded else x
        wide = summing_type(read)
        y = y + ((read.to(wide) @ weights.down.to(wide).T) @ weights.up.to(wide).T).to(y)
    return y if weights.bias is None else y + weights.bias.to(y)


class Reference:
    """See the module's docstring."""

    name = "reference"

    def can_run(self, spec: LinearSpec, device: torch.device) -> tuple[bool, str]:
        """Always, on any device that torch has."""
        return True, "the reference runs everywhere"

    def prepare(self, weights: LinearTensors, spec: LinearSpec) -> LinearTensors:
        """As they are."""
        return weights

    def linear(self, x: Float[Tensor, "*rows I"], weights: LinearTensors, spec: LinearSpec) -> Float[Tensor, "*rows O"]:
        """The definition."""
        wide = torch.promote_types(x.dtype, torch.float32)
        values = x.to(wide)
        if (
            spec.input is None
            or spec.weight is None
            or not (spec.weight.is_int and spec.input.is_int)
            or spec.input.granularity == "column"
        ):
            read = round_input(values, weights, spec)
            return add_rest(read @ dense_weight(weights, spec).to(wide).T, values, weights, spec).to(x.dtype)
        assert weights.packed is not None and weights.scale is not None and weights.zero is not None
        s_x, z_x = input_grid(values, weights, spec)
        q_x = centred_codes(values, s_x, z_x, spec.input)
        codes = unpack(weights.packed, spec.in_features, spec.weight).to(wide)
        groups = spec.weight.groups(spec.in_features)
        span = spec.in_features // groups
        exact = wide if span * spec.input.reach * spec.weight.reach <= EXACT_FP32 else torch.float64
        y = torch.zeros(*x.shape[:-1], spec.out_features, dtype=wide, device=x.device)
        for g in range(groups):
            part = slice(g * span, (g + 1) * span)
            q_w = (codes[:, part] - weights.zero[:, g, None]).to(exact)
            y += (q_x[..., part].to(exact) @ q_w.T).to(wide) * weights.scale[:, g].to(wide)
        return add_rest(y * s_x, values, weights, spec).to(x.dtype)
