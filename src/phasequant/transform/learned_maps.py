"""Maps whose factors are parameters: any invertible ones, or rotations. Inverses of the small factors are taken at each
step."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.numerics import LinearMap, apply_map, polar
from phasequant.optim import qr_orthogonal


def inverse(factor: Float[Tensor, "m n n"]) -> Float[Tensor, "m n n"]:
    """Inverses of a stack of small matrices, without the check that would make a CUDA device wait."""
    return torch.linalg.inv_ex(factor, check_errors=False).inverse


class LearnedMap(nn.Module):
    """A `LinearMap` whose factors are parameters (or stay fixed)."""

    diagonal: Tensor | None

    def __init__(self, start: LinearMap, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.start = start
        self.left = nn.Parameter(start.left.to(dtype))
        self.right = nn.Parameter(start.right.to(dtype)) if start.right is not None else None
        self.register_buffer("diagonal", None if start.diagonal is None else start.diagonal.to(dtype))

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """The factors as they stand."""
        return self.left, self.right

    def forward(self, x: Tensor) -> Tensor:
        """x·T."""
        left, right = self.factors()
        return apply_map(x, left, right, tail=self.start.tail, diagonal=self.diagonal)

    def inverse_factors(self) -> tuple[Tensor, Tensor | None]:
        """Factors of T^{-T}."""
        left, right = self.factors()
        return inverse(left).transpose(-1, -2), None if right is None else inverse(right).transpose(-1, -2)

    def inverse_transpose(self, weight: Tensor, heads: tuple[int, int] | None = None) -> Tensor:
        """weight·T^{-T}; with `heads` (kv heads, heads), of a map of kv heads as all query heads see it."""
        left, right = self.inverse_factors()
        diagonal = None if self.diagonal is None else self.diagonal.reciprocal()
        if heads is not None:
            kv_heads, times = heads[0], heads[1] // heads[0]
            if len(left) > 1:
                left = left.unflatten(0, (kv_heads, -1)).repeat_interleave(times, 0).flatten(0, 1)
            if diagonal is not None:
                diagonal = diagonal.unflatten(0, (kv_heads, -1)).repeat_interleave(times, 0).flatten()
        return apply_map(weight, left, right, tail=self.start.tail, diagonal=diagonal)

    def result(self) -> LinearMap:
        """The map as it stands, fp64; the very start where it does not learn."""
        if not self.left.requires_grad:
            return self.start
        left, right = (None if f is None else f.detach().to("cpu", torch.float64) for f in self.factors())
        assert left is not None
        return replace(self.start, kind="learned", left=left, right=right, orthogonal=False)


class LearnedRotation(LearnedMap):
    """A map whose factors stay orthogonal by their optimizer (Cayley): its inverse transpose is itself."""

    def hold(self, on: bool) -> None:
        """Compute the factors once for many uses, where that costs anything; here it does not."""

    def inverse_factors(self) -> tuple[Tensor, Tensor | None]:
        """The factors themselves."""
        return self.factors()

    def result(self) -> LinearMap:
        """The rotation as it stands, fp64, cleaned of rounding; the very start where it does not learn."""
        if not self.left.requires_grad:
            return self.start
        left, right = (None if f is None else polar(f.detach().to("cpu", torch.float64)) for f in self.factors())
        assert left is not None
        return replace(self.start, kind="learned", left=left, right=right, orthogonal=True)


class QrRotation(LearnedRotation):
    """A rotation as the Q of free matrices (QR-Orth): any optimizer may move them."""

    _held: tuple[Tensor, Tensor | None] | None = None

    def hold(self, on: bool) -> None:
        """Take the QR now and use it until the next call: a rotation that all blocks share needs one a step."""
        self._held = None
        if on:
            self._held = self.factors()

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """Q of the QR decomposition, signs fixed."""
        if self._held is not None:
            return self._held
        return qr_orthogonal(self.left), None if self.right is None else qr_orthogonal(self.right)
