r"""Grid-to-std ratio: how coarse a grid is against what it must resolve (FRTQ).

    ρ = Δ / std(row),   Δ = max|row| / (2^(b-1) - 1)   symmetric grid, b = 4

per token for activations, per output channel for weights. The normalized error of a fine uniform grid is ρ²/12; a
Gaussian row of 576 has ρ ≈ 0.46 (15.9 dB), a uniform one 0.247: the floor that flattening can reach.

Source: FRTQ (OpenReview mUB2N8L0vD), its abstract: ρ = Δ / std, per token and per channel. The body was not available;
the symmetric Δ, and population std, are our reading.
"""

from jaxtyping import Float
from torch import Tensor


def gsr(rows: Float[Tensor, "*rows width"], bits: int = 4) -> Float[Tensor, "*rows"]:
    """Grid-to-std ratio of every row; 0 where a row is constant."""
    step = rows.abs().amax(-1) / (2 ** (bits - 1) - 1)
    std = rows.std(-1, correction=0)
    return (step / std.clamp(min=1e-20)).where(std > 0, 0.0)
