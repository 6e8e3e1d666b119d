r"""Orthogonal matrices that spread a vector evenly, for any width, cheap to apply.

A Hadamard matrix H of order n has entries ±1 and H·Hᵀ = n·I; scaled by 1/√n it is orthogonal and sends a spike on one
channel to equal magnitude on all. Orders: 1, 2, and every 4k up to 256 from the table that compressed-tensors ships
(from N. J. A. Sloane's library); 2^k for any k, since H_2 ⊗ H is Hadamard again. A width n = a·b of two such orders is
applied as two small products,

    x·(H_a ⊗ H_b)  =  H_aᵀ · X · H_b,      X = x laid out (a, b):      2·n·(a+b) operations a token instead of 2·n².

Where no such factors exist the next rung is taken, and said:

    hadamard            H_a ⊗ H_b                          576 = 24·24, 1536 = 32·48, 11008 = 64·172, 14336 = 112·128 …
    block-hadamard      I_m ⊗ H_a ⊗ H_b, block ≥ 16        13696 = 107·128: blocks of 128
    random-orthogonal   a dense matrix from a seeded normal   9 heads, 577: cost 2·n² a token

All vectors are rows: a rotation R acts as x → x·R.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from phasequant.errors import PhaseQuantError

Rung = Literal["identity", "hadamard", "block-hadamard", "random-orthogonal"]
SMALLEST_BLOCK = 16  # below this a block rotation spreads too little: a dense one is taken


@cache
def _table_path() -> Path:
    spec = importlib.util.find_spec("compressed_tensors")
    roots = list(spec.submodule_search_locations or []) if spec else []
    for root in roots:
        path = Path(root) / "transform" / "utils" / "hadamards.safetensors"
        if path.is_file():
            return path
    raise PhaseQuantError(
        "the table of Hadamard matrices was not found in the installed compressed-tensors: "
        "install compressed-tensors>=0.17"
    )


@cache
def table_orders() -> frozenset[int]:
    """The orders that the table holds."""
    with safe_open(_table_path(), framework="pt") as table:
        return frozenset(int(key) for key in table.keys())  # noqa: SIM118 (not a dict)


@cache
def is_order(n: int) -> bool:
    """Whether an n × n Hadamard matrix can be made here: of the table, or the double of one that can."""
    return n in table_orders() or (n % 2 == 0 and n > 2 and is_order(n // 2))


@cache
def hadamard(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal Hadamard matrix of order n, fp64. Deterministic: the table's, doubled where it does not reach."""
    if n in table_orders():
        with safe_open(_table_path(), framework="pt") as table:
            return table.get_tensor(str(n)).to(torch.float64) / n**0.5
    if not is_order(n):
        raise PhaseQuantError(f"no Hadamard matrix of order {n} can be made (1, 2, 4k ≤ 256, and their doubles)")
    return torch.kron(hadamard(2), hadamard(n // 2))


def _splits(n: int) -> Iterator[tuple[int, int]]:
    for a in range(1, int(n**0.5) + 1):
        if n % a == 0:
            yield n // a, a


@cache
def factors(n: int) -> tuple[int, int] | None:
    """The cheapest (a, b), a ≥ b, with n = a·b and both orders Hadamard; None where there is none."""
    fits = [(a, b) for a, b in _splits(n) if is_order(a) and is_order(b)]
    return min(fits, key=sum) if fits else None


def random_orthogonal(n: int, seed: int) -> Float[Tensor, "n n"]:
    """An orthogonal matrix drawn from the Haar measure: QR of a seeded normal, signs fixed; fp64."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


@dataclass(frozen=True, eq=False)
class Rotation:
    """x → x · diag(signs) · (I_blocks ⊗ left ⊗ right): orthogonal, as two small factors.

    `signs` (±1 by channel) are the random part of a randomized Hadamard; they act before the mixing, since after it
    they would change no magnitude.
    """

    rung: Rung
    blocks: int
    left: Float[Tensor, "a a"]
    right: Float[Tensor, "b b"]
    signs: Float[Tensor, " n"] | None = None

    @property
    def size(self) -> int:
        """The width it acts on."""
        return self.blocks * self.left.shape[0] * self.right.shape[0]

    @property
    def macs(self) -> int:
        """Multiply-adds a token, applied as factors (a factor of order 1 is free)."""
        return self.size * sum(side for side in (self.left.shape[0], self.right.shape[0]) if side > 1)

    def apply(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """x·R."""
        if self.signs is not None:
            x = x * self.signs.to(x)
        return apply_factors(x, self.left, self.right)

    def apply_inverse(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """x·Rᵀ."""
        x = apply_factors(x, self.left.T, self.right.T)
        return x if self.signs is None else x * self.signs.to(x)

    def __str__(self) -> str:
        a, b = self.left.shape[0], self.right.shape[0]
        shape = f"{a}⊗{b}" if b > 1 else f"{a}"
        return f"{self.rung} {shape if self.blocks == 1 else f'{self.blocks} blocks of {shape}'}"


def apply_factors(
    x: Float[Tensor, "*rows n"], left: Float[Tensor, "a a"], right: Float[Tensor, "b b"]
) -> Float[Tensor, "*rows n"]:
    """x · (I ⊗ left ⊗ right), computed in the precision of `x`."""
    a, b = left.shape[0], right.shape[0]
    parts = x.reshape(*x.shape[:-1], -1, a, b)
    if b > 1:
        parts = parts @ right.to(x)
    if a > 1:
        parts = left.to(x).T @ parts
    return parts.reshape(x.shape)


def spreading_rotation(n: int, seed: int | None = None, *, randomize: bool = False) -> Rotation:
    """The rotation for width n on the highest rung that reaches it; `randomize` adds seeded random signs."""
    one = torch.ones(1, 1, dtype=torch.float64)
    signs = None
    if randomize:
        generator = torch.Generator().manual_seed(seed or 0)
        signs = torch.randint(0, 2, (n,), generator=generator).mul(2).sub(1).to(torch.float64)
    if n == 1:
        return Rotation("identity", 1, one, one)
    pair = factors(n)
    if pair is not None:
        return Rotation("hadamard", 1, hadamard(pair[0]), hadamard(pair[1]), signs)
    block = max(d for pair in _splits(n) for d in pair if factors(d) is not None)
    if block >= SMALLEST_BLOCK:
        a, b = factors(block) or (block, 1)
        return Rotation("block-hadamard", n // block, hadamard(a), hadamard(b), signs)
    return Rotation("random-orthogonal", 1, random_orthogonal(n, seed or 0), one)
