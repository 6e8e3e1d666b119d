"""report.json and report.html: one file that answers where 4 bits break a model, why, and what was done about it.

The page loads nothing. Charts are drawn from plain numbers by a short script of our own (`charts.js`): a plotting
library would be two thirds of the page and of the time to open it. Text and tables are plain HTML and need no script;
behind every chart stands a table of its numbers.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from phasequant.report import budget, charts, maps
from phasequant.report.figures import table
from phasequant.report.findings import blocks_text, summary
from phasequant.report.picture import online_share, picture
from phasequant.report.rows import flat, learning_row, phase_row, plan_rows, run_rows, transform_row, weights_row
from phasequant.report.sides import FLOOR, Json, before_after, bits, gaussian_gsr, mean_gsr, sides

__all__ = ["blocks_text", "context", "is_report", "render", "summary", "write_page"]

FILES = {"report.json", "report.html", "plan.json", "recipe.yaml"}


def write_page(report: Json, folder: Path) -> Path:
    """Write report.json and report.html into a folder; the page's path."""
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render(report), encoding="utf-8")
    return page


def is_report(folder: Path) -> bool:
    """Whether a directory is an earlier report and nothing else."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        names = {path.name for path in folder.iterdir()}
        return "phasequant" in report["versions"] and names <= FILES
    except (OSError, ValueError, TypeError, KeyError):
        return False


def environment() -> jinja2.Environment:
    """Templates of this package; what they include stands in it, too."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("phasequant", "report"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def render(report: Json) -> str:
    """The page's HTML."""
    return environment().get_template("report.html.j2").render(context(report))


def context(report: Json) -> Json:
    """What the template shows."""
    model = report["model"]
    figures = finite(charts.build(report))
    return {
        "report": report,
        "model": model,
        "recipe_line": recipe_line(report),
        "summary": summary(report),
        **drawn(figures),
        "state": {
            "first": "with" if report["thresholds"]["first_token"] else "without",
            "bits": "4",
            "gsr": "mean",
            "side": "0",
            "rows": "all",
            "policy": chosen_plan(report),
        },
        "sides": [side["coordinates"] for side in sides(report)],
        "side_choices": [(str(i), side["coordinates"]) for i, side in enumerate(sides(report))],
        "groups": list(dict.fromkeys(g["group"] for g in report["observations"]["raw"]["groups"])),
        "averages": before_after(report),
        "plans": {name: plan_rows(plan) for name, plan in report["plans"].items()},
        "bit_levels": maps.bit_levels(report),
        "budget": budget.rows(report),
        "measure": budget.UNITS.get(*[(budget.harm_of(report) or ("",))[0]] * 2),
        "gaussian": gaussian_gsr(model["d_model"]),
        "floor": FLOOR,
        "mean_gsr": [mean_gsr(side) for side in sides(report)],
        "learning": learning_row(report.get("learning")),
        "weights": weights_row(report.get("weights")),
        "transform": [transform_row(entry, model) for entry in report["transform"]],
        "picture": picture(report),
        "online": online_share(report),
        "runs": run_rows(report.get("runs")),
        "phases": [phase_row(phase) for phase in report["observations"]["raw"]["phases"]],
        "bands": charts.BANDS,
        "settings": list(flat(report["recipe"])),
    }


def drawn(figures: dict[str, Json]) -> Json:
    """Charts for the script, and their tables for the template."""
    return {
        "tables": {name: table(figure) for name, figure in figures.items()},
        "figures": {name: {k: v for k, v in figure.items() if k != "table"} for name, figure in figures.items()},
    }


def finite(value: Any) -> Any:
    """The same with null for what JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def recipe_line(report: Json) -> str:
    """Bits, transform and policy in one line."""
    plan = report["plan"]
    widths = f"W{bits(plan['weights'])}A{bits(plan['low'])}KV{bits(plan['kv'])}"
    return f"{widths} · transform {report['recipe']['transform']['method']} · policy {plan['policy']}"


def chosen_plan(report: Json) -> str:
    """The name under which the chosen plan stands among all."""
    return next((name for name, plan in report["plans"].items() if plan == report["plan"]), next(iter(report["plans"])))
