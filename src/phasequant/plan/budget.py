r"""Spending a budget of 8-bit (or other) activations where they buy most.

    minimize Σ harm(place, bits)   subject to   Σ price(place, bits) ≤ a8_share · price of raising all    (`knapsack`)

harm is a sensitivity (`policy.score`); what raising a group costs is `policy.price` (`prices`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from phasequant.arch import ModelMap, Place
from phasequant.numerics import QuantSpec
from phasequant.plan.entries import Raised
from phasequant.plan.knapsack import solve
from phasequant.plan.prices import Prices
from phasequant.plan.seen import Seen
from phasequant.recipe import Recipe
from phasequant.sensitivity import KV, MEASURES, RUNS_MODEL, WEIGHTS, Ask, Sensitivity, bits_of


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
    base = {"weights": recipe.weights.bits, "kv": recipe.kv.bits}
    return Prices(recipe.policy, model_map, low.bits, bits, seen.timings, base)


def sensitivity(recipe: Recipe, model_map: ModelMap, seen: Seen, low: QuantSpec) -> Sensitivity:
    """The measure that the policy names: brought along where it ran the model, else read off the sweep."""
    policy = recipe.policy
    if seen.sensitivity is not None and seen.sensitivity.name == policy.score:
        return seen.sensitivity
    assert policy.score not in RUNS_MODEL, f"{policy.score} runs the model: it is measured before plans are made"
    ask = Ask(model_map, seen.at("transformed"), low, choices(recipe, low), policy.first_token)
    return MEASURES[policy.score](ask)


@dataclass(frozen=True)
class Spent:
    """What is raised, with the reasons: inputs of groups, weights of groups, keys and values of blocks."""

    raised: dict[Place, Raised]
    weights: dict[Place, Raised]
    kv: dict[int, Raised]


def allowed(recipe: Recipe, kind: str, base: QuantSpec | None) -> tuple[QuantSpec, ...]:
    """The grids of weights or KV that share the budget, the low one first; none where they do not."""
    bits = dict(recipe.policy.allow).get(kind)  # type: ignore[call-overload]
    return () if not bits or base is None else (base, *(replace(base, bits=b) for b in bits))


def spend(recipe: Recipe, model_map: ModelMap, seen: Seen, low: QuantSpec) -> Spent:
    """What is raised, with the reasons."""
    found = sensitivity(recipe, model_map, seen, low)
    price = prices(recipe, model_map, seen, low)
    table: Mapping[Place, Mapping[int, float]] = {
        place: {bits: price.of(place, bits) for bits in by} for place, by in found.harm.items()
    }
    chosen = solve(found.harm, table, price.budget)
    grids = {bits_of(spec): spec for spec in choices(recipe, low)}
    of_weights = {spec.bits: spec for spec in allowed(recipe, "weights", recipe.weights.spec())}
    of_kv = {spec.bits: spec for spec in allowed(recipe, "kv", recipe.kv.spec(model_map.shape.d_head))}
    lowest = {place: min(by) for place, by in found.harm.items()}
    worth = {
        place: max(
            (
                found.gain(place, lowest[place], bits) / max(table[place][bits], 1e-30)
                for bits in by
                if bits > lowest[place]
            ),
            default=0.0,
        )
        for place, by in found.harm.items()
    }
    order = sorted(worth, key=lambda place: -worth[place])
    spent = Spent({}, {}, {})
    for rank, place in enumerate(order, start=1):
        bits, least = chosen[place], lowest[place]
        if bits == least or found.gain(place, least, bits) <= 0:
            continue
        block, name = place
        why = _why(found, place, rank, len(order), least, bits, price)
        if name == KV:
            spent.kv[block] = Raised(of_kv[bits], why)
        elif name.startswith(WEIGHTS):
            spent.weights[block, name.removeprefix(WEIGHTS)] = Raised(of_weights[bits], why)
        else:
            spent.raised[place] = Raised(grids[bits], why)
    return spent


UNITS = {"noise": "noise in the residual stream", "kl": "nats a token of KL", "kl_alone": "nats a token of KL",
         "fisher": "nats a token by the Fisher form",
         "gradient": "nats a token of KL and loss, to first order", "local": "error of its output"}  # fmt: skip


def _why(found: Sensitivity, place: Place, rank: int, of: int, low: int, bits: int, price: Prices) -> str:
    gain = found.gain(place, low, bits)
    if price.policy.price == "macs":
        cost = f"{100 * price.map.macs(place[1]) / price.map.macs_total:.2f} % of the multiply-adds"
    else:
        cost = f"{price.of(place, bits):.4g} {price.unit}"
    return (
        f"rank {rank} of {of} by {found.name}: {bits} bits save {gain:.3g} {UNITS.get(found.name, found.name)}, "
        f"for {cost}"
    )
