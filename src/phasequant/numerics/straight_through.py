r"""Rounding to a grid with a gradient: the straight-through estimator.

    x̂ = s·(q - z),   q = clamp(round(x/s) + z, lowest, highest)

Forward is `integer.fake_quantize` to the bit. Backward takes round for the identity:

    inside the grid     ∂x̂/∂x = 1    ∂x̂/∂s = q - z - x/s    ∂x̂/∂z = 0
    clipped             ∂x̂/∂x = 0    ∂x̂/∂s = q - z          ∂x̂/∂z = -s

and s is itself a function of the row's extremes and of the clip ratio, which so gets its gradient. Written as one
function with its own backward: autograd over the single steps would keep six tensors the size of x alive.

Source: straight-through estimation (arXiv 1308.3432); gradients of scales as in LSQ (arXiv 1902.08153).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.errors import PhaseQuantError
from phasequant.numerics.integer import from_groups, to_groups
from phasequant.numerics.rows import wide_rows
from phasequant.numerics.spec import QuantSpec


class _RoundToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, lowest: int, highest: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.ends = lowest, highest
        return x.div(scale).round_().add_(zero).clamp_(lowest, highest).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, scale, zero = ctx.saved_tensors
        lowest, highest = ctx.ends
        steps = x / scale
        codes = steps.round().add_(zero)
        inside = (codes >= lowest) & (codes <= highest)
        centred = codes.clamp_(lowest, highest).sub_(zero)
        to_x = grad * inside
        to_scale = (grad * centred.sub_(steps.mul_(inside))).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None
        to_zero = ((to_x - grad) * scale).sum(-1, keepdim=True) if ctx.needs_input_grad[2] else None
        return to_x, to_scale, to_zero, None, None


def straight_through(
    x: Float[Tensor, "*rows width"], spec: QuantSpec, ratio: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "*rows width"]:
    """`x` rounded to its grid, with a gradient to `x` and to `ratio`, the clip ratio that replaces the grid's own
    (broadcast against the grid's scales, *rows × G). A static grid is taken as one whose range is that of `x`."""
    if spec.mixed:
        wide = straight_through(x, spec.wide)
        return torch.where(wide_rows(x.detach(), spec)[..., None], wide, straight_through(x, spec.narrow, ratio))
    spec = spec.dynamic
    if not spec.is_int:
        raise PhaseQuantError(f"nothing can be learned through {spec.kind} grids yet: take integer ones")
    grouped = to_groups(x, spec)
    low = grouped.amin(-1).clamp(max=0)
    high = grouped.amax(-1).clamp(min=0)
    if ratio is None:
        ratio = torch.full((), float(spec.clip if spec.clip != "mse" else 1.0), dtype=x.dtype, device=x.device)
    low, high = low * ratio, high * ratio
    steps = torch.full_like(high, spec.highest)
    scale = (torch.maximum(-low, high) if spec.symmetric else high - low) / steps
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale)
    if not spec.symmetric:
        exact = -low / scale
        zero = exact + (exact.round() - exact).detach()
        zero = zero.clamp(0, spec.highest)
    y = _RoundToGrid.apply(grouped, scale[..., None], zero[..., None], spec.lowest, spec.highest)
    return from_groups(y, x.shape, spec)
