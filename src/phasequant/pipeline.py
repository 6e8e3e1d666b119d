"""The walk: source → observe → isolate → plan → transform → weights → a quantized model in memory.

A prefix is found first, on the raw model: all that is measured or learned later sees it.

A plan is made before what is learned for it: a transform that does not see bits (QuaRot, FRTQ …) is applied first and
the plan made in its coordinates; one that does (FlatQuant, SpinQuant, learned clips) is drafted at all-low on a copy,
the plan made there, and the transform then learned for that plan. Weights come last. Everything else happens in place
on the source's model.
"""

import copy
from dataclasses import replace
from pathlib import Path

from phasequant import transform
from phasequant.console import note, warn
from phasequant.finishing import branch_macs, finish, with_learned_clips
from phasequant.observe import Observations
from phasequant.plan import NEEDS_NOISE, NEEDS_OBSERVATIONS, PrecisionPlan, Seen, make_plan
from phasequant.planning import planned, seen_of
from phasequant.preparing import (
    Transformed,
    calibration_tokens,
    check_fresh,
    give_prefix,
    observe_and_transform,
    observe_raw,
)
from phasequant.quantized import Quantized
from phasequant.ranks import agreed
from phasequant.recipe import Recipe
from phasequant.source import Source

__all__ = [
    "Quantized",
    "Transformed",
    "branch_macs",
    "calibration_tokens",
    "check_plan",
    "finish",
    "follows_plan",
    "give_prefix",
    "observe_and_transform",
    "plan_and_transform",
    "planned",
    "run",
    "seen_of",
    "sees_plan",
    "with_learned_clips",
]


def check_plan(plan: PrecisionPlan, recipe: Recipe, source: Source) -> None:
    """A plan that is given decides the bits; say where that differs from the recipe."""
    pairs = (
        ("weights", plan.weights, recipe.weights.spec()),
        ("kv", plan.kv, recipe.kv.spec(source.map.shape.d_head)),
        ("activations", plan.low, recipe.activations.spec()),
    )
    for part, given, wanted in pairs:
        if given != wanted:
            warn(f"the plan gives {part} {given or '16 bits'}, the recipe {wanted or '16 bits'}: the plan is followed")


def sees_plan(recipe: Recipe) -> bool:
    """Whether the recipe's transform, its clips or its weights' codes are found for the bits that a plan gives."""
    codes = recipe.weights.bits < 16 and recipe.weights.method == "gptq" and recipe.weights.hessian != "full"
    return transform.METHODS[recipe.transform.method].sees_plan or bool(recipe.learned_clips) or codes


def follows_plan(recipe: Recipe) -> bool:
    """Whether a quantized model of this recipe is made for one plan: what is polished is polished for its bits."""
    return sees_plan(recipe) or recipe.finetune.on


def plan_and_transform(source: Source, recipe: Recipe) -> tuple[Transformed, PrecisionPlan]:
    """The recipe's plan, observing only what its policy needs, and its transform, learned for that plan."""
    name, raw_only = recipe.policy.name, recipe.policy.coordinates == "raw"
    raw = name == "threshold" and raw_only
    after = (name in NEEDS_OBSERVATIONS and not raw) or recipe.exclude.method != "none"
    noise = name in NEEDS_NOISE and recipe.policy.score == "noise"
    if not sees_plan(recipe):
        made = observe_and_transform(source, recipe, raw=raw, transformed=after, noise=noise)
        return made, planned(made)
    # A plan comes before what is learned for it: it is made on a copy, which carries the transform learned at all-low.
    observations: list[Observations] = []
    calibration = None
    if raw:
        check_fresh(source)
        tokens, calibration = calibration_tokens(source, recipe)
        observations = observe_raw(source, recipe, tokens)
    give_prefix(source, recipe)
    draft = None
    if after:
        copied = replace(source, model=copy.deepcopy(source.model))
        draft = observe_and_transform(copied, recipe, raw=False, transformed=True, noise=noise, rough=True)
        observations, calibration = [*observations, *draft.observations], draft.calibration
    if draft is None:
        plan = make_plan(recipe, source.map, Seen(*observations) if observations else None)
    else:
        drafted = planned(replace(draft, observations=observations))
        plan = replace(drafted, clips={}, rows=None)  # those are of the draft's transform
    made = observe_and_transform(source, recipe, raw=False, transformed=False, noise=False, plan=plan)
    return replace(made, observations=observations, calibration=calibration), plan


def run(source: Source, recipe: Recipe, plan: PrecisionPlan | None = None, work: Path | None = None) -> Quantized:
    """Everything, observing only what the policy needs. In place on the source's model. `work`: see `finish`."""
    if plan is not None:
        check_plan(plan, recipe, source)
        given = observe_and_transform(source, recipe, raw=False, transformed=False, noise=False, plan=plan)
        return finish(given, plan, work)
    transformed, made = plan_and_transform(source, recipe)
    made = agreed(made)
    note(
        f"plan: {made.policy}, {len(made.raised)} groups raised, A8 share {100 * made.a8_share:.1f} %, "
        f"inputs of {made.input_bits:.2f} bits on average"
    )
    return finish(transformed, made, work)
