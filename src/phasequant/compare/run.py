"""A whole comparison: check what is asked, make the rows, judge them against the baseline, write the page."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phasequant import text as texts
from phasequant.api import Model, as_recipe
from phasequant.checkpoint import versions
from phasequant.compare.asked import Asked, seeded
from phasequant.compare.kept import open_folder
from phasequant.compare.rows import in_processes, make_rows
from phasequant.console import note
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import tasks as zero_shot
from phasequant.plan import POLICIES
from phasequant.report import write_comparison
from phasequant.report.comparison_verdicts import judged, parse_baseline

POLICY_ORDER = ("uniform", "paper", "budget")


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
