"""`phasequant demo`: the whole walk on one model, six rows, one report.

16-bit; QuaRot W4A4KV4 with every activation in 4 bits; the same codes with DynamicPTQ's set, with its threshold rule,
and with the budget policy at the paper set's share in 8 bits; and with all activations in 8.

With a recipe whose transform is learned for the plan (`--recipe flat-quick`): 16-bit, QuaRot beside it, the recipe with
every activation in 4 bits, and learned again for DynamicPTQ's set, of which only those blocks are new.

Otherwise weights are quantized once: under round-to-nearest they do not depend on the plan, so the rows differ in
nothing but the grids that inputs are read on, and all of them are measured on the same chunks in one pass of the
original.
"""

import copy
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from phasequant import pipeline
from phasequant import text as texts
from phasequant.api import describe, figures
from phasequant.arch import ModelMap
from phasequant.checkpoint import check_target, new_folder
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import Candidate, score
from phasequant.plan import PrecisionPlan, Seen, make_plan
from phasequant.recipe import Recipe
from phasequant.report import is_report, what_runs, write_page
from phasequant.source import Source, open_model

QUAROT, OWN_NAME = "quarot", {"quarot": "QuaRot"}


def _title(name: str, activations: int = 4) -> str:
    return f"{OWN_NAME.get(name, name)} W4A{activations}KV4"


def demo_plans(recipe: Recipe, model_map: ModelMap, seen: Seen, name: str = QUAROT) -> dict[str, PrecisionPlan]:
    """Name of a row → its plan. `budget` gets the share that the paper's set takes."""
    paper = make_plan(recipe.with_("policy.name=paper"), model_map, None)
    budget = recipe.with_("policy.name=budget", policy={"a8_share": paper.a8_share})
    return {
        _title(name): make_plan(recipe, model_map, None),
        "+ DynamicPTQ paper set": paper,
        "+ threshold": make_plan(recipe.with_("policy.name=threshold"), model_map, seen),
        "+ budget, same share": make_plan(budget, model_map, seen),
        _title(name, 8): make_plan(recipe.with_("activations.bits=8", "activations.clip=1.0"), model_map, None),
    }


def _learned_rows(
    source: Source, name: str, recipe: Recipe, made: pipeline.Transformed
) -> tuple[dict[str, pipeline.Quantized], str]:
    """Rows of a recipe that is learned for its plan, and which of them the page shows."""

    def copied() -> Source:
        return replace(source, model=copy.deepcopy(source.model))

    own, paper = _title(name), "+ DynamicPTQ paper set"
    quarot = Recipe.load(QUAROT).with_(calibration=recipe.calibration.model_dump())
    runs = {_title(QUAROT): pipeline.run(copied(), quarot)}
    runs[own] = pipeline.finish(made, make_plan(recipe, source.map, None))
    runs[paper] = pipeline.run(copied(), recipe.with_("policy.name=paper"))
    return runs, paper


def run_demo(
    model: str, output: Path, *, text: str, calib: str | None, chunks: int, device: str, recipe: str = QUAROT
) -> tuple[dict[str, Any], Path]:
    """Run it; the report and the path of its page."""
    start = time.monotonic()
    target = output.expanduser()
    check_target(target, is_report)
    wanted = Recipe.load(recipe).with_("policy.name=uniform", calibration={"text": calib or texts.BUILTIN})
    if wanted.activations.bits >= 8 or wanted.weights.bits == 16 or wanted.kv.bits == 16:
        raise PhaseQuantError(f"the demo shows what 4 bits do: recipe '{recipe}' is not W4A4KV4")
    corpus = texts.find(text, "evaluation")
    source = open_model(model, device)
    tokens = texts.cut(corpus, source.tokenizer, 2048, chunks)
    work = replace(source, model=copy.deepcopy(source.model))
    made = pipeline.observe_and_transform(work, wanted, raw=True, transformed=True, noise=True)
    seen = pipeline.seen_of(made, wanted.with_("policy.name=budget"))
    assert seen is not None
    candidates: dict[str, Candidate]
    if pipeline.follows_plan(wanted):
        runs, shown = _learned_rows(source, recipe, wanted, made)
        candidates = {name: run.model for name, run in runs.items()}
        rows_plans = {name: run.plan for name, run in runs.items()}
        models = {name: run.model for name, run in runs.items()}
        run = runs[shown]
    else:
        rows_plans, shown = demo_plans(wanted, source.map, seen, recipe), "+ budget, same share"
        run = pipeline.finish(made, rows_plans[_title(recipe)])
        candidates = {name: partial(run.reading, plan) for name, plan in rows_plans.items()}
        models = dict.fromkeys(rows_plans, run.model)
    scores, original = score(candidates, tokens, source.model)
    assert original is not None
    rows = [{"name": "16-bit", **figures(source.model, source.map, replace(original, kl=0.0), 0.0)}]
    rows += [
        {"name": name, **figures(models[name], source.map, scores[name], plan.a8_share)}
        for name, plan in rows_plans.items()
    ]
    chosen = rows_plans[shown]
    report = {
        **describe(source, wanted, made.transform, made.observations, made.calibration, made.cost),
        "weights": run.origin["weights"],
        "plan": chosen.to_dict(),
        "plans": {name: plan.to_dict() for name, plan in rows_plans.items()},
        "sensitivity": seen.sensitivity and seen.sensitivity.to_dict(),
        "runs": what_runs(source.map, chosen, source.compute, source.model.dtype),
        "results": rows,
        "evaluation": {"text": corpus.source, "sha256": corpus.sha256, "chunks": len(tokens), "seqlen": 2048},
        "seconds": round(time.monotonic() - start, 1),
    }
    with new_folder(target, is_report) as partial_folder:
        (partial_folder / "recipe.yaml").write_text(wanted.to_yaml(), encoding="utf-8")
        (partial_folder / "plan.json").write_text(chosen.to_json(), encoding="utf-8")
        write_page(report, partial_folder)
    return report, target / "report.html"
