"""Optimizers that torch does not have: for rotations (Cayley SGD, QR-Orth) and for matrices (Zeta). Knows torch."""

from phasequant.optim.cayley import CayleySGD, cayley_step, orthonormality_error
from phasequant.optim.qr_orth import qr_orthogonal
from phasequant.optim.zeta import Zeta, coordinate_whiten, newton_schulz, orthogonalization_error, zeta_update

__all__ = [
    "CayleySGD",
    "Zeta",
    "cayley_step",
    "coordinate_whiten",
    "newton_schulz",
    "orthogonalization_error",
    "orthonormality_error",
    "qr_orthogonal",
    "zeta_update",
]
