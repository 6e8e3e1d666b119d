"""Rows of a comparison: one recipe (and seed) quantized and read under its plans, on every text and task."""

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from phasequant import observe, pipeline
from phasequant.arch import GROUPS
from phasequant.checkpoint import versions
from phasequant.compare.kept import Rows
from phasequant.evaluate import Score, score, weight_bytes
from phasequant.evaluate import tasks as zero_shot
from phasequant.evaluate.answers import name_of
from phasequant.nn import kv_bytes_per_token, kv_in_16_bits, prefix_length, prefix_tokens
from phasequant.observe import Observations
from phasequant.pipeline import Quantized
from phasequant.plan import PrecisionPlan, make_plan
from phasequant.recipe import Recipe
from phasequant.source import Source

Opener = Callable[[], AbstractContextManager[PreTrainedModel]]
FULL = 16


@dataclass(frozen=True)
class Work:
    """What every row is measured on: chunks by the name of their text (the first is the one that rows are ranked by),
    and zero-shot tasks."""

    texts: dict[str, Int[Tensor, "chunks T"]]
    tasks: tuple[str, ...] = ()
    tasks_dir: Path | None = None
    limit: int | None = None
    batch: int = zero_shot.BATCH

    def ask(self, model: PreTrainedModel, source: Source, title: str) -> dict[str, Any]:
        """Figures of all tasks, with the value of every question."""
        if not self.tasks:
            return {}
        found = zero_shot.run(
            model, source.tokenizer, self.tasks, name_of(model, versions()), folder=self.tasks_dir, limit=self.limit,
            batch=self.batch, prefix=prefix_tokens(model), prefix_length=prefix_length(model, source.map), title=title,
        )  # fmt: skip
        return {task: one.to_dict() for task, one in found.items()}


def _figures(one: Score) -> dict[str, Any]:
    return {"ppl": one.ppl, "kl": one.kl, "rows": one.rows, "nll": list(one.nll_by_chunk)}


def _candidates(run: Quantized, plan: PrecisionPlan) -> dict[int, Opener]:
    """KV bits → what opens the model for a chunk."""

    @contextmanager
    def opened(full: bool):  # type: ignore[no-untyped-def]
        with ExitStack() as stack:
            model = stack.enter_context(run.reading(plan))
            if full:
                stack.enter_context(kv_in_16_bits(model))
            yield model

    found: dict[int, Opener] = {FULL: lambda: opened(True)}
    if plan.kv is not None:
        found[plan.kv.bits] = lambda: opened(False)
    return found


def _gsr(seen: Observations) -> tuple[float, dict[str, float]]:
    groups = {group: fmean(g.gsr for g in seen.groups if g.group == group) for group in GROUPS}
    return fmean(g.gsr for g in seen.groups), groups


def _weights_label(recipe: Recipe, run: Quantized) -> str:
    """The weight methods of a row, with what did not go as asked."""
    told = run.origin["weights"]
    polish = " + polish" if recipe.finetune.on else ""
    if told is None:
        return polish.removeprefix(" + ")
    branch = "" if recipe.lowrank.method == "none" else f" + {recipe.lowrank.method}"
    fallen = sum(entry["why"] is not None for entry in told["groups"])
    return recipe.weights.method + branch + polish + (f" ({fallen} groups fell back)" if fallen else "")


