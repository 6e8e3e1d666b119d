"""`phasequant eval`: perplexity, KL to the 16-bit original, accuracy on tasks."""

from pathlib import Path
from typing import Annotated, Any

import typer

from phasequant.cli.options import (
    Batch,
    Calib,
    Chunks,
    Device,
    Json,
    Limit,
    Model,
    PlanFile,
    Policy,
    Quiet,
    RecipeName,
    Seed,
    Seqlen,
    Sets,
    Share,
    Tasks,
    TasksDir,
    emit,
    overrides_of,
    tasks_of,
)
from phasequant.cli.tables import between, figures_table, tasks_table
from phasequant.console import note, out, set_quiet


def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option("--text", help="builtin, a UTF-8 file, wikitext2, c4; default: builtin, or none with --tasks"),
    ] = None,
    chunks: Chunks = None,
    seqlen: Seqlen = 2048,
    recipe: RecipeName = None,
    sets: Sets = None,
    policy: Policy = None,
    a8_share: Share = None,
    calib: Calib = None,
    seed: Seed = None,
    plan: PlanFile = None,
    original: Annotated[str | None, typer.Option("--original", help="the 16-bit model of a checkpoint")] = None,
    tasks: Tasks = None,
    tasks_dir: TasksDir = None,
    limit: Limit = None,
    batch: Batch = 16,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of MODEL, its KL to the 16-bit original, and accuracy on zero-shot tasks. With a recipe, policy, --set
    or --plan, MODEL is quantized in memory first."""
    import phasequant

    set_quiet(quiet)
    overrides = overrides_of(sets, policy, a8_share, calib, seed, plan)
    if recipe is None and any(option is not None for option in (policy, a8_share, calib, seed)):
        recipe = "quarot"  # what these options speak of; --set alone changes the 16-bit recipe
    result = phasequant.evaluate(
        model,
        text=text,
        chunks=chunks,
        seqlen=seqlen,
        recipe=recipe,
        overrides=overrides,
        plan=plan,
        original=original,
        tasks=tasks_of(tasks, tasks_dir, limit),
        tasks_dir=tasks_dir,
        limit=limit,
        batch=batch,
        device=device,
    )
    rows = [{"name": model if len(model) < 40 else Path(model).name, **result}]
    if result["kernels"] and result["ppl_16bit"] is not None:
        rows.insert(
            0,
            {
                "name": "16-bit",
                "ppl": result["ppl_16bit"],
                "kl": 0.0,
                "a8_share": 0.0,
                "weight_bytes": result["weight_bytes_16bit"],
                "kv_bytes_per_token": result["kv_bytes_per_token_16bit"],
            },
        )
    if result["text"] is not None:
        out.print(figures_table(rows, result))
        for line in _intervals(result):
            out.print(line, markup=False, soft_wrap=True)
    if result["tasks"]:
        out.print(tasks_table(result["tasks"], result))
    if result["kernels"]:
        note("kernels: " + ", ".join(f"{name} ({count} linears)" for name, count in result["kernels"].items()))
    emit(result, as_json)


def _intervals(result: dict[str, Any]) -> list[str]:
    """95 % intervals of the perplexities and of their difference."""
    lines = []
    if result["kernels"] and result["interval_16bit"] and result["interval_16bit"]["low"] is not None:
        lines.append(f"16-bit ppl, 95 % interval over chunks: {between(result['interval_16bit'], '.3f')}")
    if result["interval"] and result["interval"]["low"] is not None:
        lines.append(f"ppl, 95 % interval over chunks: {between(result['interval'], '.3f')}")
    found = result["difference"]
    if result["kernels"] and found and found["low"] is not None:
        lines.append(
            f"against 16-bit, paired by chunk: {found['mean']:+.4f} nats a token, 95 % interval "
            f"{between(found, '+.4f')}: {found['verdict']}"
        )
    return lines
