r"""A low-rank branch in 16 bits beside the codes, so that what is rounded has smaller peaks.

    W ≈ Q(W - L) + L,    L = B·A,   B (O, r), A (r, I)         y = Q(x)·Q(W - L)ᵀ + (x·Aᵀ)·Bᵀ

    svd     L = SVD_r(W): takes the largest directions of W
    loftq   L ← SVD_r(W - Q(W - L)): takes what rounding leaves (LoftQ, arXiv 2310.08659; SVDQuant, arXiv 2411.05007)
    tsvd    τ ← η·min(τ, rowmax|W - L|),  L ← SVD_r(W - clip(W - L, -τ, τ)): takes each row's peaks, slowly, which
            sets the row's step (FRTQ's tuned truncated SVD with ℓ∞ row updates, as its reviews describe it; η = 0.97)

of the iterations (tsvd: every fifth) the one with the least rounding error is kept. `weighting: hessian` measures all
of this where the inputs are: with H = S·Sᵀ, SVD_r(M) becomes SVD_r(M·S)·S^{-1} and the error ‖E·S‖². A and B are
rounded to their stored type before the residual W - B·A is formed, so that codes make up for it. All linears that read
one input share A.

Nothing is folded; online are r·(I + O) multiply-adds a token and linear group, beside I·O. A kernel reads x once for
x·Aᵀ and for its codes, and adds (x·Aᵀ)·Bᵀ where it scales its integers (Nunchaku's fusion). The SVD of the first
iteration is exact; later ones are two steps of subspace iteration from the one before, with 8 directions to spare.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.errors import PhaseQuantError
from phasequant.numerics import QuantSpec, dequantize, quantize
from phasequant.weight.codes import peak_of

SPARE = 8  # directions more than the rank, so that subspace iteration finds the rank's
LOOKS = 5  # tsvd: every so many steps the rounding error is looked at
MSE_STEP = 4  # every fourth ratio of the clip search: the choice of an iteration needs no finer one


@dataclass(frozen=True)
class Branch:
    """A (r, I) and B (O, r)."""

    down: Float[Tensor, "r I"]
    up: Float[Tensor, "O r"]

    def product(self) -> Float[Tensor, "O I"]:
        """B·A, fp32."""
        return self.up.float() @ self.down.float()


class _Truncated:
    """SVD_r of a slowly changing matrix."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._basis: Tensor | None = None

    def __call__(self, matrix: Float[Tensor, "O I"]) -> tuple[Float[Tensor, "O r"], Float[Tensor, "r I"]]:
        """(U·Σ^½, Σ^½·Vᵀ)."""
        if self._basis is None:
            _, _, rows = torch.linalg.svd(matrix, full_matrices=False)
            self._basis = rows[: self.rank + SPARE].T
        else:
            for _ in range(2):
                self._basis = torch.linalg.qr(matrix.T @ (matrix @ self._basis)).Q
        u, s, v = torch.linalg.svd(matrix @ self._basis, full_matrices=False)
        root = s[: self.rank].sqrt()
        return u[:, : self.rank] * root, root[:, None] * (v[: self.rank] @ self._basis.T)


def split(
    weight: Float[Tensor, "O I"],
    spec: QuantSpec,
    rank: int,
    method: str = "tsvd",
    *,
    root: Float[Tensor, "I I"] | None = None,
    iterations: int = 60,
    shrink: float = 0.97,
    stored: torch.dtype = torch.bfloat16,
    place: str = "a weight",
) -> tuple[Branch, Float[Tensor, "O I"], dict[str, float]]:
    """(branch, residual, notes): weight = branch.product() + residual, to rounding in fp32. `root`: S, upper
    triangular, of H = S·Sᵀ.

    Raises `PhaseQuantError` where the rank is not below both sides of the weight.
    """
    weight = weight.float()
    if not 0 < rank < min(weight.shape):
        raise PhaseQuantError(
            f"{place}: lowrank.rank {rank} is not between 1 and {min(weight.shape) - 1}, the sides of its "
            f"{weight.shape[0]} × {weight.shape[1]} weight: lower it, or give the group its own in lowrank.ranks"
        )
    truncated = _Truncated(rank)

    def fitted(matrix: Tensor) -> Branch:
        up, down = truncated(matrix if root is None else matrix @ root)
        if root is not None:
            down = torch.linalg.solve_triangular(root, down, upper=True, left=False)
        return Branch(down.to(stored), up.to(stored))

    coarse = replace(spec, clip="mse")

    def rounded(residual: Tensor) -> tuple[Tensor, float]:
        made = dequantize(*quantize(residual, coarse, mse_step=MSE_STEP, peak=peak_of(residual, coarse)), coarse)
        error = residual - made
        return made, float((error if root is None else error @ root).square().sum(dtype=torch.float64))

    before = rounded(weight)[1]
    branch = best = fitted(weight)
    residual = weight - branch.product()
    made, least = rounded(residual)
    first, at = least, 0
    peaks = residual.abs().amax(1)
    for step in range(1, iterations + 1 if method != "svd" else 1):
        if method == "loftq":
            branch = fitted(weight - made)
        else:
            peaks = shrink * torch.minimum(peaks, residual.abs().amax(1))
            branch = fitted(weight - residual.clamp(-peaks[:, None], peaks[:, None]))
        residual = weight - branch.product()
        if method == "tsvd" and step % LOOKS and step != iterations:
            continue
        made, error = rounded(residual)
        if error < least:
            best, least, at = branch, error, step
    residual = weight - best.product()
    notes = {
        "rank": float(rank),
        "svd_error": first / before,
        "branch_error": least / before,
        "iteration": float(at),
        "gsr": grid_to_std(weight, spec),
        "residual_gsr": grid_to_std(residual, spec),
    }
    return best, residual, notes


def grid_to_std(weight: Float[Tensor, "O I"], spec: QuantSpec) -> float:
    """Mean over rows of step / std, the step that of the row's largest magnitude (GSR of weights, FRTQ)."""
    return float((weight.abs().amax(1) / spec.highest / weight.std(1).clamp(min=1e-12)).mean())
