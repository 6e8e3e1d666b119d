"""Real codes for weights. A method takes a transformed weight matrix and a grid and returns codes, scales, zeros."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from phasequant.numerics import QuantSpec
from phasequant.weight.rtn import WeightCodes, round_to_nearest

METHODS: dict[str, Callable[[Float[Tensor, "O I"], QuantSpec, Float[Tensor, "O G"] | None], WeightCodes]] = {
    "rtn": round_to_nearest
}
"""Name in the recipe → function."""

__all__ = ["METHODS", "WeightCodes", "round_to_nearest"]
