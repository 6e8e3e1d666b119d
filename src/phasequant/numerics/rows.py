r"""Per-token precision: single rows of a 4-bit activation read the 8-bit grid of the same int8 lanes.

    row t reads 8 bits  ⇔  m(x_t) > τ           absmax   m = max|x_t|
                                                gsr      m = max|x_t| / (q_max·std(x_t)),  q_max of the narrow grid

τ is calibrated (`observe.rows`). Where 4-bit codes travel as int8, as in every int8 matrix unit, a row's bits are no
more than the scale and the clamp of its codes: the product does not change, and costs nothing more. Hardware with units
of 4 bits would have to split the rows into two products: kernels for it must refuse such a grid.

`absmax` is a comparison, alike on every machine; `gsr` divides by a sum, whose last bit may depend on its order.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from phasequant.numerics.spec import QuantSpec


def row_measure(x: Float[Tensor, "*rows width"], spec: QuantSpec) -> Float[Tensor, "*rows"]:
    """m of every row, by the spec's rule."""
    return measure_rows(x, spec.rows_by or "absmax", spec.highest)


def measure_rows(x: Float[Tensor, "*rows width"], rule: str, highest: int) -> Float[Tensor, "*rows"]:
    """m of every row, by a rule; `highest`: the narrow grid's largest code."""
    largest = x.abs().amax(-1)
    if rule == "absmax":
        return largest
    std = x.std(-1, correction=0)
    return torch.where(std > 0, largest / (std * highest).clamp(min=1e-30), torch.zeros_like(std))


def wide_rows(x: Float[Tensor, "*rows width"], spec: QuantSpec) -> Bool[Tensor, "*rows"]:
    """The rows that a mixed grid reads in 8 bits."""
    assert spec.above is not None, "only a mixed grid has rows of its own"
    return row_measure(x, spec) > spec.above
