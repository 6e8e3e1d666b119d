"""How well each sensitivity predicts, and what a plan by each is worth at the share of DynamicPTQ's four blocks.

    python benchmarks/plan/sensitivities.py --text wiki.test --calib wiki.train --recipes quarot [-o runs/plan]

For each recipe: every sensitivity is measured on calibration text, with its seconds; the gain of raising each group
from all-low to 8 bits is measured as KL on held-out text; Spearman's rank correlation of the two, over all groups.
Then plans at the paper set's A8 share: the paper's own, the best by each sensitivity, and by KL with swaps; perplexity
and KL of the quantized model on the text, with how much of the way from all-low to all-8 each recovers (of the
log-perplexity). Rows are kept in OUTPUT and not repeated. About 25 minutes a recipe on one core; transforms that see
the plan are learned for each plan.
"""

import argparse
import copy
import json
from dataclasses import replace
from math import log
from pathlib import Path

from scipy.stats import spearmanr

from phasequant import pipeline, planning
from phasequant import text as texts
from phasequant.evaluate import score
from phasequant.plan import Seen, choices, make_plan
from phasequant.recipe import Recipe
from phasequant.sensitivity import MEASURES, Ask, Runs
from phasequant.source import open_model


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--recipes", nargs="+", default=["quarot", "frtq"])
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--scores", nargs="+", default=list(MEASURES))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--swaps", type=int, default=24)
    parser.add_argument("--output", "-o", type=Path, default=Path("runs/plan"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for name in given.recipes:
        sets = [f"calibration.text={json.dumps(given.calib)}", *given.sets]
        path = given.output / f"{name}.{'_'.join(given.sets) or 'plain'}.{given.chunks}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        one(Recipe.load(name, sets), given, found, path)
        show(name, found)


def one(recipe: Recipe, given: argparse.Namespace, found: dict, path: Path) -> None:
    """All figures of one recipe, kept as they come."""

    def keep() -> None:
        path.write_text(json.dumps(found, indent=1))

    source = open_model(given.model)
    corpus = texts.find(given.text, "evaluation")
    chunks = texts.cut(corpus, source.tokenizer, 2048, given.chunks)
    held_out = chunks[:1, : given.tokens]
    budget = recipe.with_("policy.name=budget", f"policy.tokens={given.tokens}")
    work = replace(source, model=copy.deepcopy(source.model))
    made = pipeline.observe_and_transform(work, budget, raw=False, transformed=True, noise=True, rough=True)
    low = recipe.activations.spec()
    assert low is not None
    tokens, _ = pipeline.calibration_tokens(work, budget)
    length = min(tokens.shape[1], given.tokens)
    seen = made.observations[-1]
    grids = choices(budget, low)
    ask = Ask(
        work.map, seen, low, grids, False, Runs(work.model, tokens[: given.tokens // length, :length], work.compute),
        planning.clips_of(made, budget),
    )  # fmt: skip
    if "truth" not in found:
        truth = MEASURES["kl"](replace(ask, runs=Runs(work.model, held_out, work.compute)))
        found["truth"] = truth.to_dict()
        keep()
    measured = {p: found["truth"]["harm"][f"{p[0]}.{p[1]}"]["4"] for p in ask.places}
    kept = {}
    for name in given.scores:
        sensitivity = MEASURES[name](ask)
        kept[name] = sensitivity
        ours = [sensitivity.gain(p, low.bits, 8) for p in ask.places]
        cost = [work.map.macs(p[1]) for p in ask.places]
        truth_values = [measured[p] for p in ask.places]
        by_price = (
            [g / c for g, c in zip(ours, cost, strict=True)],
            [g / c for g, c in zip(truth_values, cost, strict=True)],
        )
        found.setdefault("scores", {})[name] = {
            "seconds": sensitivity.seconds,
            "spearman": float(spearmanr(ours, truth_values).statistic),
            "spearman_by_price": float(spearmanr(*by_price).statistic),
        }
        keep()
    share = make_plan(recipe.with_("policy.name=paper"), work.map, None).a8_share
    plans = {
        "all low": make_plan(recipe.with_("policy.name=uniform"), work.map, None),
        "paper": make_plan(recipe.with_("policy.name=paper"), work.map, None),
        "all 8": make_plan(recipe.with_("activations.bits=8", "activations.clip=1.0"), work.map, None),
    }
    for name, sensitivity in kept.items():
        wanted = budget.with_(f"policy.score={name}", policy={"a8_share": share})
        plans[name] = make_plan(wanted, work.map, Seen(seen, sensitivity=sensitivity))
    if "kl" in kept and given.swaps:
        wanted = budget.with_("policy.score=kl", policy={"a8_share": share, "swaps": given.swaps})
        plans["kl + swaps"] = pipeline.planned(made, wanted, Seen(seen, sensitivity=kept["kl"]))
    for name, plan in plans.items():
        if name in found.setdefault("plans", {}):
            continue
        fresh = replace(source, model=copy.deepcopy(source.model))
        if plan.low is not None and plan.low.bits == low.bits:
            plan = planning.with_searched_clips(plan, made, budget)
        run = pipeline.run(fresh, recipe.with_("policy.name=uniform"), plan)
        scores, original = score({"it": run.model}, chunks, source.model)
        assert original is not None
        found["plans"][name] = {
            "ppl": scores["it"].ppl, "kl": scores["it"].kl, "a8_share": plan.a8_share,
            "raised": sorted(f"{b}.{g}" for b, g in plan.raised), "ppl_16bit": original.ppl,
        }  # fmt: skip
        keep()


def show(name: str, found: dict) -> None:
    """The tables."""
    print(f"\n{name}")
    for score_name, row in found["scores"].items():
        print(f"  {score_name:9} {row['seconds']:6.1f} s   rank correlation {row['spearman']:.3f}, "
              f"by price {row['spearman_by_price']:.3f}")  # fmt: skip
    plans = found["plans"]
    low, high = log(plans["all low"]["ppl"]), log(plans["all 8"]["ppl"])
    for plan_name, row in plans.items():
        recovered = (low - log(row["ppl"])) / (low - high)
        print(f"  {plan_name:11} A8 {100 * row['a8_share']:5.1f} %   ppl {row['ppl']:8.3f}   KL {row['kl']:.4f}   "
              f"recovers {100 * recovered:5.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
