r"""Jump Ratio and Historical Feature SNR: where a block rewrites the residual stream, and what 4 bits then lose.

For token t at block ℓ, x the residual entering, Δx what the block adds (DynamicPTQ, arXiv 2606.12487, Eq 1-2, 8-11):

    JR      = ‖Δx‖₂ / (‖x‖₂ + ε)
    Q_b(v)  = s·round(v/s),   s = (max v - min v) / (2^b - 1)                      per token
    SNR_b   = 10·log₁₀( ‖x‖² / (‖x̂ - x‖² + ε) ) dB,   x̂ = Q_b(x + Δx) - Δx

so the error is the rounding error of the *new* state and the signal the *old* one: what quantizing after the update
does to the features that were there before. Both are means over tokens. JR does not change under a rotation of the
residual; SNR does, and is reported in raw and in transformed coordinates. ε = 1e-8 (the paper gives none).
"""

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-8


def jump_ratio(x: Float[Tensor, "T D"], update: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
    """‖Δx‖/‖x‖ of every token."""
    return update.norm(dim=-1) / (x.norm(dim=-1) + EPSILON)


def analysis_quantize(x: Float[Tensor, "T D"], bits: int) -> Float[Tensor, "T D"]:
    """The paper's analysis quantizer Q_b: a step from the range of each token, no zero point, no clamp."""
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))
    return step * torch.round(x / step)


def historical_snr(x: Float[Tensor, "T D"], update: Float[Tensor, "T D"], bits: int) -> Float[Tensor, " T"]:
    """Historical Feature SNR of every token, dB."""
    error = analysis_quantize(x + update, bits) - update - x
    return 10 * torch.log10(x.square().sum(-1) / (error.square().sum(-1) + EPSILON) + EPSILON)
