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
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from phasequant.errors import PhaseQuantError
from phasequant.numerics.linear_map import LinearMap

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


def spreading_rotation(n: int, seed: int | None = None, *, randomize: bool = False, copies: int = 1) -> LinearMap:
    """The rotation for width n on the highest rung that reaches it; `randomize` adds seeded random signs. `copies` of
    it side by side act on a width of copies·n (one a head, say).

    Signs act before the mixing, since after it they would change no magnitude.
    """
    signs = None
    if randomize:
        generator = torch.Generator().manual_seed(seed or 0)
        signs = torch.randint(0, 2, (n,), generator=generator).mul(2).sub(1).to(torch.float64).repeat(copies)

    def rotation(rung: Rung, a: Tensor, b: Tensor | None, blocks: int = 1) -> LinearMap:
        right = b[None] if b is not None and len(b) > 1 else None
        return LinearMap(rung, a[None], right, blocks * copies, diagonal=signs)

    if n == 1:
        return rotation("identity", torch.ones(1, 1, dtype=torch.float64), None)
    pair = factors(n)
    if pair is not None:
        return rotation("hadamard", hadamard(pair[0]), hadamard(pair[1]))
    block = max(d for pair in _splits(n) for d in pair if factors(d) is not None)
    if block >= SMALLEST_BLOCK:
        a, b = factors(block) or (block, 1)
        return rotation("block-hadamard", hadamard(a), hadamard(b), n // block)
    return rotation("random-orthogonal", random_orthogonal(n, seed or 0), None)


def spreading_mix(heads: int, width: int, seed: int | None = None) -> LinearMap:
    """M ⊗ I_width: the same rotation across `heads` for each of their channels."""
    one = spreading_rotation(heads, seed)
    matrix = one.matrix()
    return LinearMap(one.kind, matrix[None], tail=width)
