"""`phasequant compare`: any list of recipes on the same work, one row for each recipe and plan.

Every recipe is learned and quantized under each policy (all activations low; DynamicPTQ's set; the budget), and read
with its KV cache in 16 bits and in its own. All rows see the same evaluation chunks beside the same 16-bit original. A
recipe whose transform does not see the plan is quantized once and its plans are put on the same codes; one whose
transform is learned for the plan's bits is learned anew for each (of a block-wise method only the blocks that changed).

Each finished row is kept in the output folder under a hash of all that it depends on: an interrupted comparison goes
on where it was, and a longer list of recipes computes only what is new. Rows that failed are tried again.
"""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel

from phasequant import observe, pipeline
from phasequant import text as texts
from phasequant.api import Model, as_recipe, as_source
from phasequant.arch import GROUPS
from phasequant.checkpoint import versions
from phasequant.console import note, warn
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import score, weight_bytes
from phasequant.fingerprint import of_module
from phasequant.nn import kv_bytes_per_token, kv_in_16_bits
from phasequant.observe import Observations
from phasequant.pipeline import Quantized
from phasequant.plan import POLICIES, PrecisionPlan, make_plan
from phasequant.recipe import Recipe
from phasequant.report import write_comparison
from phasequant.source import Source, check_finite

Opener = Callable[[], AbstractContextManager[PreTrainedModel]]

POLICY_ORDER = ("uniform", "paper", "budget")
ROWS = "rows"
FULL = 16


def is_comparison(folder: Path) -> bool:
    """Whether a directory is an earlier comparison (finished or not) and nothing else."""
    return folder.is_dir() and {p.name for p in folder.iterdir()} <= {ROWS, "compare.json", "compare.html"}


