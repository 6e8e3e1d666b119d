"""report.json and report.html: one file that answers where 4 bits break a model, why, and what was done about it.

The page loads nothing: Plotly's bundle travels inside it, compressed, and is unpacked by the browser. Text and tables
are plain HTML and need no script.
"""

import base64
import functools
import gzip
import json
import math
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from phasequant.report import charts
from phasequant.report.charts import bits

Json = dict[str, Any]
FILES = {"report.json", "report.html", "plan.json", "recipe.yaml"}
RUNGS = {
    "hadamard": "",
    "diagonal": "",
    "learned": "",
    "wush": "",
    "kronecker": "",
    "block-hadamard": "no Hadamard matrix of the whole width: it mixes within blocks only",
    "random-orthogonal": "no Hadamard matrix of this width: a dense random rotation, costlier and less even",
    "identity": "width 1: nothing to rotate",
}


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


def render(report: Json) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = (resources.files("phasequant.report") / "template.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(context(report), plotly=plotly_bundle())


@functools.cache
def plotly_bundle() -> str:
    """Plotly's script: gzip, then base64."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def context(report: Json) -> Json:
    """What the template shows."""
    model = report["model"]
    return {
        "report": report,
        "model": model,
        "recipe_line": recipe_line(report),
        "summary": summary(report),
        "figures": finite(charts.build(report)),
        "state": {
            "first": "with" if report["thresholds"]["first_token"] else "without",
            "bits": "4",
            "gsr": "mean",
            "side": "0",
            "policy": chosen_plan(report),
        },
        "sides": [side["coordinates"] for side in charts.sides(report)],
        "side_choices": [(str(i), side["coordinates"]) for i, side in enumerate(charts.sides(report))],
        "plans": {name: plan_rows(plan) for name, plan in report["plans"].items()},
        "bit_colors": dict(zip(charts.bit_levels(report), charts.BIT_COLORS, strict=False)),
        "gaussian": gaussian_gsr(model["d_model"]),
        "floor": charts.FLOOR,
        "mean_gsr": [mean_gsr(side) for side in charts.sides(report)],
        "learning": learning_row(report.get("learning")),
        "weights": weights_row(report.get("weights")),
        "transform": [transform_row(entry, model) for entry in report["transform"]],
        "phases": [phase_row(phase) for phase in report["observations"]["raw"]["phases"]],
        "drawn": charts.BANDS,
        "settings": list(flat(report["recipe"])),
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


# --- header -------------------------------------------------------------------------------------------------------


def recipe_line(report: Json) -> str:
    """Bits, transform and policy in one line."""
    plan = report["plan"]
    widths = f"W{bits(plan['weights'])}A{bits(plan['low'])}KV{bits(plan['kv'])}"
    return f"{widths} · transform {report['recipe']['transform']['method']} · policy {plan['policy']}"


def chosen_plan(report: Json) -> str:
    """The name under which the chosen plan stands among all."""
    return next((name for name, plan in report["plans"].items() if plan == report["plan"]), next(iter(report["plans"])))


# --- summary ------------------------------------------------------------------------------------------------------


def summary(report: Json) -> list[str]:
    """The findings, a sentence each."""
    makers = (about_phases, about_prefix, about_jumps, about_gsr, about_noise, about_plan, about_results)
    return [sentence for maker in makers if (sentence := maker(report))]


def about_phases(report: Json) -> str:
    """The strongest phase, and how many more there are."""
    raw = report["observations"]["raw"]
    if not raw["phases"]:
        return "No value of the residual stream stands out: none exceeds 100 and 100 times the median."
    top = raw["phases"][0]
    row = phase_row(top)
    tokens = "the first token of a sequence" if top["first_token"] else f"tokens such as {row['tokens'][0][0]}"
    text = (
        f"Channel {top['channel']} of the residual stream reaches {row['peak']} on {tokens}, {row['times']} times the "
        f"median: written by {row['written']}, taken back by {row['taken_back']}."
    )
    others = sorted({phase["channel"] for phase in raw["phases"]} - {top["channel"]})
    if not others:
        return text
    named = f"Channel {others[0]} stands" if len(others) == 1 else f"{len(others)} other channels stand"
    return f"{text} {named} out too, less far."


def about_prefix(report: Json) -> str:
    """Which tokens stand before every sequence, and what that does to the largest ratio."""
    prefix, behind = report.get("prefix"), report["observations"].get("isolated")
    if not prefix or not behind:
        return ""
    tops = [max(side["groups"], key=lambda g: g["spike_ratio"]) for side in (report["observations"]["raw"], behind)]
    texts = " ".join(map(repr, prefix["texts"]))
    before, after = (f"{top['spike_ratio']:,.1f} (block {top['block']}, {top['group']})" for top in tops)
    return (
        f"A prefix of {len(prefix['tokens'])} tokens ({prefix['method']}: {texts}) with 16-bit keys and values stands "
        f"before every sequence: the largest token of a linear's input is {after} times the median one behind it, "
        f"{before} without."
    )


def about_jumps(report: Json) -> str:
    """Blocks beyond both thresholds."""
    limits = report["thresholds"]
    side = charts.planned_side(report)
    key = charts.FIRST["with" if limits["first_token"] else "without"]
    ratios, snrs = side["jump_ratio"][key], side["snr"]["4"][key]
    found = [b for b, r in enumerate(ratios) if r > limits["jr"] and snrs[b] < limits["snr"]]
    origin = "as given" if limits["given"] else "median and interquartile range of the blocks"
    rule = f"Jump Ratio above {limits['jr']:.2f} and 4-bit SNR below {limits['snr']:.1f} dB ({origin})"
    if not found:
        return f"No block rewrites the stream enough to drown what it held: none has a {rule}."
    top = max(found, key=ratios.__getitem__)
    size = f"{ratios[top]:.3g} times its norm"
    if len(found) == 1:
        return f"Block {top} rewrites the stream ({size}): {rule}."
    return f"{blocks_text(found)} rewrite the stream, block {top} most ({size}): {rule}."


def blocks_text(blocks: list[int]) -> str:
    """As in: Blocks 0, 3 to 7 and 29."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    parts = [part for run in runs for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    return "Blocks " + (parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}")


