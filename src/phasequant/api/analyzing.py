"""Observe a model and plan its bits: the report and the plans of `analyze`."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from phasequant import pipeline
from phasequant.api.arguments import Model, as_recipe, as_source
from phasequant.arch import ModelMap
from phasequant.checkpoint import check_target, new_folder, versions
from phasequant.errors import PhaseQuantError
from phasequant.observe import Observations
from phasequant.plan import POLICIES, PrecisionPlan, Seen, make_plan, thresholds
from phasequant.ranks import leads
from phasequant.recipe import Recipe
from phasequant.report import is_report, what_runs, write_page
from phasequant.source import Source
from phasequant.transform import Transform


@dataclass
class Analysis:
    """What `analyze` found. `report` is what report.json holds."""

    report: dict[str, Any]
    plan: PrecisionPlan
    plans: dict[str, PrecisionPlan]
    observations: list[Observations]

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.html, plan.json and recipe.yaml; the page's path."""
        target = Path(folder).expanduser()
        with new_folder(target, is_report) as partial:
            recipe = Recipe.from_dict(self.report["recipe"])
            (partial / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            (partial / "plan.json").write_text(self.plan.to_json(), encoding="utf-8")
            write_page(self.report, partial)
        return target / "report.html"


def plans_of(recipe: Recipe, model_map: ModelMap, seen: Seen) -> dict[str, PrecisionPlan]:
    """The plan of every policy under one recipe."""
    return {name: make_plan(recipe.with_(f"policy.name={name}"), model_map, seen) for name in POLICIES}


def describe(
    source: Source,
    recipe: Recipe,
    transform: Transform,
    observations: list[Observations],
    calibration: Any,
    cost: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The parts of a report that a run's observations give."""
    raw, *isolated, transformed = observations
    policy = recipe.policy
    seen = Seen(*observations)
    tau_jr, tau_snr = thresholds(policy, seen.at(policy.coordinates))
    return {
        "versions": versions(),
        "model": {"name": source.name, **source.map.describe()},
        "recipe": recipe.to_dict(),
        "calibration": calibration,
        "transform": transform.describe(source.map, recipe.kv.bits < 16),
        "learning": cost,
        "thresholds": {
            "jr": tau_jr,
            "snr": tau_snr,
            "coordinates": policy.coordinates,
            "first_token": policy.first_token,
            "given": policy.tau_jr is not None and policy.tau_snr is not None,
        },
        "prefix": source.prefix and source.prefix.to_dict(),
        "observations": {
            "raw": raw.to_dict(),
            **({"isolated": isolated[0].to_dict()} if isolated else {}),
            "transformed": transformed.to_dict(),
        },
    }


def analyze(
    model: Model,
    recipe: Recipe | str | Path = "quarot",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
    device: str = "auto",
) -> Analysis:
    """Observe MODEL before and after the recipe's transform and plan its bits; no weight is quantized.

    A recipe without a policy is given `budget`. A `Source` or Transformers model is transformed in place.
    """
    start = time.monotonic()
    wanted = as_recipe(recipe, overrides)
    if wanted.activations.bits == 16:
        raise PhaseQuantError("analyze plans which activations stay low: set activations.bits below 16")
    if wanted.policy.name == "uniform":
        wanted = wanted.with_("policy.name=budget")
    if output is not None:
        check_target(Path(output), is_report)
    source = as_source(model, device, tokenizer, stream=True)
    made = pipeline.observe_and_transform(source, wanted, raw=True, transformed=True, noise=True)
    seen = pipeline.seen_of(made, wanted.with_("policy.name=budget"))
    assert seen is not None
    plans = plans_of(wanted, source.map, seen)
    plan = plans[wanted.policy.name] = pipeline.planned(made, wanted, seen)
    report = {
        **describe(source, wanted, made.transform, made.observations, made.calibration, made.cost),
        "plan": plan.to_dict(),
        "plans": {name: p.to_dict() for name, p in plans.items()},
        "sensitivity": seen.sensitivity and seen.sensitivity.to_dict(),
        "runs": what_runs(source.map, plan, source.compute, source.model.dtype),
        "results": [],
        "evaluation": None,
        "seconds": round(time.monotonic() - start, 1),
    }
    analysis = Analysis(report, plan, plans, made.observations)
    if output is not None and leads():
        analysis.save(output)
    return analysis
