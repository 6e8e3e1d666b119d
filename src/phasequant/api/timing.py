"""Time a model's linears on this device, by the bits of their input."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from phasequant.api.arguments import Model, as_recipe, as_source
from phasequant.bench import time_linears
from phasequant.checkpoint import versions
from phasequant.errors import PhaseQuantError
from phasequant.numerics import QuantSpec
from phasequant.plan.prices import NOISE
from phasequant.recipe import Recipe


def bench_linears(
    model: Model,
    recipe: Recipe | str | Path = "quarot",
    *,
    overrides: Iterable[str] = (),
    tokens: int = 2048,
    bits: Iterable[int] = (4, 8, 16),
    device: str = "auto",
) -> dict[str, Any]:
    """Microseconds of every group's linears on this device, by the bits of their input; and what to make of them."""
    source = as_source(model, device)
    wanted = as_recipe(recipe, overrides)
    low = wanted.activations.spec() or QuantSpec()
    widths = sorted(set(bits))
    wrong = [width for width in widths if width != 16 and not 2 <= width <= 8]
    if wrong or not widths:
        raise PhaseQuantError(f"inputs have 2 to 8 bits, or 16: not {wrong[0] if wrong else 'none'}")
    if not low.is_int:
        raise PhaseQuantError(f"inputs of {low.kind} have no other number of bits: bench an integer recipe")
    grids = [None if width == 16 else replace(low.dynamic, bits=width, clip=1.0) for width in widths]
    found = time_linears(source.map, wanted.weights.spec(), grids, source.compute, tokens)
    by_bits = {width: sum(one.microseconds for one in found if one.bits == width) for width in widths}
    says = "; ".join(f"a block's linears at {width} bits: {total:,.0f} µs" for width, total in by_bits.items())
    if {4, 8} <= set(widths) and by_bits[8] <= (1 + NOISE) * by_bits[4]:
        says += ". 8-bit inputs cost nothing over 4-bit ones on this device: W4A8 is free here (activations.bits=8)"
    return {
        "model": source.name,
        "device": str(source.compute),
        "tokens": tokens,
        "linears": [one.to_dict() for one in found],
        "says": says,
        "versions": versions(),
    }
