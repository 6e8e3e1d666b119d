"""`phasequant compare`: recipes and plans on the same work."""

import json
from pathlib import Path
from typing import Annotated

import typer

from phasequant.cli.options import (
    Batch,
    Calib,
    Chunks,
    Device,
    Json,
    Limit,
    Model,
    Quiet,
    Seed,
    Seqlen,
    Sets,
    Tasks,
    TasksDir,
    emit,
    listed,
    overrides_of,
    tasks_of,
)
from phasequant.cli.tables import compared_tasks, comparison_table, verdicts_table
from phasequant.console import out, set_quiet


def compare(
    model: Model,
    recipes: Annotated[str, typer.Option("--recipes", help="presets or YAML files, with commas between")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for the rows and the page; an interrupted run goes on there")
    ] = Path("phasequant-compare"),
    policies: Annotated[
        str, typer.Option("--policies", help="plans under which each is measured")
    ] = "uniform,paper,budget",
    a8_share: Annotated[float, typer.Option("--a8-share", help="share that the budget plan may spend")] = 0.125,
    weights: Annotated[str | None, typer.Option("--weights", help="short for --set weights.method=…")] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="text to evaluate on, or several: --text a.txt --text c4")
    ] = None,
    calib: Calib = None,
    chunks: Chunks = 4,
    seqlen: Seqlen = 2048,
    sets: Sets = None,
    seed: Seed = None,
    seeds: Annotated[
        int,
        typer.Option("--seeds", help="rows of each recipe that draws at random or reads calibration text, a seed each"),
    ] = 1,
    tasks: Tasks = None,
    tasks_dir: TasksDir = None,
    limit: Limit = None,
    batch: Batch = 16,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="recipe/plan that all rows are judged against; default: the first")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="processes that share the recipes")] = 1,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="write the table as Markdown, too")] = None,
    latex: Annotated[Path | None, typer.Option("--latex", help="write the table as LaTeX, too")] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Any list of recipes on the same work: a row for each recipe and plan, KV in 16 bits and in its own, each with its
    95 % interval and a verdict against the baseline."""
    from phasequant.compare import compare as run_compare
    from phasequant.report import comparison_text

    set_quiet(quiet)
    short = overrides_of(sets, None, None, calib, seed)
    if weights is not None:
        short = [f"weights.method={json.dumps(weights)}", *short]
    result, page = run_compare(
        model, listed(recipes), output=output, policies=listed(policies), a8_share=a8_share, overrides=short,
        text=text or ["builtin"], chunks=chunks, seqlen=seqlen, tasks=tasks_of(tasks, tasks_dir, limit),
        tasks_dir=tasks_dir, limit=limit, batch=batch, seeds=seeds, workers=workers, baseline=baseline, device=device,
    )  # fmt: skip
    for path, form in ((markdown, comparison_text.markdown), (latex, comparison_text.latex)):
        if path is not None:
            comparison_text.write(path, result, form)
    out.print(comparison_table(result))
    out.print(verdicts_table(result))
    if result["original"].get("tasks"):
        out.print(compared_tasks(result))
    out.print(f"page: {page}", soft_wrap=True, markup=False)
    emit({"page": str(page), **result}, as_json)
    if any(row["error"] for row in result["rows"]):
        raise typer.Exit(1)
