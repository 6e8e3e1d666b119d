r"""Spending a budget of 8-bit (or other) activations where they buy most.

    minimize Σ harm(place, bits)   subject to   Σ price(place, bits) ≤ a8_share · price of raising all    (`knapsack`)

harm is a sensitivity (`policy.score`); what raising a group costs is `policy.price` (`prices`).
"""

from collections.abc import Mapping
from dataclasses import replace

from phasequant.arch import ModelMap, Place
from phasequant.numerics import QuantSpec
from phasequant.plan.knapsack import solve
from phasequant.plan.precision import Raised
from phasequant.plan.prices import Prices
from phasequant.plan.seen import Seen
from phasequant.recipe import Recipe
from phasequant.sensitivity import MEASURES, RUNS_MODEL, Ask, Sensitivity, bits_of


def high_grid(recipe: Recipe, low: QuantSpec, bits: int) -> QuantSpec | None:
    """The grid of a group that is raised to `bits`."""
    policy = recipe.policy
    if bits == 16:
        return None
    if policy.format == "fp8" or (policy.format == "auto" and not low.is_int):
        return QuantSpec.floating("fp8", policy.clip)
    if low.is_int:
        return replace(low, bits=bits, clip=policy.clip)
    return QuantSpec(bits, clip=policy.clip)


def choices(recipe: Recipe, low: QuantSpec) -> tuple[QuantSpec | None, ...]:
    """The grids that a group may be raised to."""
    policy = recipe.policy
    return tuple(high_grid(recipe, low, bits) for bits in policy.choices or (policy.bits,))


def prices(recipe: Recipe, model_map: ModelMap, seen: Seen, low: QuantSpec) -> Prices:
    """What raising a group costs by the recipe."""
    bits = [bits_of(spec) for spec in choices(recipe, low)]
    return Prices(recipe.policy, model_map, low.bits, bits, seen.timings)


def sensitivity(recipe: Recipe, model_map: ModelMap, seen: Seen, low: QuantSpec) -> Sensitivity:
    """The measure that the policy names: brought along where it ran the model, else read off the sweep."""
    policy = recipe.policy
    if seen.sensitivity is not None and seen.sensitivity.name == policy.score:
        return seen.sensitivity
    assert policy.score not in RUNS_MODEL, f"{policy.score} runs the model: it is measured before plans are made"
    ask = Ask(model_map, seen.at("transformed"), low, choices(recipe, low), policy.first_token)
    return MEASURES[policy.score](ask)


def spend(recipe: Recipe, model_map: ModelMap, seen: Seen, low: QuantSpec) -> dict[Place, Raised]:
    """The groups that are raised, with the reason."""
    found = sensitivity(recipe, model_map, seen, low)
    price = prices(recipe, model_map, seen, low)
    table: Mapping[Place, Mapping[int, float]] = {
        place: {bits: price.of(place, bits) for bits in by} for place, by in found.harm.items()
    }
    chosen = solve(found.harm, table, price.budget)
    grids = {bits_of(spec): spec for spec in choices(recipe, low)}
    worth = {
        place: max((found.gain(place, low.bits, bits) / max(table[place][bits], 1e-30) for bits in grids), default=0.0)
        for place in found.harm
    }
    order = sorted(worth, key=lambda place: -worth[place])
    return {
        place: Raised(grids[chosen[place]], _why(found, place, rank, len(order), low.bits, chosen[place], model_map))
        for rank, place in enumerate(order, start=1)
        if chosen[place] != low.bits and found.gain(place, low.bits, chosen[place]) > 0
    }


UNITS = {"noise": "noise in the residual stream", "kl": "nats a token of KL", "kl_alone": "nats a token of KL",
         "fisher": "nats a token by the Fisher form",
         "gradient": "nats a token of KL, to first order", "local": "error of its output"}  # fmt: skip


def _why(found: Sensitivity, place: Place, rank: int, of: int, low: int, bits: int, model_map: ModelMap) -> str:
    share = 100 * model_map.macs(place[1]) / model_map.macs_total
    gain = found.gain(place, low, bits)
    return (
        f"rank {rank} of {of} by {found.name}: {bits} bits save {gain:.3g} {UNITS.get(found.name, found.name)}, "
        f"for {share:.2f} % of the multiply-adds"
    )
