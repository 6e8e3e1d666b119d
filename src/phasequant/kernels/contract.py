"""What a kernel is asked, and what it answers.

`LinearSpec` holds everything that decides whether a kernel computes the promised numbers, the activation grid
included. A kernel says `can_run(spec, device) -> (ok, reason)`; `choose` takes the first that can, and where none can
raises with every reason. Nothing falls back in silence: the chosen kernel's name is reported by `eval`.

A kernel may want the weights laid out another way than they are stored: `prepare` is asked once for that, and `linear`
is given what it returned for as long as neither tensors nor spec change (`QuantLinear` sees to it). What is prepared is
kept in memory beside the tensors, never saved, and must hold all that `linear` reads; it may hold the tensors
themselves, or be them.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from phasequant.numerics import QuantSpec


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear as a kernel sees it; `weight` or `input` None means 16 bits there. `rank`: of the low-rank
    branch, which reads the input as it comes, or (`branch_rounded`) as its grid rounds it. `dtype`: of the input as it
    comes, and so of the output; None where that is not asked."""

    in_features: int
    out_features: int
    weight: QuantSpec | None
    input: QuantSpec | None
    rank: int = 0
    branch_rounded: bool = False
    dtype: torch.dtype | None = None


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


Prepared = Any
"""What a kernel makes of `LinearTensors`: its own affair."""


@runtime_checkable
class Kernel(Protocol):
    """One way to compute a linear."""

    name: str

    def can_run(self, spec: LinearSpec, device: torch.device) -> tuple[bool, str]:
        """Whether this kernel gives the reference's numbers for `spec` on `device`; if not, why."""

    def prepare(self, weights: LinearTensors, spec: LinearSpec) -> Prepared:
        """The weights as `linear` wants them, on their device."""

    def linear(self, x: Tensor, weights: Prepared, spec: LinearSpec) -> Tensor:
        """(*, I) → (*, O), in the precision of `x`; `weights` from `prepare` under the same spec."""
