r"""Invertible maps of channels, cheap to apply: the one form that every transform of this package takes.

    x → x · diag(d) · T,      T = blockdiag_i( A_i ⊗ B_i )

    dense              one block, no B          n² multiply-adds a token
    Kronecker          one block, n = a·b       x·(A ⊗ B) = Aᵀ·X·B, X = x laid out (a, b):  n·(a + b)
    block-diagonal     m blocks, no B           n·(n/m);  A_i shared by the blocks, or one each
    mixing of heads    A ⊗ I_tail               n·a, channels of one head move together

A reader of the mapped input holds W·T^{-T}, since (xT)·(W·T^{-T})ᵀ = x·Wᵀ; for an orthogonal T that is W·T. The
inverse transpose of such a map is one of the same form, so weights are changed by the same two small products.
All vectors are rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.errors import PhaseQuantError

ORTHOGONAL_WITHIN = 1e-6


def apply_map(
    x: Float[Tensor, "*rows n"],
    left: Float[Tensor, "#m a a"],
    right: Float[Tensor, "#m b b"] | None = None,
    *,
    tail: int = 1,
    diagonal: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*rows n"]:
    """x · diag(diagonal) · blockdiag(left ⊗ right), in the precision of `x`; `right` None means I of order `tail`.

    Differentiable in every argument. `left` and `right` of one matrix serve all blocks.
    """
    if diagonal is not None:
        x = x * diagonal.to(x)
    a, b = left.shape[-1], right.shape[-1] if right is not None else tail
    left = left.to(x)
    if b == 1:  # dense or block-diagonal
        if left.shape[0] == 1:
            return x @ left[0] if x.shape[-1] == a else (x.unflatten(-1, (-1, a)) @ left[0]).flatten(-2)
        return _by_block(x.unflatten(-1, (-1, 1, a)), left).flatten(-3)
    parts = x.unflatten(-1, (-1, a, b))
    if right is not None:
        parts = parts @ right[0].to(x) if right.shape[0] == 1 else _by_block(parts, right.to(x))
    if a > 1:
        if left.shape[0] == 1:
            parts = left[0].T @ parts
        else:
            parts = _by_block(parts.transpose(-1, -2), left).transpose(-1, -2)
    return parts.flatten(-3)


def _by_block(x: Float[Tensor, "*rows m a b"], matrices: Float[Tensor, "m b b"]) -> Float[Tensor, "*rows m a b"]:
    """Every block times its own matrix: one batched product over blocks, all rows of a block together. (Broadcasting
    would make a copy of the matrices for every token.)"""
    rows = x.movedim(-3, 0).reshape(len(matrices), -1, x.shape[-1])
    return (rows @ matrices).unflatten(1, (*x.shape[:-3], x.shape[-2])).movedim(0, -3)


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One map; see the module's docstring. Factors are fp64, their first axis 1 (shared) or `blocks`.

    `kind` names what it is for people: a rung of `numerics.hadamard`, or dense, kronecker, block-diagonal, learned.
    """

    kind: str
    left: Float[Tensor, "#m a a"]
    right: Float[Tensor, "#m b b"] | None = None
    blocks: int = 1
    tail: int = 1
    diagonal: Float[Tensor, " n"] | None = None
    orthogonal: bool = True

    @classmethod
    def dense(cls, matrix: Float[Tensor, "*m n n"], kind: str = "dense") -> "LinearMap":
        """x → x·matrix; a stack of matrices is block-diagonal."""
        left = matrix.detach().to(torch.float64)
        left = left[None] if left.ndim == 2 else left
        return cls(kind, left, blocks=left.shape[0], orthogonal=_is_orthogonal(left))

    @classmethod
    def kronecker(
        cls, left: Float[Tensor, "a a"], right: Float[Tensor, "b b"], kind: str = "kronecker", blocks: int = 1
    ) -> "LinearMap":
        """x → x·(left ⊗ right)."""
        a, b = left.detach().to(torch.float64)[None], right.detach().to(torch.float64)[None]
        return cls(kind, a, b if b.shape[-1] > 1 else None, blocks, orthogonal=_is_orthogonal(a) and _is_orthogonal(b))

    @classmethod
    def scaling(cls, diagonal: Float[Tensor, " n"]) -> "LinearMap":
        """x → x·diag."""
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        return cls("diagonal", one, blocks=len(diagonal), diagonal=diagonal.to(torch.float64), orthogonal=False)

    @property
    def a(self) -> int:
        """Order of the left factors."""
        return self.left.shape[-1]

    @property
    def b(self) -> int:
        """Order of the right factors, or of the identity in their place."""
        return self.right.shape[-1] if self.right is not None else self.tail

    @property
    def size(self) -> int:
        """The width it acts on."""
        return self.blocks * self.a * self.b

    @property
    def macs(self) -> int:
        """Multiply-adds a token, applied as factors (a factor of order 1 is free)."""
        sides = (self.a, self.right.shape[-1] if self.right is not None else 1)
        return self.size * sum(side for side in sides if side > 1)

    @property
    def shape_name(self) -> str:
        """Like 24⊗32, or 6 blocks of 96."""
        one = f"{self.a}⊗{self.b}" if self.right is not None else f"{self.a}"
        return one if self.blocks == 1 else f"{self.blocks} blocks of {one}"

    def apply(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """x·T."""
        return apply_map(x, self.left, self.right, tail=self.tail, diagonal=self.diagonal)

    def inverse_transpose(self) -> "LinearMap":
        """T^{-T}: what goes to the weights that read x·T, and to the queries of keys·T."""
        if self.orthogonal:
            return self
        return replace(
            self,
            left=torch.linalg.inv(self.left).transpose(-1, -2),
            right=None if self.right is None else torch.linalg.inv(self.right).transpose(-1, -2),
            diagonal=None if self.diagonal is None else self.diagonal.reciprocal(),
        )

    def apply_inverse(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """x·T⁻¹."""
        inverse = self.inverse_transpose()
        left = inverse.left.transpose(-1, -2)
        right = None if inverse.right is None else inverse.right.transpose(-1, -2)
        x = apply_map(x, left, right, tail=self.tail)
        return x if inverse.diagonal is None else x * inverse.diagonal.to(x)

    def for_heads(self, kv_heads: int, heads: int) -> "LinearMap":
        """A map of kv heads as the query heads see it: what belongs to a kv head, repeated for its query heads."""
        times = heads // kv_heads

        def repeated(values: Tensor | None, shared: bool) -> Tensor | None:
            if values is None or shared:
                return values
            return values.unflatten(0, (kv_heads, -1)).repeat_interleave(times, 0).flatten(0, 1)

        left = repeated(self.left, len(self.left) == 1)
        right = repeated(self.right, self.right is None or len(self.right) == 1)
        assert left is not None
        return replace(
            self, left=left, right=right, blocks=self.blocks * times, diagonal=repeated(self.diagonal, False)
        )

    def condition(self) -> float:
        """The condition number of T (with scales, a bound on it): how much it can amplify a rounding of the weights."""
        top: Tensor | float = 1.0
        bottom: Tensor | float = 1.0
        for side in (self.left, self.right):
            if side is not None:
                values = torch.linalg.svdvals(side)
                top, bottom = top * values.amax(-1), bottom * values.amin(-1)
        value = float(torch.as_tensor(top).max() / torch.as_tensor(bottom).min())
        if self.diagonal is not None:
            value *= float(self.diagonal.abs().amax() / self.diagonal.abs().amin())
        return value

    def matrix(self) -> Float[Tensor, "n n"]:
        """T written out, fp64."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def tensors(self) -> dict[str, Tensor]:
        """Its factors by name, for a file."""
        found = {"left": self.left, "right": self.right, "diagonal": self.diagonal}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def layout(self) -> dict[str, Any]:
        """All but the numbers, for JSON."""
        return {
            "kind": self.kind,
            "left": list(self.left.shape[:2]),
            "right": None if self.right is None else list(self.right.shape[:2]),
            "blocks": self.blocks,
            "tail": self.tail,
            "diagonal": self.diagonal is not None,
            "orthogonal": self.orthogonal,
        }

    @classmethod
    def from_layout(cls, layout: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "LinearMap":
        """The inverse of `layout` and `tensors`; shapes are checked."""
        shapes = layout_shapes(layout)
        for name, shape in shapes.items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                found = tuple(tensors[name].shape) if name in tensors else "missing"
                raise PhaseQuantError(f"a map's factor '{name}' is {found}, and its layout says {shape}")
        return cls(
            str(layout["kind"]),
            tensors["left"].to(torch.float64),
            tensors["right"].to(torch.float64) if "right" in shapes else None,
            int(layout["blocks"]),
            int(layout["tail"]),
            tensors["diagonal"].to(torch.float64) if "diagonal" in shapes else None,
            bool(layout["orthogonal"]),
        )

    def __str__(self) -> str:
        return f"{self.kind} {self.shape_name}" if self.kind != "diagonal" else "diagonal"


def layout_shapes(layout: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of a map's factors; `PhaseQuantError` where they do not fit each other."""
    blocks, tail = int(layout["blocks"]), int(layout["tail"])
    m, a = map(int, layout["left"])
    shapes: dict[str, tuple[int, ...]] = {"left": (m, a, a)}
    b = tail
    counts = {m}
    if layout["right"] is not None:
        r, b = map(int, layout["right"])
        shapes["right"] = (r, b, b)
        counts.add(r)
    if min(blocks, tail, a, b, *counts) < 1 or not counts <= {1, blocks}:
        raise PhaseQuantError(f"a map of {blocks} blocks cannot have {sorted(counts)} factors of order {a} and {b}")
    if layout["diagonal"]:
        shapes["diagonal"] = (blocks * a * b,)
    return shapes


def _is_orthogonal(factors: Float[Tensor, "m a a"]) -> bool:
    eye = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    return bool((factors @ factors.transpose(-1, -2) - eye).abs().amax() < ORTHOGONAL_WITHIN)
