r"""Policies: from observations to the groups that read more bits.

    uniform     nobody
    paper       DynamicPTQ's fixed set: every group of blocks 0, 1, 2 and L-1 (arXiv 2606.12487, Eq 21)
    threshold   its rule S = {ℓ : JR_ℓ > τ_JR and SNR_ℓ < τ_SNR} (Eq 20), every group of those blocks. The paper gives
                no τ; without given ones τ_JR = median + IQR and τ_SNR = median - IQR over the blocks are taken
    budget      where a sensitivity says that low bits hurt most, within a share of the multiply-adds (`budget`)

A policy is a function (recipe part, map, observations) → {place: why}. Stronger planners are more such functions.
"""

import statistics
from collections.abc import Callable

from phasequant.arch import GROUPS, ModelMap, Place
from phasequant.errors import PhaseQuantError
from phasequant.observe import Observations
from phasequant.plan.budget import Spent, high_grid, spend
from phasequant.plan.entries import Raised
from phasequant.plan.precision import PrecisionPlan
from phasequant.plan.seen import Seen
from phasequant.recipe import PolicyPart, Recipe


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


BY_BLOCK: dict[str, Callable[[PolicyPart, ModelMap, Seen | None], dict[Place, str]]] = {
    "uniform": uniform,
    "paper": paper,
    "threshold": threshold,
}
"""Name in the recipe → function, of policies that raise groups to one grid."""

POLICIES = (*BY_BLOCK, "budget")

NEEDS_OBSERVATIONS = frozenset({"threshold", "budget"})
NEEDS_NOISE = frozenset({"budget"})


def make_plan(recipe: Recipe, model_map: ModelMap, seen: Seen | None) -> PrecisionPlan:
    """The recipe's plan for a model."""
    policy = recipe.policy
    low = recipe.activations.spec()
    if low is None and policy.name != "uniform":
        raise PhaseQuantError(
            f"policy.name={policy.name} raises groups above activations.bits, which is 16 already: "
            "set activations.bits, or policy.name=uniform"
        )
    if low is not None and policy.name != "uniform" and min(policy.choices or (policy.bits,)) <= low.bits:
        raise PhaseQuantError(
            f"policy.bits={policy.bits} does not raise anything above activations.bits={low.bits}: "
            "set policy.bits higher, or policy.name=uniform"
        )
    raised: dict[Place, Raised] = {}
    spent = Spent(raised, {}, {})
    if policy.name == "budget":
        assert seen is not None and low is not None
        spent = spend(recipe, model_map, seen, low)
        raised = spent.raised
    elif low is not None:
        high = high_grid(recipe, low, policy.bits)
        raised = {place: Raised(high, why) for place, why in BY_BLOCK[policy.name](policy, model_map, seen).items()}
    return PrecisionPlan(
        policy.name,
        model_map,
        recipe.weights.spec(),
        recipe.kv.spec(model_map.shape.d_head),
        low,
        raised,
        weights_raised=spent.weights,
        kv_raised=spent.kv,
    )
