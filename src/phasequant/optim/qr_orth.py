r"""QR-Orth: an orthogonal matrix as the Q of a free one, so that any optimizer can train a rotation.

    Z = Q·R,  diag(R) > 0,      qr_orthogonal(Z) = Q

Z is unconstrained (n × p, n ≥ p) and is what the optimizer owns; the loss sees Q, and its gradient flows back through
the factorization. With the signs of R's diagonal fixed, the factorization of a Z of full column rank is unique: the map
is smooth there, and a matrix with orthonormal columns maps to itself, so training may start from a chosen rotation. Z·T
with T upper triangular and diag(T) > 0 gives the same Q. The gradient therefore has no part along Z·T: plain SGD never
shrinks Z, and turns Q by less a step as Z grows. Where Z loses rank, R is singular and the gradient not finite: start
from an orthogonal matrix.

Of a square Q the last column is what the others leave, so z_p gets no gradient and only chooses the sign: where q_p
turns by more than a right angle from z_p, that sign jumps and with it det(Q). A loss that ignores the signs of columns
(Whip, the error of a symmetric grid) does not notice; for others, such as Procrustes on a square matrix, take the
Cayley step.

Cost of a step for n = p, over that of the loss: Householder's R is (4/3)·n³ operations, forming Q as many again, the
backward pass two products and a triangular solve. The Cayley step of `cayley.py` is eight products, 16·n³.
DartQuant's own count is (4/3)·n³ against 6·n³. On one CPU core at n = 1024, forward and backward took 0.14 s, a Cayley
step 0.20 s; QR goes column by column where products do not, so on a GPU measure before choosing by the count.

Source: DartQuant (the QR-Orth scheme); signs as in Haar sampling by QR.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.errors import PhaseQuantError


def qr_orthogonal(z: Float[Tensor, "*batch n p"]) -> Float[Tensor, "*batch n p"]:
    """The Q of Z = Q·R with diag(R) > 0: orthonormal columns, differentiable, the identity on orthogonal matrices."""
    rows, columns = z.shape[-2:]
    if rows < columns:
        raise PhaseQuantError(
            f"qr_orthogonal: {rows} × {columns} has more columns than rows, which cannot be orthonormal: "
            "pass the transpose (and transpose the result)"
        )
    if z.dtype not in (torch.float32, torch.float64):
        raise PhaseQuantError(f"qr_orthogonal: there is no QR in {z.dtype}: keep the free matrix in float32 or float64")
    q: Tensor
    q, r = torch.linalg.qr(z)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(z.dtype)
    return q * signs[..., None, :]
