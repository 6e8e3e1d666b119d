"""What a kernel is asked, and what it answers.

`LinearSpec` holds everything that decides whether a kernel computes the promised numbers, the activation grid
included. A kernel says `can_run(spec, device) -> (ok, reason)`; `choose` takes the first that can, and where none can
raises with every reason. Nothing falls back in silence: the chosen kernel's name is reported by `eval`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from phasequant.numerics import QuantSpec


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear as a kernel sees it; `weight` or `input` None means 16 bits there. `rank`: of the low-rank
    branch, which reads the input as it comes, or (`branch_rounded`) as its grid rounds it."""

    in_features: int
    out_features: int
    weight: QuantSpec | None
    input: QuantSpec | None
    rank: int = 0
    branch_rounded: bool = False


@dataclass(frozen=True, slots=True)
class LinearTensors:
    """What a linear holds: packed codes with scales and zero points (O, G), or dense weights (O, I); of its branch
    A (r, I) and B (O, r); of a static input grid its calibrated (lowest, highest), (2, 1) or (2, I)."""

    dense: Tensor | None = None
    packed: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    input_range: Tensor | None = None


@runtime_checkable
class Kernel(Protocol):
    """One way to compute a linear."""

    name: str

    def can_run(self, spec: LinearSpec, device: torch.device) -> tuple[bool, str]:
        """Whether this kernel gives the reference's numbers for `spec` on `device`; if not, why."""

    def linear(self, x: Tensor, weights: LinearTensors, spec: LinearSpec) -> Tensor:
        """(*, I) → (*, O), in the precision of `x`."""
