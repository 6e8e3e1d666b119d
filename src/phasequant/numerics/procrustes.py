r"""Orthogonal Procrustes: the rotation that brings X closest to B, also for a rotation of two small factors.

    min_R ‖X·R - B‖²,  R orthogonal      R = U·Vᵀ,  U·Σ·Vᵀ = svd(Xᵀ·B)              (Schönemann 1966)

For R = blockdiag(A_i ⊗ C_i) the same holds of one factor while the others stand still, with the products summed over
all that the factor does not touch; alternating between them never makes the distance larger. So a rotation that runs
online as two small products is fitted by the same rule as a dense one that is folded.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.numerics.linear_map import LinearMap


def polar(m: Float[Tensor, "*stack n n"]) -> Float[Tensor, "*stack n n"]:
    """The orthogonal factor U·Vᵀ of m = U·Σ·Vᵀ: the closest orthogonal matrix."""
    u, _, vt = torch.linalg.svd(m)
    return u @ vt


def _products(y: Tensor, b: Tensor, shared: bool) -> Tensor:
    """Σ over tokens (and blocks, where shared, and the last axis) of y_i·b_j; y, b (T, blocks, order, other)."""
    joined = [z.permute(1, 2, 0, 3).flatten(2) for z in (y, b)]  # (blocks, order, T·other)
    found = joined[0] @ joined[1].transpose(-1, -2)
    return found.sum(0, keepdim=True) if shared else found


def procrustes_step(x: Float[Tensor, "T n"], b: Float[Tensor, "T n"], rotation: LinearMap) -> LinearMap:
    """`rotation` with each of its factors in turn the best for x·R ≈ b. Its diagonal (signs) stays."""
    if rotation.diagonal is not None:
        x = x * rotation.diagonal.to(x)
    shape = (rotation.blocks, rotation.a, rotation.b)
    parts, goal = x.unflatten(-1, shape), b.unflatten(-1, shape)
    right = rotation.right
    mapped = parts if right is None else parts @ right.to(x)
    left = polar(_products(mapped, goal, rotation.left.shape[0] == 1).to(torch.float64))
    if right is not None:
        mapped = left.to(x).transpose(-1, -2) @ parts
        swapped = mapped.transpose(-1, -2), goal.transpose(-1, -2)
        right = polar(_products(*swapped, right.shape[0] == 1).to(torch.float64))
    return replace(rotation, left=left, right=right, kind="learned", orthogonal=True)