@dataclass
class Comparison:
    """Measures rows and keeps them. `original`: the 16-bit model's own figures, once they are known."""

    source: Source
    work: Work
    rows: Rows
    original: dict[str, Any] | None = None
    _raw: dict[str, float] = field(default_factory=dict)

    def raw_gsr(self, recipe: Recipe) -> float:
        """Mean GSR of the model before any transform, on the recipe's calibration sequences; observed once."""
        key = json.dumps([recipe.calibration.model_dump(), recipe.seed])
        if key not in self._raw:
            tokens, _ = pipeline.calibration_tokens(self.source, recipe)
            seen = observe.sweep(self.source.model, self.source.map, tokens, device=self.source.compute)
            self._raw[key] = _gsr(seen)[0]
        return self._raw[key]

    def _copy(self) -> Source:
        return replace(self.source, model=copy.deepcopy(self.source.model))

    def _measure(
        self, name: str, wanted: Sequence[Recipe], made: pipeline.Transformed, plans: dict[str, PrecisionPlan]
    ) -> list[dict[str, Any]]:
        """Rows of one quantized model under several plans."""
        seen = made.observations[-1]
        run = pipeline.finish(made, plans[wanted[0].policy.name])
        clipped = {name: pipeline.with_learned_clips(plan, made.transform) for name, plan in plans.items()}
        candidates = {
            (recipe.policy.name, bits): opener
            for recipe in wanted
            for bits, opener in _candidates(run, clipped[recipe.policy.name]).items()
        }
        named = {f"{policy}, KV{bits}": opener for (policy, bits), opener in candidates.items()}
        by_text: dict[str, dict[str, Score]] = {}
        original: dict[str, dict[str, Any]] = {}
        for text, tokens in self.work.texts.items():
            by_text[text], full = score(named, tokens, self.source.model)
            assert full is not None
            original[text] = {"ppl": full.ppl, "nll": list(full.nll_by_chunk)}
        first, *others = self.work.texts
        self.original = {
            **original[first], "texts": {text: original[text] for text in others},
            "tasks": self.work.ask(self.source.model, self.source, "tasks, 16-bit"),
        }  # fmt: skip
        answers = {}
        for key, opener in named.items():
            with opener() as model:
                answers[key] = self.work.ask(model, self.source, f"tasks, {name} ({key})")
        gsr, by_group = _gsr(seen)
        found = []
        for recipe in wanted:
            policy = recipe.policy.name
            figures = {}
            for (of, bits), (key, _) in zip(candidates, named.items(), strict=True):
                if of == policy:
                    more = {text: _figures(by_text[text][key]) for text in others}
                    figures[str(bits)] = {**_figures(by_text[first][key]), "texts": more, "tasks": answers[key]}
            low, weights = recipe.activations.bits, recipe.weights.bits
            row = {
                "recipe": name,
                "method": made.transform.method,
                "policy": policy,
                "seed": recipe.seed,
                "bits": f"W{weights}A{low if low == FULL else round(plans[policy].input_bits, 2):g}",
                "weights": _weights_label(recipe, run),
                "a8_share": plans[policy].a8_share,
                "figures": figures,
                "gsr": gsr,
                "gsr_raw": self.raw_gsr(recipe),
                "gsr_by_group": by_group,
                "seconds": made.cost["seconds"],
                "peak_bytes": made.cost["peak_bytes"],
                "seconds_per_block": made.cost["seconds_per_block"],
                "online_macs": made.transform.online_macs(self.source.map, recipe.kv.bits < FULL)
                + pipeline.branch_macs(recipe, self.source.map),
                "macs_total": self.source.map.macs_total,
                "weight_bytes": weight_bytes(run.model),
                "kv_bytes_per_token": kv_bytes_per_token(run.model, self.source.map),
                "transform": made.transform.describe(self.source.map, recipe.kv.bits < FULL),
                "original": self.original,
                "error": None,
            }
            self.rows.write(recipe, row)
            found.append(row)
        return found

    def once(self, name: str, wanted: list[Recipe]) -> list[dict[str, Any]]:
        """All plans on one transform, which does not see them; on the same codes, unless these are polished for one."""
        noise = any(recipe.policy.name == "budget" and recipe.policy.score == "noise" for recipe in wanted)
        raw = any(recipe.policy.name == "threshold" and recipe.policy.coordinates == "raw" for recipe in wanted)
        made = pipeline.observe_and_transform(self._copy(), wanted[0], raw=raw, transformed=True, noise=noise)
        plans: dict[str, PrecisionPlan] = {recipe.policy.name: pipeline.planned(made, recipe) for recipe in wanted}
        if not pipeline.follows_plan(wanted[0]):
            return self._measure(name, wanted, made, plans)
        found = []
        for recipe in wanted:
            source = replace(made.source, model=copy.deepcopy(made.source.model))
            own: dict[str, PrecisionPlan] = {recipe.policy.name: plans[recipe.policy.name]}
            found += self._measure(name, [recipe], replace(made, source=source), own)
        return found

    def learned(self, name: str, recipe: Recipe, drafts: dict[str, pipeline.Transformed]) -> list[dict[str, Any]]:
        """One plan, and the transform learned for it. `drafts`: the transform at all-low, for plans."""
        needed = recipe.policy.name in ("threshold", "budget") or recipe.exclude.method != "none"
        if needed and "draft" not in drafts:
            raw = recipe.policy.coordinates == "raw"
            drafts["draft"] = pipeline.observe_and_transform(
                self._copy(), recipe, raw=raw, transformed=True, noise=True, rough=True
            )
        draft = drafts.get("draft")
        plan = make_plan(recipe, self.source.map, None) if draft is None else pipeline.planned(draft, recipe)
        plan = replace(plan, clips={}, rows=None)  # those are of the draft's transform
        made = pipeline.observe_and_transform(self._copy(), recipe, raw=False, transformed=True, noise=False, plan=plan)
        return self._measure(name, [recipe], made, {recipe.policy.name: plan})
