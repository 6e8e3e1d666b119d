"""A new policy: 8 bits before `down` in the first and the last third of the blocks.

A policy is a function (recipe part, map, observations) → {(block, group): why}; the reasons are what the plan, the
report and the checkpoint's manifest then say. From outside the package a plan is given as it is (`plan=`, `--plan`);
inside, it is named in `plan/policies.py` and in `PolicyPart.name`. Run: python docs/examples/policy.py [MODEL]
"""

import sys

import phasequant
from phasequant.arch import ModelMap, Place
from phasequant.numerics import QuantSpec
from phasequant.plan import Raised, Seen
from phasequant.recipe import PolicyPart, Recipe

RECIPE = "quarot"


def outer_down(policy: PolicyPart, model_map: ModelMap, seen: Seen | None) -> dict[Place, str]:
    """The input of `down` is the widest, and the ends of a model are the most fragile. Observations are not asked."""
    third = model_map.shape.blocks // 3
    ends = [block for block in model_map.blocks if block < third or block >= model_map.shape.blocks - third]
    return {(block, "down"): f"down in the outer {third} blocks" for block in ends}


def plan_of(recipe: Recipe, model_map: ModelMap) -> phasequant.PrecisionPlan:
    """The recipe's grids, and ours for what is raised."""
    eight = QuantSpec(8, symmetric=True, granularity="token")
    raised = outer_down(recipe.policy, model_map, None)
    return phasequant.PrecisionPlan(
        "outer-down",
        model_map,
        weights=recipe.weights.spec(),
        kv=recipe.kv.spec(model_map.shape.d_head),
        low=recipe.activations.spec(),
        raised={place: Raised(eight, why) for place, why in raised.items()},
    )


def main(model: str = "demo") -> dict[str, float]:
    """Perplexity under no plan, and under ours."""
    source = phasequant.open_model(model)
    plan = plan_of(Recipe.load(RECIPE), source.map)
    found = {
        "uniform": phasequant.evaluate(source, recipe=RECIPE, chunks=1, seqlen=256)["ppl"],
        "outer-down": phasequant.evaluate(source, recipe=RECIPE, plan=plan, chunks=1, seqlen=256)["ppl"],
        "A8 share": plan.a8_share,
    }
    print(found)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
