r"""Policies: from observations to the groups that read more bits.

    uniform     nobody
    paper       DynamicPTQ's fixed set: every group of blocks 0, 1, 2 and L-1 (arXiv 2606.12487, Eq 21)
    threshold   its rule S = {ℓ : JR_ℓ > τ_JR and SNR_ℓ < τ_SNR} (Eq 20), every group of those blocks. The paper gives
                no τ; without given ones τ_JR = median + IQR and τ_SNR = median - IQR over the blocks are taken
    budget      groups in order of noise removed per multiply-add, until the share is spent. The noise of a group is
                what its own low-bit input adds to the residual stream (observe.noise); policy.score=ratio puts
                QFeM's max-median ratio in its place (observe.spikes)

A policy is a function (recipe part, map, observations) → {place: why}. Stronger planners are more such functions.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

from phasequant.arch import GROUPS, ModelMap, Place
from phasequant.errors import PhaseQuantError
from phasequant.numerics import QuantSpec
from phasequant.observe import Observations
from phasequant.plan.precision import PrecisionPlan, Raised
from phasequant.recipe import PolicyPart, Recipe

LOW = "low"  # the name of the noise measured on the recipe's own activation grid


class Seen:
    """Observations by coordinates; asking for what was not observed is a bug of the pipeline."""

    def __init__(self, *observations: Observations) -> None:
        # Of raw ones the last: behind the prefix, where there is one.
        self._by = {("raw" if o.coordinates.startswith("raw") else "transformed"): o for o in observations}

    def at(self, coordinates: str) -> Observations:
        """`raw` or `transformed`; the raw ones serve both where nothing was transformed."""
        return self._by.get(coordinates) or next(iter(self._by.values()))


def _whole_blocks(blocks: dict[int, str]) -> dict[Place, str]:
    return {(block, group): why for block, why in blocks.items() for group in GROUPS}


def uniform(policy: PolicyPart, model_map: ModelMap, seen: Seen | None) -> dict[Place, str]:
    """No group is raised."""
    return {}


def paper(policy: PolicyPart, model_map: ModelMap, seen: Seen | None) -> dict[Place, str]:
    """DynamicPTQ's blocks."""
    last = model_map.shape.blocks - 1
    chosen = sorted({b for b in (0, 1, 2, last) if b <= last and b >= 0})
    return _whole_blocks(dict.fromkeys(chosen, f"DynamicPTQ's fixed set {{0, 1, 2, {last}}}"))


def thresholds(policy: PolicyPart, observations: Observations) -> tuple[float, float]:
    """(τ_JR, τ_SNR): the given ones, or median ± interquartile range of the blocks."""

    def spread(values: list[float]) -> tuple[float, float]:
        if len(values) < 2:
            return values[0], 0.0
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return statistics.median(values), high - low

    ratio, ratio_iqr = spread(observations.jump_ratio.pick(policy.first_token))
    snr, snr_iqr = spread(observations.snr["4"].pick(policy.first_token))
    return (
        policy.tau_jr if policy.tau_jr is not None else ratio + ratio_iqr,
        policy.tau_snr if policy.tau_snr is not None else snr - snr_iqr,
    )


def threshold(policy: PolicyPart, model_map: ModelMap, seen: Seen | None) -> dict[Place, str]:
    """Blocks that jump and drown the past."""
    assert seen is not None
    observations = seen.at(policy.coordinates)
    tau_jr, tau_snr = thresholds(policy, observations)
    ratios = observations.jump_ratio.pick(policy.first_token)
    snrs = observations.snr["4"].pick(policy.first_token)
    return _whole_blocks(
        {
            block: f"Jump Ratio {ratios[block]:.2f} > {tau_jr:.2f}, SNR {snrs[block]:.1f} dB < {tau_snr:.1f} dB"
            for block in model_map.blocks
            if ratios[block] > tau_jr and snrs[block] < tau_snr
        }
    )


def budget(policy: PolicyPart, model_map: ModelMap, seen: Seen | None) -> dict[Place, str]:
    """Greedy: most noise removed per multiply-add first, skipping what no longer fits."""
    assert seen is not None
    groups = seen.at("transformed").groups
    if policy.score == "noise" and any(LOW not in g.noise for g in groups):
        raise PhaseQuantError("these observations have no noise by group, which 'budget' ranks by: observe again")
    by_noise = policy.score == "noise"
    ranked = sorted(groups, key=lambda g: -(g.noise[LOW] if by_noise else g.spike_ratio) / model_map.macs(g.group))
    left = policy.a8_share * model_map.macs_total * (1 + 1e-9)
    chosen: dict[Place, str] = {}
    for rank, g in enumerate(ranked, start=1):
        cost = model_map.macs(g.group)
        if cost <= left:
            left -= cost
            share = 100 * cost / model_map.macs_total
            said = f"its largest token is {g.spike_ratio:.1f} times its median one"
            if by_noise:
                noise = 10 * math.log10(max(g.noise[LOW], 1e-30))
                said = f"its low grid adds noise of {noise:.1f} dB to the residual stream"
            chosen[g.block, g.group] = (
                f"rank {rank} of {len(ranked)}: {said}, and it is {share:.2f} % of the multiply-adds"
            )
    return chosen


POLICIES: dict[str, Callable[[PolicyPart, ModelMap, Seen | None], dict[Place, str]]] = {
    "uniform": uniform,
    "paper": paper,
    "threshold": threshold,
    "budget": budget,
}
"""Name in the recipe → function."""

NEEDS_OBSERVATIONS = frozenset({"threshold", "budget"})
NEEDS_NOISE = frozenset({"budget"})


def _high(recipe: Recipe, low: QuantSpec) -> QuantSpec:
    """The grid of raised groups."""
    policy = recipe.policy
    floating = policy.format == "fp8" or (policy.format == "auto" and not low.is_int)
    if floating:
        return QuantSpec.floating("fp8", policy.clip)
    if low.is_int:
        return replace(low, bits=policy.bits, clip=policy.clip)
    return QuantSpec(policy.bits, clip=policy.clip)


def make_plan(recipe: Recipe, model_map: ModelMap, seen: Seen | None) -> PrecisionPlan:
    """The recipe's plan for a model."""
    policy = recipe.policy
    low = recipe.activations.spec()
    if low is None and policy.name != "uniform":
        raise PhaseQuantError(
            f"policy.name={policy.name} raises groups above activations.bits, which is 16 already: "
            "set activations.bits, or policy.name=uniform"
        )
    if low is not None and policy.name != "uniform" and policy.bits <= low.bits:
        raise PhaseQuantError(
            f"policy.bits={policy.bits} does not raise anything above activations.bits={low.bits}: "
            "set policy.bits higher, or policy.name=uniform"
        )
    high = None
    if low is not None and policy.bits != 16:
        high = _high(recipe, low)
    places = POLICIES[policy.name](policy, model_map, seen)
    return PrecisionPlan(
        policy.name,
        model_map,
        recipe.weights.spec(),
        recipe.kv.spec(model_map.shape.d_head),
        low,
        {place: Raised(high, why) for place, why in places.items()},
    )
