"""`phasequant demo`: the whole walk on one model, six rows, one report.

16-bit; QuaRot W4A4KV4 with every activation in 4 bits; the same codes with DynamicPTQ's set, with its threshold rule,
and with the budget policy at the paper set's share in 8 bits; and with all activations in 8.

Weights are quantized once: under round-to-nearest they do not depend on the plan, so the rows differ in nothing but the
grids that inputs are read on, and all of them are measured on the same chunks in one pass of the original.
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
from phasequant.evaluate import score
from phasequant.plan import PrecisionPlan, Seen, make_plan
from phasequant.recipe import Recipe
from phasequant.report import is_report, write_page
from phasequant.source import open_model

UNIFORM = "QuaRot W4A4KV4"


def demo_plans(recipe: Recipe, model_map: ModelMap, seen: Seen) -> dict[str, PrecisionPlan]:
    """Name of a row → its plan. `budget` gets the share that the paper's set takes."""
    paper = make_plan(recipe.with_("policy.name=paper"), model_map, None)
    budget = recipe.with_("policy.name=budget", policy={"a8_share": paper.a8_share})
    return {
        UNIFORM: make_plan(recipe, model_map, None),
        "+ DynamicPTQ paper set": paper,
        "+ threshold": make_plan(recipe.with_("policy.name=threshold"), model_map, seen),
        "+ budget, same share": make_plan(budget, model_map, seen),
        "QuaRot W4A8KV4": make_plan(recipe.with_("activations.bits=8", "activations.clip=1.0"), model_map, None),
    }


def run_demo(
    model: str, output: Path, *, text: str, calib: str | None, chunks: int, device: str
) -> tuple[dict[str, Any], Path]:
    """Run it; the report and the path of its page."""
    start = time.monotonic()
    target = output.expanduser()
    check_target(target, is_report)
    recipe = Recipe.load("quarot").with_(calibration={"text": calib or texts.BUILTIN})
    corpus = texts.find(text, "evaluation")
    source = open_model(model, device)
    tokens = texts.cut(corpus, source.tokenizer, 2048, chunks)
    work = replace(source, model=copy.deepcopy(source.model))
    made = pipeline.observe_and_transform(work, recipe, raw=True, transformed=True, noise=True)
    plans = demo_plans(recipe, source.map, Seen(*made.observations))
    run = pipeline.finish(made, plans[UNIFORM])
    candidates = {name: partial(run.reading, plan) for name, plan in plans.items()}
    scores, original = score(candidates, tokens, source.model)
    assert original is not None
    rows = [{"name": "16-bit", **figures(source.model, source.map, replace(original, kl=0.0), 0.0)}]
    rows += [
        {"name": name, **figures(run.model, source.map, scores[name], plan.a8_share)} for name, plan in plans.items()
    ]
    chosen = plans["+ budget, same share"]
    report = {
        **describe(source, recipe, made.transform, made.observations, made.calibration),
        "plan": chosen.to_dict(),
        "plans": {name: plan.to_dict() for name, plan in plans.items()},
        "results": rows,
        "evaluation": {"text": corpus.source, "sha256": corpus.sha256, "chunks": len(tokens), "seqlen": 2048},
        "seconds": round(time.monotonic() - start, 1),
    }
    with new_folder(target, is_report) as partial_folder:
        (partial_folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (partial_folder / "plan.json").write_text(chosen.to_json(), encoding="utf-8")
        write_page(report, partial_folder)
    return report, target / "report.html"
