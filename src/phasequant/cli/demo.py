"""`phasequant demo`: the embedded model quantized six ways."""

from pathlib import Path
from typing import Annotated

import typer

from phasequant.cli.options import Calib, Device, Json, Quiet, Text, emit
from phasequant.cli.tables import figures_table
from phasequant.console import out, set_quiet


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the report")] = Path("phasequant-demo"),
    text: Text = "builtin",
    calib: Calib = None,
    chunks: Annotated[int, typer.Option("--chunks", help="chunks to evaluate on")] = 4,
    model: Annotated[str, typer.Option("--model", help="another model than the embedded one")] = "demo",
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="another recipe than quarot; flat-quick learns, in minutes on a CPU")
    ] = "quarot",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize SmolLM2-135M six ways, measure each, and write the report."""
    from phasequant.demo import run_demo

    set_quiet(quiet)
    report, page = run_demo(model, output, text=text, calib=calib, chunks=chunks, device=device, recipe=recipe)
    out.print(figures_table(report["results"], report["evaluation"]))
    out.print(f"report: {page}", soft_wrap=True, markup=False)
    emit({"report": str(page), "results": report["results"], "evaluation": report["evaluation"]}, as_json)
