r"""What the weight methods know of an input: H = Σ_t x_t·x_tᵀ, and where the 16-bit model would have another x, C.

    hessian: full      x as it comes, before it is rounded
    hessian: rounded   Q(x), what the kernel multiplies
    hessian: mixed     the mean of both

Where weights shall give the 16-bit model's *outputs* (target: outputs), its own input u at the same place is kept too,
C = Σ_t u_t·x_tᵀ with G = Σ_t x_t·x_tᵀ of the x before rounding, and the weights that do that best are

    W* = argmin ‖W·U - W*·X‖² + λ‖W* - W‖² = W + W·(C - G)·(G + λI)^{-1},     ‖W·U - Ŵ·X‖² = ‖(W* - Ŵ)·X‖² + const

so that quantizing W* with H makes up for what quantizing did to x in all blocks before (the aim of GPTAQ, arXiv
2504.02692, and Qronos, arXiv 2505.11695, here by one solve). λ is the damping, in units of G's mean diagonal. The
rounding of x itself is left out of C and G: it is noise, against which least squares shrinks the weights, and a shrunk
model was worse (LOG.md).

`shrunk` is for inputs that few tokens reach (an expert of a mixture): their H is drawn to that of all tokens.
Memory: one to three I × I matrices, fp32.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.ranks import Dealt
from phasequant.weight.gptq import factor, normalized


class Moments:
    """Sums over the tokens of one group's input, of width I."""

    def __init__(self, width: int, device: torch.device, kind: str = "full", cross: bool = False) -> None:
        self.kind = kind
        self.hessian = torch.zeros(width, width, device=device)
        self.cross = torch.zeros(width, width, device=device) if cross else None
        self.plain = self.hessian if kind == "full" or not cross else torch.zeros_like(self.hessian)
        self.tokens = 0
        self.borrowed = 0  # as many of the inputs of all experts are in H for want of its own

    def add(
        self,
        x: Float[Tensor, "T I"],
        rounded: Callable[[Tensor], Tensor] | None,
        original: Float[Tensor, "T I"] | None = None,
    ) -> None:
        """Tokens more: `x` before its grid rounds it (None: it has none), `original` what the 16-bit model has
        there."""
        x = x.float()
        seen = [x] if self.kind == "full" or rounded is None else [rounded(x)]
        if self.kind == "mixed" and rounded is not None:
            seen.append(x)
        for one in seen:
            self.hessian.addmm_((one / len(seen)).T, one)
        if self.cross is not None:
            assert original is not None
            self.cross.addmm_(original.float().T, x)
            if self.plain is not self.hessian:
                self.plain.addmm_(x.T, x)
        self.tokens += len(x)

    def together(self, dealt: Dealt) -> None:
        """Add what other ranks have seen."""
        sums = [self.hessian, self.cross, self.plain if self.plain is not self.hessian else None]
        for one in sums:
            if one is not None:
                dealt.total(one)
        self.tokens = dealt.total(self.tokens)


def best_weights(
    weight: Float[Tensor, "O I"], moments: Moments, damping: float
) -> tuple[Float[Tensor, "O I"], str | None]:
    """(W*, None), or (W, why) where the solve is not of use; W too where there is no C, and nothing to tell."""
    if moments.cross is None or not bool((moments.plain.diagonal() > 0).any()):
        return weight, None
    scaled, _ = normalized(moments.plain)
    upper, why = factor(scaled, damping)
    if upper is None:
        return weight, f"the 16-bit outputs could not be aimed at: {why}"
    mean = moments.plain.diagonal()[moments.plain.diagonal() > 0].mean()
    shift = weight @ ((moments.cross - moments.plain) / mean)
    half = torch.linalg.solve_triangular(upper.T, shift, upper=False, left=False)
    found = weight + torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    if not bool(torch.isfinite(found).all()):
        return weight, "the 16-bit outputs could not be aimed at: the solve is not finite"
    return found, None


def shrunk(
    hessian: Float[Tensor, "I I"], tokens: int, shared: Float[Tensor, "I I"], shared_tokens: int, least: int
) -> Float[Tensor, "I I"]:
    """H of an input that `tokens` tokens reached, with as many tokens of `shared` (the same input, over all
    `shared_tokens`) as it lacks to `least`; the H itself where it lacks none."""
    if tokens >= least or shared_tokens == 0:
        return hessian
    return hessian + shared * ((least - tokens) / shared_tokens)