def mean_gsr(side: Json) -> float:
    """GSR over all linear inputs."""
    return fmean(entry["gsr"] for entry in side["groups"])


def about_gsr(report: Json) -> str:
    """How coarse the 4-bit grid is, before and after."""
    means = [mean_gsr(side) for side in charts.sides(report)]
    text = f"The 4-bit step of a linear's input is {means[0]:.2f} of its standard deviation on average (GSR)"
    if len(means) > 1:
        text += f" in the raw model and {means[-1]:.2f} {charts.sides(report)[-1]['coordinates']}"
    width = report["model"]["d_model"]
    return f"{text}; a Gaussian row of {width} has {gaussian_gsr(width):.2f}."


def gaussian_gsr(width: int) -> float:
    """The 4-bit GSR of a Gaussian row: the median of its largest magnitude, over 7."""
    return NormalDist().inv_cdf((1 + 0.5 ** (1 / width)) / 2) / 7


def about_noise(report: Json) -> str:
    """The group whose low-bit input hurts most."""
    groups = report["observations"]["transformed"]["groups"]
    if not all("low" in g["noise"] for g in groups):
        return ""
    top = max(groups, key=lambda g: g["noise"]["low"])
    level = f"{10 * math.log10(max(top['noise']['low'], 1e-30)):.1f} dB".replace("-", "−")
    return (
        f"Read in {bits(report['plan']['low'])} bits, the input of {top['group']} in block {top['block']} adds most "
        f"noise to the stream, {level} relative to it."
    )


def about_plan(report: Json) -> str:
    """How many groups were raised."""
    plan, total = report["plan"], len(report["observations"]["raw"]["groups"])
    low = bits(plan["low"])
    if not plan["raised"]:
        return f"The plan ({plan['policy']}) raises nothing: all {total} groups read {low} bits.{_more(plan)}"
    high = " or ".join(map(str, sorted({entry["bits"] for entry in plan["raised"].values()})))
    share = f", {100 * plan['a8_share']:.1f} % of the linear multiply-adds" if high == "8" else ""
    return (
        f"The plan ({plan['policy']}) lets {len(plan['raised'])} of {total} groups read {high} bits{share}; "
        f"the others stay at {low}.{_more(plan)}"
    )


def _more(plan: Json) -> str:
    """What a plan gives more bits beside the inputs of groups; plans of older reports say nothing of it."""
    told = ""
    if plan.get("rows"):
        share, by = 100 * plan["rows"]["share"], plan["rows"]["by"]
        told += f" In those, the {share:g} % of the tokens with the largest {by} on the calibration text read 8 bits."
    for key, what in (
        ("weights_raised", "the weights of {} groups"),
        ("kv_raised", "the keys and values of {} blocks"),
    ):
        if plan.get(key):
            told += f" More bits have {what.format(len(plan[key]))}."
    return told


def about_results(report: Json) -> str:
    """The range of the table."""
    rows = report["results"]
    if len(rows) < 2:
        return ""
    ranked = sorted(rows[1:], key=lambda row: row["ppl"])
    return (
        f"Perplexity is {rows[0]['ppl']:.2f} for {rows[0]['name']}; the other rows lie between {ranked[0]['ppl']:.2f} "
        f"({ranked[0]['name']}) and {ranked[-1]['ppl']:.2f} ({ranked[-1]['name']})."
    )


