"""`phasequant compare`: any list of recipes on the same work, one row for each recipe, seed and plan.

Every recipe is learned and quantized under each policy (all activations low; DynamicPTQ's set; the budget), and read
with its KV cache in 16 bits and in its own. All rows see the same evaluation chunks and the same questions beside the
same 16-bit original. A recipe whose transform does not see the plan is quantized once and its plans are put on the same
codes; one whose transform is learned for the plan's bits is learned anew for each (of a block-wise method only the
blocks that changed). `seeds`: as many rows of a recipe that draws at random or reads calibration text, one for each
seed from the recipe's on; a seed is of the signs of rotations and of the sequences that are taken from that text.

Each finished row is kept in the output folder under a hash of all that it depends on: an interrupted comparison goes
on where it was, and a longer list of recipes computes only what is new. Rows that failed are tried again. `workers`:
processes that share the recipes; each opens the model for itself.

At the end every row gets the 95 % interval of its perplexity, and its difference to the baseline's with a verdict
(`report.comparison_verdicts`).
"""

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phasequant import pipeline
from phasequant import text as texts
from phasequant.api import Model, as_recipe, as_source
from phasequant.checkpoint import versions
from phasequant.compare_measure import FULL, Comparison, Work
from phasequant.compare_rows import Rows, is_comparison, open_folder
from phasequant.console import note, progress, set_quiet, warn
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import tasks as zero_shot
from phasequant.fingerprint import of_module
from phasequant.plan import POLICIES
from phasequant.recipe import Recipe
from phasequant.report import write_comparison
from phasequant.report.comparison_verdicts import judged, parse_baseline
from phasequant.source import check_finite
from phasequant.weight import needs_tokens

__all__ = ["POLICY_ORDER", "compare", "is_comparison"]

POLICY_ORDER = ("uniform", "paper", "budget")
EXACT = ("none", "load")  # transforms that neither draw at random nor read calibration text


@dataclass(frozen=True)
class Asked:
    """What a comparison is to do, as plain values: workers are given it too. `recipes`: (name, recipe) by seed."""

    model: Model
    recipes: tuple[tuple[str, Recipe], ...]
    policies: tuple[str, ...]
    a8_share: float
    texts: tuple[str, ...]
    chunks: int | None
    seqlen: int
    tasks: tuple[str, ...]
    tasks_dir: Path | None
    limit: int | None
    batch: int
    output: Path
    device: str

    def wanted(self, recipe: Recipe) -> list[Recipe]:
        """A recipe under each policy; one of 16-bit activations has nothing to plan."""
        if recipe.activations.bits == FULL:
            return [recipe.with_("policy.name=uniform")]
        return [recipe.with_(policy={"name": policy, "a8_share": self.a8_share}) for policy in self.policies]

    def open(self) -> Comparison:
        """The model, and the work on which its rows are measured."""
        corpora = {name: texts.find(name, "evaluation") for name in self.texts}
        source = as_source(self.model, self.device)
        if source.quantized:
            raise PhaseQuantError(f"'{source.name}' is quantized already: compare recipes on its 16-bit original")
        check_finite(source.model)
        cuts = {name: texts.cut(one, source.tokenizer, self.seqlen, self.chunks) for name, one in corpora.items()}
        work = Work(cuts, self.tasks, self.tasks_dir, self.limit, self.batch)
        stamp = {
            "model": of_module(source.model),
            "texts": [texts.digest(tokens) for tokens in cuts.values()],
            "tasks": zero_shot.check(self.tasks, self.tasks_dir, self.limit) if self.tasks else None,
            "versions": versions(),
            "device": source.compute.type,
            "format": 3,
        }
        return Comparison(source, work, Rows(self.output, stamp))


def is_random(recipe: Recipe, policies: Iterable[str]) -> bool:
    """Whether another seed gives another model: other signs, or other calibration text where any is read."""
    reads = recipe.activations
    calibrated = reads.bits < FULL and (
        reads.clip == "searched" or reads.scales == "static" or reads.token_policy != "none"
        or recipe.exclude.method != "none" or bool({"threshold", "budget"} & set(policies))
    )  # fmt: skip
    return (
        recipe.transform.method not in EXACT
        or bool(recipe.learned_clips)
        or recipe.finetune.on
        or recipe.prefix.method in ("qfep", "prefixquant")
        or (recipe.weights.bits < FULL and needs_tokens(recipe.weights, recipe.lowrank))
        or calibrated
    )


def seeded(name: str, recipe: Recipe, seeds: int, policies: Iterable[str]) -> Iterator[tuple[str, Recipe]]:
    """A recipe for each seed, from its own on; once where nothing is random."""
    for step in range(seeds if is_random(recipe, policies) else 1):
        yield name, recipe.with_(f"seed={recipe.seed + step}")


def make_rows(comparison: Comparison, asked: Asked, name: str, recipe: Recipe) -> list[dict[str, Any]]:
    """The rows of a recipe under every policy: those that were finished earlier, and the others made now."""
    rows, wanted = comparison.rows, asked.wanted(recipe)
    ready = {one.policy.name: row for one in wanted if (row := rows.read(one)) is not None}
    missing = [one for one in wanted if one.policy.name not in ready]
    if ready:
        note(f"{name}: {len(ready)} of {len(wanted)} rows were finished earlier")
    drafts: dict[str, pipeline.Transformed] = {}
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
                ready[one.policy.name] = _failed(name, one, error)
    return [{**ready[one.policy.name], "recipe": name} for one in wanted]


