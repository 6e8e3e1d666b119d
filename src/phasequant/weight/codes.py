"""What every weight method gives back, and what it has to tell about it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Integer
from torch import Tensor

from phasequant.numerics import QuantSpec, dequantize


class WeightCodes(NamedTuple):
    """Codes (O, I) with scales and zero points (O, G); `peak`: what NVFP4 takes its second scale from."""

    codes: Integer[Tensor, "O I"]
    scale: Float[Tensor, "O G"]
    zero: Float[Tensor, "O G"]
    peak: Float[Tensor, ""] | None = None

    def rows(self, counts: list[int]) -> list["WeightCodes"]:
        """The codes of linears that were stacked."""
        columns = (self.codes.split(counts), self.scale.split(counts), self.zero.split(counts))
        return [WeightCodes(*piece, self.peak) for piece in zip(*columns, strict=True)]

    def values(self, spec: QuantSpec) -> Float[Tensor, "O I"]:
        """What the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero, spec)


def peak_of(weight: Float[Tensor, "O I"], spec: QuantSpec) -> Float[Tensor, ""] | None:
    """The largest magnitude of a weight, where its grid needs it."""
    return weight.abs().amax() if spec.kind == "nvfp4" else None


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
