"""`phasequant analyze`: where 4 bits break a model, and a plan of its bits."""

from pathlib import Path
from typing import Annotated, Any

import typer

from phasequant.cli.options import (
    Calib,
    Device,
    Json,
    Model,
    Policy,
    Quiet,
    RecipeName,
    Seed,
    Sets,
    Share,
    emit,
    overrides_of,
)
from phasequant.console import out, set_quiet


def analyze(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for report.html, report.json, plan.json")],
    recipe: RecipeName = None,
    sets: Sets = None,
    policy: Policy = None,
    a8_share: Share = None,
    calib: Calib = None,
    seed: Seed = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show where 4 bits break MODEL and why, and plan its bits. Quantizes nothing."""
    import phasequant

    set_quiet(quiet)
    overrides = overrides_of(sets, policy, a8_share, calib, seed)
    found = phasequant.analyze(model, recipe or "quarot", overrides=overrides, output=output, device=device)
    model_told = found.report["model"]
    for line in model_told["notes"]:
        out.print(f"{model_told['family']}: {line}", markup=False, soft_wrap=True)
    for phase in found.observations[0].phases[:8]:
        count = sum(n for _, n in phase.tokens)
        words = ", ".join(repr(t) for t, _ in phase.tokens[:4])
        who = "the first token" if phase.first_token else f"{count} tokens such as {words}"
        out.print(
            f"{'massive' if phase.massive else 'large'} activation, {abs(phase.peak):,.0f} ({phase.times:,.0f} × the "
            f"median), channel {phase.channel}, {who}: written by {_blocks(phase.written_by)}, "
            f"taken back by {_blocks(phase.taken_back_by)}",
            markup=False,
            soft_wrap=True,
        )
    for line in _spikes(found.report):
        out.print(line, markup=False, soft_wrap=True)
    raised = sorted({block for block, _ in found.plan.raised})
    share = 100 * found.plan.a8_share
    out.print(
        f"plan ({found.plan.policy}): {len(found.plan.raised)} groups in blocks {raised}, A8 share {share:.1f} %"
        if raised
        else f"plan ({found.plan.policy}): no group is raised",
        markup=False,
        soft_wrap=True,
    )
    page = output / "report.html"
    out.print(f"report: {page}", soft_wrap=True, markup=False)
    emit({"report": str(page), "plan": found.report["plan"], "thresholds": found.report["thresholds"]}, as_json)


def _blocks(blocks: tuple[int, ...]) -> str:
    if not blocks:
        return "none"
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"


def _spikes(report: dict[str, Any]) -> list[str]:
    """The prefix, and which inputs a few tokens dominate, before and behind it."""
    lines = []
    if report["prefix"]:
        tokens = " ".join(map(repr, report["prefix"]["texts"]))
        lines.append(f"prefix ({report['prefix']['method']}): {tokens}, with 16-bit keys and values before every text")
    for side in ("raw", "isolated"):
        seen = report["observations"].get(side)
        if seen:
            top = sorted(seen["groups"], key=lambda g: -g["spike_ratio"])[:3]
            found = ", ".join(f"{g['spike_ratio']:,.0f} × at {g['group']} of block {g['block']}" for g in top)
            lines.append(f"largest token of an input against its median one, {seen['coordinates']}: {found}")
    return lines