def _open_folder(output: str | Path) -> Path:
    folder = Path(output).expanduser().resolve()
    if folder.exists() and not is_comparison(folder):
        raise PhaseQuantError(f"the output {folder} holds other files: name a new directory, or an earlier comparison")
    try:
        (folder / ROWS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PhaseQuantError(f"the output {folder} cannot be made: {error.strerror or error}") from error
    return folder


class _Rows:
    """Finished rows on disk."""

    def __init__(self, folder: Path, work: dict[str, Any]) -> None:
        self.folder, self.work = folder / ROWS, work

    def path(self, recipe: Recipe) -> Path:
        """Where a recipe (its policy included) has its row."""
        text = json.dumps({**self.work, "recipe": recipe.to_dict()}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def read(self, recipe: Recipe) -> dict[str, Any] | None:
        """A finished row, if there is one."""
        try:
            found: dict[str, Any] = json.loads(self.path(recipe).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def write(self, recipe: Recipe, row: dict[str, Any]) -> None:
        """Keep a row: whole or not at all."""
        path = self.path(recipe)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
        partial.replace(path)


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


class _Comparison:
    def __init__(self, source: Source, tokens: Any, rows: _Rows) -> None:
        self.source, self.tokens, self.rows = source, tokens, rows
        self.original: dict[str, Any] | None = None
        self._raw: dict[str, float] = {}

    def raw_gsr(self, recipe: Recipe) -> float:
        """Mean GSR of the model before any transform, on the recipe's calibration sequences; observed once."""
        key = json.dumps(recipe.calibration.model_dump())
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
        scores, original = score(named, self.tokens, self.source.model)
        assert original is not None
        self.original = {"ppl": original.ppl, "nll": list(original.nll_by_chunk)}
        gsr, by_group = _gsr(seen)
        found = []
        for recipe in wanted:
            policy = recipe.policy.name
            figures = {}
            for (of, bits), (key, _) in zip(candidates, named.items(), strict=True):
                if of == policy:
                    one = scores[key]
                    figures[str(bits)] = {"ppl": one.ppl, "kl": one.kl, "rows": one.rows, "nll": list(one.nll_by_chunk)}
            low, weights = recipe.activations.bits, recipe.weights.bits
            row = {
                "recipe": name,
                "method": made.transform.method,
                "policy": policy,
                "bits": f"W{weights}A{low}",
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


def compare(
    model: Model,
    recipes: Iterable[str],
    *,
    output: str | Path,
    policies: Iterable[str] = POLICY_ORDER,
    a8_share: float = 0.125,
    overrides: Iterable[str] = (),
    text: str | Path = texts.BUILTIN,
    chunks: int | None = 4,
    seqlen: int = 2048,
    device: str = "auto",
) -> tuple[dict[str, Any], Path]:
    """Compare recipes; what compare.json holds, and the path of the page.

    `overrides` (`a.b=c`) change every recipe. A recipe's own policy is replaced by each of `policies`.
    """
    begun = time.monotonic()
    names, policies, sets = list(recipes), list(policies), list(overrides)
    for policy in policies:
        if policy not in POLICIES:
            raise PhaseQuantError(f"unknown policy '{policy}': there are {', '.join(POLICIES)}")
    if not names:
        raise PhaseQuantError("nothing to compare: name recipes, as in --recipes quarot,flat")
    lists = {name: as_recipe(name, sets) for name in names}
    corpus = texts.find(str(text), "evaluation")
    folder = _open_folder(output)
    source = as_source(model, device)
    if source.quantized:
        raise PhaseQuantError(f"'{source.name}' is quantized already: compare recipes on its 16-bit original")
    check_finite(source.model)
    tokens = texts.cut(corpus, source.tokenizer, seqlen, chunks)
    work = {
        "model": of_module(source.model),
        "tokens": texts.digest(tokens),
        "versions": versions(),
        "device": source.compute.type,
        "format": 1,
    }
    rows = _Rows(folder, work)
    comparison = _Comparison(source, tokens, rows)
    found: list[dict[str, Any]] = []
    for name, recipe in lists.items():
        drafts: dict[str, pipeline.Transformed] = {}
        wanted = [recipe.with_(policy={"name": policy, "a8_share": a8_share}) for policy in policies]
        if recipe.activations.bits == FULL:
            wanted = [recipe.with_("policy.name=uniform")]
        ready = {one.policy.name: row for one in wanted if (row := rows.read(one)) is not None}
        missing = [one for one in wanted if one.policy.name not in ready]
        if ready:
            note(f"{name}: {len(ready)} of {len(wanted)} rows were finished earlier")
        try:
            if missing and not pipeline.sees_plan(recipe):
                for row in comparison.once(name, missing):
                    ready[row["policy"]] = row
            else:
                for one in missing:
                    for row in comparison.learned(name, one, drafts):
                        ready[row["policy"]] = row
        except PhaseQuantError as error:
            warn(f"{name}: {error}")
            for one in missing:
                if one.policy.name not in ready:
                    ready[one.policy.name] = {"recipe": name, "policy": one.policy.name, "error": str(error)}
        for one in wanted:
            row = {**ready[one.policy.name], "recipe": name}
            if comparison.original is None and row.get("original"):
                comparison.original = row["original"]
            found.append(row)
            figures = row.get("figures", {}).items()
            told = ", ".join(f"KV{bits} {one['ppl']:.2f}" for bits, one in figures if one["ppl"] is not None)
            note(f"{name} ({row['policy']}): {row['error'] or told or 'not finite'}")
        result = {
            "versions": versions(),
            "model": {"name": source.name, **source.map.describe()},
            "evaluation": {"text": corpus.source, "sha256": corpus.sha256, "chunks": len(tokens), "seqlen": seqlen},
            "calibration": recipe.calibration.text,
            "device": str(source.compute),
            "original": comparison.original or {"ppl": None, "nll": []},
            "rows": [{k: v for k, v in row.items() if k != "original"} for row in found],
            "seconds": round(time.monotonic() - begun, 1),
        }
        page = write_comparison(result, folder)
    return result, page