# --- tables -------------------------------------------------------------------------------------------------------


def plan_rows(plan: Json) -> Json:
    """A plan's size and its raised groups."""
    rows = [(*place.split(".", 1), entry["bits"], entry["why"]) for place, entry in plan["raised"].items()]
    for place, entry in plan.get("weights_raised", {}).items():
        block, group = place.split(".", 1)
        rows.append((block, f"weights of {group}", entry["bits"], entry["why"]))
    rows += [(block, "KV", entry["bits"], entry["why"]) for block, entry in plan.get("kv_raised", {}).items()]
    return {"policy": plan["policy"], "low": bits(plan["low"]), "a8": f"{100 * plan['a8_share']:.1f}", "rows": rows}


def some_blocks(blocks: list[int]) -> str:
    """As in: blocks 28 and 29."""
    return blocks_text(blocks).replace("Blocks", "block" if len(blocks) == 1 else "blocks") if blocks else "no block"


def phase_row(phase: Json) -> Json:
    """One phase, as text."""
    return {
        "kind": "massive" if phase["massive"] else "large",
        "label": charts.phase_label(phase),
        "peak": f"{phase['peak']:,.0f}",
        "times": f"{phase['times']:,.0f}",
        "written": some_blocks(phase["written_by"]) if phase["appears"] >= 0 else "the embedding",
        "taken_back": some_blocks(phase["taken_back_by"]),
        "span": f"{max(phase['appears'], 0)}–{phase['last']}",
        "tokens": [(repr(text), count) for text, count in phase["tokens"]],
    }


def linear_macs(model: Json) -> int:
    """Multiply-adds a token of all linears inside the blocks; reports of older versions are of gated MLPs."""
    if "macs_total" in model:
        return int(model["macs_total"])
    heads, width = model["heads"] * model["d_head"], model["d_model"]
    keys = 2 * model["kv_heads"] * model["d_head"]
    return model["blocks"] * width * (2 * heads + keys + 3 * model["d_ffn"])


def learning_row(cost: Json | None) -> Json | None:
    """What learning the transform took; None where nothing is known of it."""
    if not cost:
        return None
    return {
        "seconds": f"{cost['seconds']:.1f}",
        "a_block": f"{cost['seconds_per_block']:.2f}",
        "peak": f"{cost['peak_bytes'] / 2**30:.2f}",
        "blocks": [
            {
                "block": index,
                "before": f"{one['loss_before']:.3g}",
                "after": f"{one['loss_after']:.3g}",
                "share": f"{100 * one['loss_after'] / one['loss_before']:.0f} %" if one["loss_before"] else "–",
                "seconds": f"{one['seconds']:.1f}",
                "peak": f"{one['peak_bytes'] / 2**30:.2f}",
            }
            for index, one in enumerate(cost["blocks"])
        ],
    }


def weights_row(weights: Json | None) -> Json | None:
    """How the codes of the weights came about; None where nothing is known of it."""
    if not weights:
        return None
    groups = weights["groups"]
    rows = []
    for name in dict.fromkeys(entry["group"] for entry in groups):
        own = [entry for entry in groups if entry["group"] == name]
        errors = [entry["error"] for entry in own if entry["error"] is not None]
        ranks = {int(entry["notes"].get("rank", 0)) for entry in own}
        rows.append(
            {
                "group": name,
                "error": f"{100 * fmean(errors):.3f} %" if errors else "–",
                "worst": f"{100 * max(errors):.3f} %" if errors else "–",
                "rank": ", ".join(str(rank) for rank in sorted(ranks) if rank) or "–",
                "dead": sum(entry["dead"] for entry in own) or "–",
            }
        )
    return {
        "method": weights["method"] + ("" if weights["lowrank"] == "none" else f" + {weights['lowrank']}"),
        "branch": f"{weights['branch_macs']:,}" if weights["branch_macs"] else "",
        "seconds": f"{weights['seconds']:.1f}",
        "peak": f"{weights['peak_bytes'] / 2**30:.2f}",
        "rows": rows,
        "fallen": [entry for entry in groups if entry["why"] is not None],
    }


def transform_row(entry: Json, model: Json) -> Json:
    """One place of the transform, with its cost and a word on its rung."""
    share = f"{100 * entry['macs'] / linear_macs(model):.2f} %" if entry["macs"] else "–"
    return {**entry, "share": share, "warning": RUNGS.get(entry["rung"], f"not a Hadamard matrix: {entry['rung']}")}


def flat(values: Json, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Every key of the recipe with its dots, and its value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(dict(value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)
