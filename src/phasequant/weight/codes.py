"""What every weight method gives back, and what it has to tell about it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Integer
from torch import Tensor


class WeightCodes(NamedTuple):
    """Codes (O, I) with scales and zero points (O, G)."""

    codes: Integer[Tensor, "O I"]
    scale: Float[Tensor, "O G"]
    zero: Float[Tensor, "O G"]


@dataclass
class Told:
    """How the codes of one linear, or of the stacked linears of one group, came about.

    - `rung`: what was used in the end: `rtn`, or `gptq` with its damping and precision.
    - `why`: where that is not what was asked for, the reason.
    - `error`: tr(E·H·Eᵀ) / tr(W·H·Wᵀ), E the weight error: the output's relative squared error, on the calibration
      tokens; None where no data was looked at.
    """

    rung: str
    why: str | None = None
    error: float | None = None
    dead: int = 0
    notes: dict[str, float] = field(default_factory=dict)
