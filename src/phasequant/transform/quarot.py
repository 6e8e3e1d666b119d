r"""QuaRot: fixed Hadamard rotations (arXiv 2404.00456).

With rows x, a block reads n(x)·diag(γ)·Wᵀ, n the RMSNorm without gain. Since ‖xR‖ = ‖x‖, n(xR) = n(x)·R, and

    n(x)·diag(γ)·Wᵀ  =  n(xR1)·(W·diag(γ)·R1)ᵀ

so R1 can be folded everywhere: embedding E·R1, readers W·diag(γ)·R1, writers R1ᵀ·W (bias b·R1), head W·diag(γ)·R1.
R2 rotates each value head (v: output, bias too; o: input). Before o the heads are mixed by M, so that o sees
M ⊗ R2 over the whole width; before down R4 acts on the product of the MLP; R3 on q and k after RoPE.

    folded   gains, R1, R2           free at inference
    online   M (heads), R3, R4       two small products each; `Transform.describe` counts the multiply-adds a token

R1 is a randomized Hadamard diag(±1)·H (seed of the recipe); R2, R3, R4 are plain. Where no Hadamard matrix exists the
ladder of `numerics.hadamard` decides, and the report says so: 9 heads take a random orthogonal M.

Not done: QuaRot's code also subtracts the mean of every embedding row. That suits LayerNorm; with RMSNorm it changes
the function (methods.md §4), so it is left out and logits are tested to stay.
"""

from phasequant.arch import ModelMap
from phasequant.numerics import spreading_rotation
from phasequant.transform.contract import Transform


def quarot(model_map: ModelMap, seed: int) -> Transform:
    """QuaRot's rotations for a model."""
    shape = model_map.shape
    return Transform(
        method="quarot",
        folds_norms=True,
        residual=spreading_rotation(shape.d_model, seed, randomize=True),
        value=spreading_rotation(shape.d_head, seed),
        heads=spreading_rotation(shape.heads, seed) if shape.heads > 1 else None,
        qk=spreading_rotation(shape.d_head, seed),
        down=spreading_rotation(shape.d_ffn, seed),
    )