def _failed(name: str, recipe: Recipe, error: BaseException) -> dict[str, Any]:
    return {"recipe": name, "policy": recipe.policy.name, "seed": recipe.seed, "error": str(error)}


_here: Comparison | None = None  # of a worker, opened once


def _work(asked: Asked, index: int) -> list[dict[str, Any]]:
    global _here
    if _here is None:
        _here = asked.open()
    return make_rows(_here, asked, *asked.recipes[index])


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    set_quiet(True)  # the parent tells what is done


def in_processes(asked: Asked, workers: int) -> dict[int, list[dict[str, Any]]]:
    """Rows by index of recipe, made by several processes. A row that fails is told as such; a process that dies is an
    error, after which the rows that were finished remain."""
    threads = max(1, torch.get_num_threads() // workers)
    found: dict[int, list[dict[str, Any]]] = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (threads,))
    try:
        waiting = {pool.submit(_work, asked, index): index for index in range(len(asked.recipes))}
        with progress(f"compare, {workers} processes", len(waiting)) as tick:
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                tick()
    except BrokenProcessPool as error:
        raise PhaseQuantError("a worker ended before its rows were done: run the same command again") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return found


def compare(
    model: Model,
    recipes: Iterable[str],
    *,
    output: str | Path,
    policies: Iterable[str] = POLICY_ORDER,
    a8_share: float = 0.125,
    overrides: Iterable[str] = (),
    text: str | Path | Iterable[str | Path] = texts.BUILTIN,
    chunks: int | None = 4,
    seqlen: int = 2048,
    tasks: Iterable[str] = (),
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    batch: int = zero_shot.BATCH,
    seeds: int = 1,
    workers: int = 1,
    baseline: str | None = None,
    device: str = "auto",
) -> tuple[dict[str, Any], Path]:
    """Compare recipes; what compare.json holds, and the path of the page.

    `overrides` (`a.b=c`) change every recipe. A recipe's own policy is replaced by each of `policies`. `text`: one or
    several; rows are ranked by the first. `baseline`: recipe/policy, the row that others are judged against (default:
    the first).
    """
    begun = time.monotonic()
    names, chosen, sets = list(recipes), tuple(policies), list(overrides)
    for policy in chosen:
        if policy not in POLICIES:
            raise PhaseQuantError(f"unknown policy '{policy}': there are {', '.join(POLICIES)}")
    if not names:
        raise PhaseQuantError("nothing to compare: name recipes, as in --recipes quarot,flat")
    if seeds < 1 or workers < 1:
        raise PhaseQuantError(f"seeds and workers are at least 1, not {min(seeds, workers)}")
    if workers > 1 and not isinstance(model, (str, Path)):
        raise PhaseQuantError("a model in memory cannot be given to several processes: give its directory")
    several = [text] if isinstance(text, (str, Path)) else list(text)
    if not several:
        raise PhaseQuantError("rows are ranked by their perplexity: name a text")
    lists = {name: as_recipe(name, sets) for name in names}
    corpora = [texts.find(str(one), "evaluation") for one in several]
    asked = Asked(
        model, tuple(pair for name, recipe in lists.items() for pair in seeded(name, recipe, seeds, chosen)),
        chosen, a8_share,
        tuple(dict.fromkeys(str(one) for one in several)), chunks, seqlen,
        tuple([tasks] if isinstance(tasks, str) else tasks), None if tasks_dir is None else Path(tasks_dir).resolve(),
        limit, batch, open_folder(output), device,
    )  # fmt: skip
    named = parse_baseline(baseline, [(name, one.policy.name) for name, r in asked.recipes for one in asked.wanted(r)])
    if asked.tasks:
        zero_shot.check(asked.tasks, asked.tasks_dir, limit)
    comparison = asked.open()
    made = in_processes(asked, min(workers, len(asked.recipes))) if workers > 1 else {}
    found: list[dict[str, Any]] = []
    for index, (name, recipe) in enumerate(asked.recipes):
        for row in made.get(index) or make_rows(comparison, asked, name, recipe):
            if comparison.original is None and row.get("original"):
                comparison.original = row["original"]
            found.append(row)
            note(_told(name, row))
        evaluation = [
            {"text": one.source, "sha256": one.sha256, "chunks": len(tokens), "seqlen": seqlen}
            for one, tokens in zip(corpora, comparison.work.texts.values(), strict=False)
        ]
        result = {
            "versions": versions(),
            "model": {"name": comparison.source.name, **comparison.source.map.describe()},
            "evaluation": evaluation[0],
            "texts": evaluation[1:],
            "tasks": {"names": list(asked.tasks), "limit": limit},
            "calibration": recipe.calibration.text,
            "device": str(comparison.source.compute),
            "original": comparison.original or {"ppl": None, "nll": [], "texts": {}, "tasks": {}},
            "seeds": seeds,
            "rows": [{k: v for k, v in row.items() if k != "original"} for row in found],
            "seconds": round(time.monotonic() - begun, 1),
        }
        result = judged(result, named)
        page = write_comparison(result, asked.output)
    return result, page


def _told(name: str, row: dict[str, Any]) -> str:
    figures = row.get("figures", {}).items()
    told = ", ".join(f"KV{bits} {one['ppl']:.2f}" for bits, one in figures if one["ppl"] is not None)
    return f"{name} ({row['policy']}, seed {row['seed']}): {row['error'] or told or 'not finite'}"
