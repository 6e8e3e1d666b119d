r"""Cayley SGD: gradient descent on matrices with orthonormal rows, which stay so without a projection.

For X (p × n, p ≤ n, X·Xᵀ = I), gradient G and velocity V (n × p), with momentum β and learning rate η:

    V  ← β·V − Gᵀ
    Ŵ  = V·X − ½·Xᵀ·(X·V·X),      W = Ŵ − Ŵᵀ                  skew: the direction along the manifold
    α  = min(η, 1/(‖W‖₁ + 10⁻⁸))                              ‖αW/2‖ ≤ ½: the iteration below contracts
    Y₀ = Xᵀ + α·V,      Y ← Xᵀ + (α/2)·W·(Xᵀ + Y), 5 times    to Y = (I − αW/2)⁻¹·(I + αW/2)·Xᵀ, the Cayley transform
    V  ← W·Xᵀ (of the old X),      X ← Yᵀ

Each step first scales the rows of X to length 1. The transform is orthogonal, five iterations of it nearly so: the
error left is largest for small matrices and long steps (α at its bound), 10⁻³ a step at n = 8, 10⁻⁶ at 64, rounding at
512. SpinQuant's code retracts by QR at random, one step in 101; here it is done when it is needed: after a step with
max|X·Xᵀ − I| > tolerance, X ← Qᵀ of Xᵀ = Q·R, diag(R) > 0. So runs repeat, and after every step X is orthonormal to
the tolerance. In fp32 that asks for full products: with TF32 allowed, every step would retract. With β = 0 no state is
kept.

Cost a step: eight products of n·n·p multiply-adds, one of n·p·p for the check (and its wait for the device), a QR where
it retracts; memory two n × n matrices. Leading dimensions are a batch of independent matrices, each with its own α.

Source: Li, Li and Todorovic (arXiv 2002.01113), Cayley SGD with momentum; as SpinQuant (arXiv 2405.16406) uses it:
η = 1.5 with a cosine to 0 over 100 steps, β = 0, 5 iterations.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from phasequant.errors import PhaseQuantError
from phasequant.optim.checked import CheckedOptimizer
from phasequant.optim.qr_orth import qr_orthogonal

START = 1e-3  # a parameter farther than this from orthonormal at the start is a mistake, not rounding


def orthonormality_error(x: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch"]:
    """max|X·Xᵀ − I| of each matrix: how far its rows are from orthonormal."""
    gram = x @ x.mT
    return (gram - torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)).abs().amax((-2, -1))


def cayley_step(
    x: Float[Tensor, "*batch p n"], velocity: Float[Tensor, "*batch n p"], lr: float, iterations: int = 5
) -> tuple[Float[Tensor, "*batch p n"], Float[Tensor, "*batch n p"]]:
    """X moved along `velocity` by the iterated Cayley transform, and the velocity projected to X's tangent space."""
    columns = x.mT
    mixed = velocity @ x
    half = mixed - 0.5 * columns @ (x @ mixed)
    skew = half - half.mT
    alpha = (1 / (skew.abs().sum(-2).amax(-1) + 1e-8)).clamp(max=lr)[..., None, None]
    y = columns + alpha * velocity
    for _ in range(iterations):
        y = columns + (alpha / 2) * (skew @ (columns + y))
    return y.mT, skew @ columns


class CayleySGD(CheckedOptimizer):
    """SGD that keeps every parameter, a (…, p, n) tensor with orthonormal rows, orthonormal.

    `tolerance` bounds max|X·Xᵀ − I| after each step; it is reached by a QR where the step alone does not.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.5,
        momentum: float = 0.0,
        iterations: int = 5,
        tolerance: float = 1e-6,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "iterations": iterations, "tolerance": tolerance})

    def check(self, group: dict[str, Any]) -> None:
        """Refuse options and parameters that the step is not made for."""
        _check(group)

    def move(self) -> None:
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        x = parameter / torch.linalg.vector_norm(parameter, dim=-1, keepdim=True)
        velocity = -parameter.grad.mT  # type: ignore[union-attr]
        state = self.state[parameter]
        if "velocity" in state:
            velocity = group["momentum"] * state["velocity"] + velocity
        x, velocity = cayley_step(x, velocity, float(group["lr"]), group["iterations"])
        if group["momentum"] > 0:
            state["velocity"] = velocity
        if bool((orthonormality_error(x) > group["tolerance"]).any()):
            x = qr_orthogonal(x.mT).mT
        parameter.copy_(x)


def _check(group: dict[str, Any]) -> None:
    """Refuse options and parameters that the step is not made for."""
    if not (float(group["lr"]) >= 0 and 0 <= group["momentum"] < 1 and group["iterations"] >= 1):
        raise PhaseQuantError(
            f"CayleySGD: lr {group['lr']}, momentum {group['momentum']}, iterations {group['iterations']}: "
            "give lr ≥ 0, 0 ≤ momentum < 1, iterations ≥ 1"
        )
    for index, parameter in enumerate(group["params"]):
        place = f"CayleySGD: parameter {index} of its group, {parameter.dtype} {tuple(parameter.shape)},"
        if parameter.ndim < 2 or parameter.shape[-2] > parameter.shape[-1]:
            raise PhaseQuantError(f"{place} cannot have orthonormal rows: give (…, p, n) with p ≤ n")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise PhaseQuantError(f"{place} is too coarse to stay orthogonal: keep it in float32 or float64")
        error = orthonormality_error(parameter.detach()).max().item()
        if not error <= max(START, group["tolerance"]):
            raise PhaseQuantError(
                f"{place} is not orthonormal (max|XXᵀ − I| = {error:.2g}): "
                "start from a rotation, or from qr_orthogonal(x.mT).mT"
            )
